#include "checkpoint/store/capture_word.h"

#include <sys/stat.h>

#include <algorithm>

#include "checkpoint/store/fence.h"

namespace everstep::checkpoint {

std::optional<CaptureUnderWay> LookCapture(const Arena& arena, std::uint32_t slot) {
  const CaptureWord& word = *CaptureWordOf(arena.header(), slot);
  const SlotHeader& h = arena.header()->slot[slot];
  CaptureUnderWay out;
  SlotView& view = out.view;
  out.id = word.id.load(std::memory_order_acquire);
  if (out.id == 0) return std::nullopt;
  view.slot = slot;
  view.seq = h.seq.load(std::memory_order_relaxed);
  LoadWords(&view.extent_offset, &h.extent_offset, 8);
  LoadWords(&view.extent_bytes, &h.extent_bytes, 8);
  LoadWords(&view.fields, &word.fields, sizeof view.fields);
  LoadFence();
  if (word.id.load(std::memory_order_relaxed) != out.id) return std::nullopt;
  struct stat st {};
  if ((view.seq & 1) == 0 || out.id != view.fields.captured_ns || !CheckFields(view.fields).ok() ||
      fstat(arena.fd(), &st) != 0) {
    return std::nullopt;
  }
  const auto file = static_cast<std::uint64_t>(st.st_size);
  const bool sane = view.extent_offset >= kArenaHeaderBytes &&
                    view.extent_offset % kPageBytes == 0 && view.extent_bytes % kPageBytes == 0 &&
                    view.extent_offset <= file && view.extent_bytes <= file - view.extent_offset &&
                    view.fields.payload_bytes <= ExtentCapacity(view.extent_bytes);
  if (!sane) return std::nullopt;
  return out;
}

std::optional<std::uint64_t> ChunksWritten(const Arena& arena, const CaptureUnderWay& capture) {
  const CaptureWord& word = *CaptureWordOf(arena.header(), capture.view.slot);
  const std::uint64_t written = word.written.load(std::memory_order_acquire);
  LoadFence();
  if (word.id.load(std::memory_order_relaxed) != capture.id) return std::nullopt;
  return std::min(written, capture.view.fields.payload_bytes) / kChunkBytes;
}

}  // namespace everstep::checkpoint
