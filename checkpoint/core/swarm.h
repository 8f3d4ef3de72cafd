// From whom each of several nodes takes the same shard, so that its holders' links do not carry it
// once for every one of them. Pure and deterministic.
//
// A taker is a source, too: it passes on each chunk that it has checked while the others still come
// (checkpoint/transfer/relay.h). In chunk times over one link, for c chunks and n takers of one
// holder:
//
//   star    all take from the holder:                   n c
//   chain   holder -> 0 -> 1 -> 2 ...                   c + n - 1; no link carries a chunk twice
//   tree    every taker passes on to two               2 (c + depth - 1), depth = ceil(log2(n + 1))
//
// The chain is best unless there are many takers of few chunks; the tree is O(log n) whatever c is.
// Of several holders those that send least yet are taken, and each begins a chain or tree of its
// own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace everstep::checkpoint {

inline constexpr std::uint64_t kPassedOnBytes = 1u << 20;  // a chunk: checked, then passed on

struct SwarmSource {
  static constexpr std::size_t kHolder = SIZE_MAX;
  std::size_t holder = 0;       // where the bytes come from in the end: index into `sent`
  std::size_t taker = kHolder;  // who passes them on, always an earlier taker; kHolder: the holder
  std::uint32_t depth = 0;      // takers between this one and the holder
  friend bool operator==(const SwarmSource&, const SwarmSource&) = default;
};

// The source of each of `takers` nodes, of a shard of `bytes`. `sent`: bytes that each holder sends
// already by the plan; what this adds is added. REQUIRES: a holder.
std::vector<SwarmSource> PlanSwarm(std::size_t takers, std::uint64_t bytes,
                                   std::vector<std::uint64_t>* sent);

}  // namespace everstep::checkpoint
