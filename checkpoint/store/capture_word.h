// What a capture under way says of itself in the arena's header, so that its first chunks can leave
// the node before its last one is written (docs/internals/transfer.md, "Ahead of the table").
//
// A hint, never a promise: nothing in it makes a slot valid. What left ahead counts only when the
// table of the finished slot names it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

#include "checkpoint/store/arena.h"

namespace everstep::checkpoint {

struct alignas(64) CaptureWord {  // the slot's writer
  std::atomic<std::uint64_t> id;  // fields.captured_ns; 0: none is under way
  // Bytes from the payload's begin, whole chunks, that change no more; their CRCs neither.
  std::atomic<std::uint64_t> written;
  SlotFields fields;  // of what it becomes; payload_bytes: at most, no table
};
static_assert(sizeof(CaptureWord) == 128);
inline constexpr std::uint64_t kCaptureWordsAt = 1024;  // in the file; one for each slot
static_assert(sizeof(ArenaHeader) <= kCaptureWordsAt &&
              kCaptureWordsAt + kSlots * sizeof(CaptureWord) <= kArenaHeaderBytes);

inline CaptureWord* CaptureWordOf(ArenaHeader* header, std::uint32_t slot) {
  return reinterpret_cast<CaptureWord*>(reinterpret_cast<unsigned char*>(header) +
                                        kCaptureWordsAt) +
         slot;
}

// A capture under way. `view`: its place and its fields; no content, since there is none yet.
struct CaptureUnderWay {
  std::uint64_t id = 0;
  SlotView view;
};
// None: no capture of the slot is announced, or what is said of it cannot be.
std::optional<CaptureUnderWay> LookCapture(const Arena& arena, std::uint32_t slot);
// Whole chunks that are written; none: it has ended, finished or not.
std::optional<std::uint64_t> ChunksWritten(const Arena& arena, const CaptureUnderWay& capture);

}  // namespace everstep::checkpoint
