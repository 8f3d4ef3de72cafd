// The best sum of the values of exactly q items whose sizes sum to exactly N, each size as often as
// one likes: what compose.h's bounds and doubling are about. Pure.
#pragma once

#include <cstdint>
#include <vector>

namespace everstep::planner {

struct Item {
  std::uint32_t size = 0;
  std::int64_t value = 0;  // >= 1
};

// Whether q items can reach at least `goal`, by the concave hull: false is certain.
// REQUIRES items by size ascending, sizes distinct, q >= 1.
bool MayReach(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total,
              std::int64_t goal);

// Exactly. The sizes that do (q of them) in `sizes` unless that is null.
bool Reaches(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total,
             std::int64_t goal, std::vector<std::uint32_t>* sizes);

}  // namespace everstep::planner
