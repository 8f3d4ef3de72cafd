// How a job's state is kept so that it outlives nodes, as a policy: whole copies on peers, or
// parity over the states of several nodes. What people write, and what each policy costs. Pure.
//
//   replicate(m)   each node's state lies on m nodes, its own among them. `copies(m)` means the
//   same xor(k+1)       over k nodes' states one parity of their size: any one of those k + 1 may
//   go rs(k+r)        over k nodes' states r parities (Reed-Solomon): any r of those k + r may go
//
// They are one family: parity over a single state is a copy of it. rs(1+r) is replicate(r+1),
// rs(k+1) is xor(k+1), and PrintRedundancy says so. Where the parity lies: parity_groups.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace everstep::checkpoint {

inline constexpr std::uint32_t kMostShards = 32;   // k: a restore reads from so many nodes
inline constexpr std::uint32_t kMostParity = 8;    // r, for k > 1
inline constexpr std::uint32_t kMostCopies = 100;  // m

struct Redundancy {
  std::uint32_t shards = 1;  // k: states that one parity covers; 1: parity is a copy
  std::uint32_t parity = 1;  // r: parities, or copies beside the node's own
  bool copies() const { return shards == 1; }
  friend bool operator==(const Redundancy&, const Redundancy&) = default;
};

// "replicate(2)", "xor(4+1)", "rs(4+2)".
std::string PrintRedundancy(const Redundancy& policy);

// Empty: *policy has what the text says; blanks count for nothing. Else what is wrong with it, what
// would be right, in one line; *policy is as it was.
std::string ParseRedundancy(std::string_view text, Redundancy* policy);

// What becomes of a policy on so many nodes: no more parity than there are other nodes, then no
// more states under one parity than leave it a node of its own. On one node: replicate(1).
Redundancy OnNodes(const Redundancy& policy, std::uint32_t nodes);

// In states of one node: multiply by its bytes. Nothing here counts the node's own state.
struct RedundancyPrice {
  double memory = 0;           // kept for others by the node that keeps most; once for each slot
  double sent = 0;             // by each node in a step, and received
  double encoded = 0;          // bytes a node multiplies and adds in a step
  double restored = 0;         // moved to bring back the state of one lost node
  double decoded = 0;          // of those, through the decoder
  std::uint32_t survives = 0;  // any so many nodes may be lost at once
  friend bool operator==(const RedundancyPrice&, const RedundancyPrice&) = default;
};

// `policy` as OnNodes gave it; `least`, `largest`: nodes of the smallest and of the largest group
// (ParityPlacement; for copies they count for nothing).
//
// A parity over k' states is made anew by whoever holds it out of those k' states, so r states
// leave each node whatever k' is, as with copies; what is kept shrinks to r/k' and what a restore
// reads grows to k'.
RedundancyPrice PriceOf(const Redundancy& policy, std::uint32_t least, std::uint32_t largest);

}  // namespace everstep::checkpoint
