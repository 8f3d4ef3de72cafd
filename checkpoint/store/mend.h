// A finished slot whose bytes went bad where they lie: which chunk it is, and putting it right in
// place while the slot's writer may begin to overwrite it at any moment.
//
// The trainer is the one writer of its own slots, and an agent that mends one is a second. They
// agree through two words (Dekker): the mender writes SlotHeader::mending_seq, then looks at seq;
// the writer makes seq odd, then looks at mending_seq and waits while it names the content it is
// tearing, at most kMendPatience (an agent that was killed in the middle never clears it). So one
// of them sees the other. Mended bytes are those that the checksum names: whoever reads them
// meanwhile reads wrong ones or right ones, and checks.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "checkpoint/store/arena.h"

namespace everstep::checkpoint {

inline constexpr std::int64_t kTableDamaged = -1;  // in place of a chunk: fields or chunk CRCs

// One look at one chunk. kCorrupt: its bytes are not those of the CRC; kStale: overwritten.
Outcome CheckChunk(Arena* arena, const SlotView& view, std::uint64_t chunk);
// Whether the chunk CRCs and the fields give the root. As CheckChunk.
Outcome CheckTable(Arena* arena, const SlotView& view);
// The first chunk that is bad, or kTableDamaged; none: whole, or overwritten meanwhile.
std::optional<std::int64_t> FirstDamage(Arena* arena, const SlotView& view);

// Puts one chunk's bytes in place. False: the slot is being overwritten, nothing more is touched.
// One mender an arena at a time; the caller has checked the bytes.
bool MendChunk(Arena* arena, const SlotView& view, std::uint64_t chunk, const unsigned char* bytes);
// The chunk CRCs likewise.
bool MendTable(Arena* arena, const SlotView& view, const std::vector<std::uint32_t>& crcs);

// The writer's side: call after the slot was torn, with the sequence it had before. As long as a
// living mender may be kept from its processor on a busy machine: past it, its page would lie in
// the new capture, and cost that slot when it is checked.
inline constexpr std::chrono::milliseconds kMendPatience{1000};
void AwaitMender(SlotHeader* slot, std::uint64_t torn_seq);

// Tears a finished slot for good, so that nothing finds its content again. REQUIRES: no writer.
void Discard(Arena* arena, const SlotView& view);

}  // namespace everstep::checkpoint
