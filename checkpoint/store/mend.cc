#include "checkpoint/store/mend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

Error Overwritten(const Arena& arena, const SlotView& view) {
  return {ErrorCode::kStale,
          fmt::format("{}: step {} was overwritten meanwhile", arena.Name(), view.step())};
}

// Copies while the slot still has the view's content; what has begun to be torn is left alone.
bool Put(Arena* arena, const SlotView& view, unsigned char* to, const void* from,
         std::size_t bytes) {
  SlotHeader& slot = arena->header()->slot[view.slot];
  slot.mending_seq.store(view.seq, std::memory_order_seq_cst);
  bool current = true;
  for (std::size_t at = 0; at < bytes && current; at += kPageBytes) {
    current = slot.seq.load(std::memory_order_seq_cst) == view.seq;
    if (!current) break;
    std::memcpy(to + at, static_cast<const unsigned char*>(from) + at,
                std::min<std::size_t>(kPageBytes, bytes - at));
  }
  slot.mending_seq.store(0, std::memory_order_release);
  return current;
}

}  // namespace

Outcome CheckChunk(Arena* arena, const SlotView& view, std::uint64_t chunk) {
  const unsigned char* data = arena->Payload(view);
  const std::uint32_t* crcs = arena->ChunkCrcs(view);
  if (data == nullptr) return Error{ErrorCode::kInternal, arena->Name() + ": cannot be mapped"};
  const std::uint32_t crc = Crc32c(data + chunk * kChunkBytes, view.chunk_size(chunk));
  const std::uint32_t wanted = crcs[chunk];
  if (!arena->Current(view)) return Overwritten(*arena, view);
  if (crc == wanted) return Done{};
  return Error{ErrorCode::kCorrupt, fmt::format("{}: step {}: chunk {} has CRC {:08x}, not {:08x}",
                                                arena->Name(), view.step(), chunk, crc, wanted)};
}

Outcome CheckTable(Arena* arena, const SlotView& view) {
  const std::uint32_t* crcs = arena->ChunkCrcs(view);
  if (crcs == nullptr) return Error{ErrorCode::kInternal, arena->Name() + ": cannot be mapped"};
  const std::uint32_t root = CrcRoot(view.fields, crcs);
  if (!arena->Current(view)) return Overwritten(*arena, view);
  if (root == view.crc_root) return Done{};
  return Error{ErrorCode::kCorrupt,
               fmt::format("{}: step {}: its chunk checksums give {:08x}, not {:08x}",
                           arena->Name(), view.step(), root, view.crc_root)};
}

std::optional<std::int64_t> FirstDamage(Arena* arena, const SlotView& view) {
  const auto bad = [](const Outcome& o) {
    return !o.ok() && o.error().code == ErrorCode::kCorrupt;
  };
  if (bad(CheckTable(arena, view))) return kTableDamaged;
  for (std::uint64_t i = 0; i < view.chunks(); ++i) {
    if (bad(CheckChunk(arena, view, i))) return static_cast<std::int64_t>(i);
  }
  return std::nullopt;
}

bool MendChunk(Arena* arena, const SlotView& view, std::uint64_t chunk,
               const unsigned char* bytes) {
  auto* data = const_cast<unsigned char*>(arena->Payload(view));
  return data != nullptr && chunk < view.chunks() &&
         Put(arena, view, data + chunk * kChunkBytes, bytes, view.chunk_size(chunk));
}

bool MendTable(Arena* arena, const SlotView& view, const std::vector<std::uint32_t>& crcs) {
  auto* table = const_cast<std::uint32_t*>(arena->ChunkCrcs(view));
  return table != nullptr && crcs.size() == view.chunks() &&
         Put(arena, view, reinterpret_cast<unsigned char*>(table), crcs.data(), 4 * crcs.size());
}

void AwaitMender(SlotHeader* slot, std::uint64_t torn_seq) {
  if (torn_seq == 0 || slot->mending_seq.load(std::memory_order_seq_cst) != torn_seq) return;
  const auto until = std::chrono::steady_clock::now() + kMendPatience;
  while (slot->mending_seq.load(std::memory_order_seq_cst) == torn_seq) {
    if (std::chrono::steady_clock::now() >= until) {
      slot->mending_seq.store(0, std::memory_order_relaxed);  // its agent is gone
      return;
    }
    std::this_thread::yield();
  }
}

void Discard(Arena* arena, const SlotView& view) {
  std::uint64_t seq = view.seq;
  arena->header()->slot[view.slot].seq.compare_exchange_strong(seq, seq | 1,
                                                               std::memory_order_release);
}

}  // namespace everstep::checkpoint
