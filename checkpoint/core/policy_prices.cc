#include "checkpoint/core/policy_prices.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <optional>

#include "checkpoint/core/parity_groups.h"

namespace everstep::checkpoint {
namespace {

// States under one parity, by number of parities less one.
constexpr std::uint32_t kShown[][4] = {{2, 3, 4, 8}, {2, 4, 8}, {8}};

std::vector<Estimate> Exact(const std::vector<double>& by_losses) {
  std::vector<Estimate> out;
  out.reserve(by_losses.size());
  for (std::size_t k = 1; k < by_losses.size(); ++k) {
    out.push_back({by_losses[k], by_losses[k], by_losses[k], true, 0});
  }
  return out;
}

std::vector<Estimate> ByLosses(std::uint32_t nodes, const std::vector<NodeSet>& hosts,
                               std::uint32_t most) {
  if (const auto exact = SurvivalByLosses(nodes, hosts, most)) return Exact(*exact);
  std::vector<Estimate> out;
  out.reserve(most);
  for (std::uint32_t k = 1; k <= most; ++k) out.push_back(Survival(nodes, hosts, k));
  return out;
}

// Domains that every node lies in.
std::uint32_t Whole(const PlacementInput& where) {
  std::uint32_t count = 0;
  for (const auto& level : where.levels) {
    count += level.front() != kNoDomain &&
             std::all_of(level.begin(), level.end(),
                         [&](std::uint32_t number) { return number == level.front(); });
  }
  for (NodeSet set : where.together) {
    std::sort(set.begin(), set.end());
    set.erase(std::unique(set.begin(), set.end()), set.end());
    count += set.size() == where.nodes;
  }
  return count;
}

}  // namespace

PolicyPrice PricePolicy(const PlacementInput& where, const Redundancy& policy, bool replicated,
                        std::uint32_t max_lost) {
  const std::uint32_t n = where.nodes, most = std::min(max_lost, n);
  PolicyPrice out{.policy = OnNodes(policy, n)};
  if (out.policy.copies()) {
    PlacementInput in = where;
    in.copies = out.policy.parity + 1;
    in.previous.clear();
    const Placement placed = Place(in);
    out.price = PriceOf(out.policy, n, n);
    out.fatal = static_cast<std::uint32_t>(placed.fatal.size());
    if (!replicated) out.survival = ByLosses(n, placed.hosts, most);
  } else {
    const ParityPlacement placed = PlaceParity({.nodes = n,
                                                .policy = policy,
                                                .strategy = where.strategy,
                                                .levels = where.levels,
                                                .together = where.together});
    out.price = placed.price;
    const auto [least, largest] =
        std::minmax_element(placed.groups.begin(), placed.groups.end(),
                            [](const auto& a, const auto& b) { return a.size() < b.size(); });
    out.groups = static_cast<std::uint32_t>(placed.groups.size());
    out.least = static_cast<std::uint32_t>(least->size());
    out.largest = static_cast<std::uint32_t>(largest->size());
    out.fatal = static_cast<std::uint32_t>(placed.fatal.size());
    if (!replicated) out.survival = Exact(SurvivalByLosses(n, LossGroupsOf(placed), most));
  }
  if (replicated) {
    NodeSet all(n);
    std::iota(all.begin(), all.end(), 0U);
    out.survival = ByLosses(n, {all}, most);
    out.price.survives = n - 1;
    out.price.restored = n > 1 ? 1 : 0;  // any node's state is the lost one's
    out.price.decoded = 0;
    out.fatal = Whole(where);
  }
  return out;
}

std::vector<Redundancy> PoliciesToCompare(const Redundancy& in_force, std::uint32_t nodes) {
  std::vector<Redundancy> out = {OnNodes(in_force, nodes)};
  const auto add = [&](const Redundancy& policy) {
    const bool fits = OnNodes(policy, nodes) == policy;
    if (fits && std::find(out.begin(), out.end(), policy) == out.end()) out.push_back(policy);
  };
  add({.shards = 1, .parity = 0});
  std::uint32_t parity = 0;
  for (const auto& states : kShown) {
    ++parity;
    if (parity < 3) add({.shards = 1, .parity = parity});
    for (std::size_t i = 0; i < std::size(states); ++i) {
      const bool last = i + 1 == std::size(states) || states[i + 1] + parity > nodes;
      const bool same = !last && nodes / (states[i] + parity) == nodes / (states[i + 1] + parity);
      if (states[i] > 0 && !same) add({.shards = states[i], .parity = parity});
    }
  }
  return out;
}

}  // namespace everstep::checkpoint
