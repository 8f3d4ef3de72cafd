// Which nodes' states share a parity, and which nodes keep it. Pure and deterministic.
//
// Nodes are cut into closed groups. Each state of a group of n nodes is cut into n - r pieces, and
// the group has n rows. Row s: nodes s .. s+r-1 of the group, cyclically, hold the r parities of
// one piece of each other node's state. So no node holds parity over its own state, every node is
// in n - r rows with a piece and in r rows with a parity, and memory and load are the same for all:
//
//   n = 4, r = 1      node 0   node 1   node 2   node 3        (RAID 5, rotated; each holds r/(n-r)
//     row 0           parity   piece    piece    piece          of a state for others)
//     row 1           piece    parity   piece    piece
//     row 2           piece    piece    parity   piece
//     row 3           piece    piece    piece    parity
//
// Every row spans the same n nodes, so any r of a group may be lost, and r + 1 of them never: what
// a placement survives depends on which nodes are grouped alone (survival.h: LossGroup).
//
// Groups have k + r nodes. Left-over nodes:
//   balanced       go to those groups, which get larger: nobody keeps more parity than r/k of a
//   state max_survival   make one group more, and all get smaller: fewer nodes hang together, up to
//                  r/(least - r) of a state is kept, and a restore reads less
// Failure domains: first as few domains as can be whose loss takes more than r nodes of a group.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/core/placement.h"
#include "checkpoint/core/redundancy.h"
#include "checkpoint/core/survival.h"

namespace everstep::checkpoint {

struct ParityInput {
  std::uint32_t nodes = 0;
  Redundancy policy;                                 // on so many nodes: OnNodes is applied
  Strategy strategy = Strategy::kBalanced;           // or kMaxSurvival
  std::vector<std::vector<std::uint32_t>> levels;    // as in PlacementInput
  std::vector<std::vector<std::uint32_t>> together;  // as in PlacementInput
};

struct ParityRow {
  std::vector<std::uint32_t> members;  // nodes, one piece of each is covered; never a holder
  std::vector<std::uint32_t> holders;  // of parity 0, 1, ...
};

struct ParityPlacement {
  Redundancy policy;                               // as it is on these nodes
  std::vector<std::vector<std::uint32_t>> groups;  // nodes, ascending; by their first
  std::vector<FatalDomain> fatal;                  // by level, then number
  RedundancyPrice price;
};

// REQUIRES nodes >= 1, a policy of parity (copies: Place), each of levels of size nodes, members of
// sets < nodes. O(N log N) where the spread by levels leaves nothing to mend.
ParityPlacement PlaceParity(const ParityInput& input);

// The rows of a group. REQUIRES parity < group.size().
std::vector<ParityRow> RowsOf(const std::vector<std::uint32_t>& group, std::uint32_t parity);

// For the survival functions: which losses each group bears.
std::vector<LossGroup> LossGroupsOf(const ParityPlacement& placement);

}  // namespace everstep::checkpoint
