// What policies of redundancy would cost and survive on the nodes that a job has, side by side.
// Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/core/placement.h"
#include "checkpoint/core/redundancy.h"
#include "checkpoint/core/survival.h"

namespace everstep::checkpoint {

struct PolicyPrice {
  Redundancy policy;
  RedundancyPrice price;
  // Pr(state survives | k nodes are lost), k = 1, 2, ...: of a placement made anew.
  std::vector<Estimate> survival;
  std::uint32_t fatal = 0;  // domains whose loss alone loses state
  // Parity groups, and nodes in the smallest and in the largest; 0 for copies.
  std::uint32_t groups = 0, least = 0, largest = 0;
};

// `where` has nodes and domains; its copies and its previous placement count for nothing.
// `replicated`: every node's state is the same, so whatever the policy, any node that is left will
// do. max_lost larger than there are nodes: all of them. REQUIRES nodes >= 1.
PolicyPrice PricePolicy(const PlacementInput& where, const Redundancy& policy, bool replicated,
                        std::uint32_t max_lost);

// What is worth comparing on so many nodes: `in_force` first, then by parities and states under
// one; none that would be another one there, and of those that make the same groups the widest. At
// most 12.
std::vector<Redundancy> PoliciesToCompare(const Redundancy& in_force, std::uint32_t nodes);

}  // namespace everstep::checkpoint
