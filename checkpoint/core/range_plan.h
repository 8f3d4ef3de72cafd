// Which bytes of which shards one rank reads to put its state together in another layout than the
// one that captured it, in which order, and where they go. Pure.
//
//   shards of the old world, by rank          the new rank's payload
//     0 [ a0 | b0 | table ]   ---------->       [ a: end of a0, begin of a1 | b: ... | table ]
//     1 [ a1 | b1 | table ]   ----^
//
// The trainer says what it wants (it alone knows its model's layout: _reshard.py); here the list is
// checked, since it comes from a process that may be wrong, cut at the chunks that carry a
// checksum, and ordered: the cheapest shards first, among equal ones each rank begins with another,
// so that no holder serves everybody at once.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::checkpoint {

// `count` runs of `bytes` each, `source_stride` apart in the shard's payload and `dest_stride` in
// the new one. Little-endian, as the trainer writes it (everstep_range of everstep.h).
struct WantedRange {
  std::int32_t rank = 0;    // of the shard
  std::uint32_t count = 1;  // at least 1
  std::uint64_t source = 0;
  std::uint64_t source_stride = 0;  // meaningful with count > 1, as dest_stride
  std::uint64_t dest = 0;
  std::uint64_t dest_stride = 0;
  std::uint64_t bytes = 0;  // at least 1
};
static_assert(sizeof(WantedRange) == 48);

// Where a shard's bytes can be had, cheapest first.
enum class ShardTier : std::uint32_t { kLocal = 0, kPeer = 1, kFile = 2 };

struct RangeShard {
  std::uint64_t payload_bytes = 0;
  ShardTier tier = ShardTier::kPeer;
};

inline constexpr std::uint64_t kMaxRangePieces = std::uint64_t{1} << 24;  // of one rank's state

// Bytes within one chunk of a shard.
struct RangePiece {
  std::uint64_t source = 0;
  std::uint64_t dest = 0;
  std::uint32_t bytes = 0;
  friend bool operator==(const RangePiece&, const RangePiece&) = default;
};

struct ShardReads {
  Rank rank = 0;
  std::vector<RangePiece> pieces;     // by source; none crosses a chunk
  std::vector<std::uint32_t> chunks;  // those that hold them, ascending
};

struct RangePlan {
  std::string error;               // not empty: the list makes no sense, and why
  std::vector<ShardReads> shards;  // in the order in which they are read
  std::uint64_t bytes = 0;         // wanted, all pieces together
  std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps;  // of the new payload: [from, to)
};

// `shards` by rank. The new payload has `dest_bytes`; each of its bytes comes from one place at
// most (padding from none). `reader`: the new rank.
RangePlan PlanRanges(std::span<const WantedRange> wanted, std::span<const RangeShard> shards,
                     std::uint64_t dest_bytes, std::uint32_t chunk_bytes, Rank reader);

// The pieces of one chunk.
std::span<const RangePiece> PiecesOf(const ShardReads& reads, std::uint32_t chunk,
                                     std::uint32_t chunk_bytes);

}  // namespace everstep::checkpoint
