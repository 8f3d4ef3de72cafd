// Parities as shards: which numbers they go by, what each covers, what brings a lost shard back.
// Pure. The groups and their rows: parity_groups.h.
//
// A shard's payload is cut into k = n - r pieces of whole chunks, n the ranks of its group. Piece j
// of the rank at position q lies in row (q - r - j) mod n, as column j of its codeword. In a row s,
// the ranks at positions s .. s + r - 1 hold parity 0 .. r - 1: so rank h holds one parity p for
// each p < r, and parity p of holder h is the shard of "rank" world * (p + 1) + h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::checkpoint {

inline bool IsParity(Rank rank, std::int32_t world) {
  return rank >= world;
}
inline Rank ParityRank(Rank holder, std::uint32_t p, std::int32_t world) {
  return world * static_cast<Rank>(p + 1) + holder;
}
inline Rank HolderOf(Rank parity, std::int32_t world) {
  return parity % world;
}

// Chunks [first, end) of a shard of so many chunks, cut into so many pieces.
struct Piece {
  std::uint64_t first = 0;
  std::uint64_t end = 0;
};
constexpr Piece PieceOf(std::uint64_t chunks, std::uint64_t pieces, std::uint64_t piece) {
  const std::uint64_t each = (chunks + pieces - 1) / pieces;
  return {std::min(piece * each, chunks), std::min((piece + 1) * each, chunks)};
}

struct Codeword {
  std::vector<Rank> members;   // by column: piece j of members[j]
  std::vector<Rank> parities;  // by number
};

// By row. REQUIRES parity < group.size().
std::vector<Codeword> CodewordsOf(const std::vector<Rank>& group, std::uint32_t parity,
                                  std::int32_t world);

// Of the group's ranks that are not in `have` (shards and parities that can be had): whether all of
// them come back.
bool Recoverable(const std::vector<Codeword>& codewords, const std::set<Rank>& have);

}  // namespace everstep::checkpoint
