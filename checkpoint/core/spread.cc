#include "checkpoint/core/spread.h"

#include <algorithm>
#include <cstddef>
#include <queue>
#include <set>
#include <utility>

namespace everstep::checkpoint {

std::vector<std::uint32_t> ByDomain(const std::vector<std::vector<std::uint32_t>>& levels,
                                    const std::vector<std::vector<std::uint32_t>>& together,
                                    const std::vector<std::uint32_t>& nodes) {
  // A level's width is the mean size of its domains; levels may come in any order.
  std::vector<std::pair<std::size_t, std::size_t>> width;  // domains, level
  for (std::size_t l = 0; l < levels.size(); ++l) {
    std::set<std::uint32_t> numbers(levels[l].begin(), levels[l].end());
    width.emplace_back(numbers.size(), l);
  }
  std::sort(width.begin(), width.end());
  std::vector<std::pair<std::vector<std::uint32_t>, std::uint32_t>> keyed;
  for (const std::uint32_t v : nodes) {
    std::vector<std::uint32_t> key;
    key.reserve(width.size() + 1);
    for (const auto& [domains, level] : width) key.push_back(levels[level][v]);
    for (std::uint32_t s = 0; s < together.size(); ++s) {
      const auto& set = together[s];
      if (std::find(set.begin(), set.end(), v) == set.end()) continue;
      key.push_back(s);
      break;
    }
    keyed.emplace_back(std::move(key), v);
  }
  std::sort(keyed.begin(), keyed.end());
  std::vector<std::uint32_t> out;
  out.reserve(keyed.size());
  for (const auto& [key, v] : keyed) out.push_back(v);
  return out;
}

std::vector<std::uint32_t> Deal(const std::vector<std::uint32_t>& buckets,
                                const std::vector<std::uint32_t>& nodes) {
  std::vector<std::uint32_t> start(buckets.size(), 0), filled(buckets.size(), 0);
  for (std::size_t b = 1; b < buckets.size(); ++b) start[b] = start[b - 1] + buckets[b - 1];
  // Next: the bucket whose (filled + 1/2) / size is least.
  const auto later = [&](std::size_t a, std::size_t b) {
    const std::uint64_t x = std::uint64_t{2 * filled[a] + 1} * buckets[b];
    const std::uint64_t y = std::uint64_t{2 * filled[b] + 1} * buckets[a];
    return x != y ? x > y : a > b;
  };
  std::priority_queue<std::size_t, std::vector<std::size_t>, decltype(later)> next(later);
  for (std::size_t b = 0; b < buckets.size(); ++b) next.push(b);
  std::vector<std::uint32_t> at(nodes.size());
  for (const std::uint32_t v : nodes) {
    const std::size_t b = next.top();
    next.pop();
    at[start[b] + filled[b]++] = v;
    if (filled[b] < buckets[b]) next.push(b);
  }
  return at;
}

}  // namespace everstep::checkpoint
