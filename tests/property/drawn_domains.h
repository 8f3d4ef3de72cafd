// Failure domains drawn from a seed, for property tests of placements and parity groups.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

#include "proto/base/random.h"

namespace everstep::checkpoint {

// Gives `in` (a PlacementInput or ParityInput of n nodes) two nested levels, and sets that are
// evicted together.
template <typename Input>
void DrawDomains(Random* random, std::uint32_t n, Input* in) {
  const auto racks = static_cast<std::uint32_t>(2 + random->Below(n - 1));
  const auto zones = static_cast<std::uint32_t>(1 + random->Below(4));
  std::vector<std::uint32_t> zone, rack;
  for (std::uint32_t v = 0; v < n; ++v) {
    rack.push_back(static_cast<std::uint32_t>(random->Below(racks)));
    zone.push_back(rack.back() % zones);
  }
  in->levels = {zone, rack};
  for (std::uint64_t i = random->Below(4); i > 0; --i) {
    std::set<std::uint32_t> set;
    const std::uint64_t size = 2 + random->Below(n / 2);
    while (set.size() < size) set.insert(static_cast<std::uint32_t>(random->Below(n)));
    in->together.emplace_back(set.begin(), set.end());
  }
}

}  // namespace everstep::checkpoint
