#include "checkpoint/core/parity_groups.h"

#include <algorithm>
#include <compare>
#include <numeric>
#include <utility>

#include "checkpoint/core/layout.h"
#include "checkpoint/core/spread.h"
#include "proto/base/check.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint32_t kMendBudget = 20'000;  // trades looked at, from each start
constexpr std::uint32_t kFewNodes = 64;        // up to here other starts are tried, too
constexpr std::uint32_t kStarts = 24;

// Sizes of the groups, each at least policy.parity + 1.
std::vector<std::uint32_t> Sizes(const Redundancy& policy, std::uint32_t nodes, Strategy strategy) {
  const std::uint32_t width = policy.shards + policy.parity;
  std::uint32_t groups = std::max(1U, nodes / width);
  if (strategy == Strategy::kMaxSurvival) {
    groups = std::min((nodes + width - 1) / width, std::max(1U, nodes / (policy.parity + 1)));
  }
  std::vector<std::uint32_t> sizes(groups, nodes / groups);
  for (std::uint32_t g = 0; g < nodes % groups; ++g) ++sizes[g];
  return sizes;
}

struct Badness {
  std::uint32_t fatal = 0;   // domains that take more of a group than it bears
  std::uint32_t excess = 0;  // nodes beyond, summed over domains and groups
  auto operator<=>(const Badness&) const = default;
};

// Nodes in groups, under change: what domains take of each.
class Grouping {
 public:
  // `domains` must outlive it.
  Grouping(const Domains& domains, std::uint32_t bears, std::vector<std::uint32_t> group_of,
           std::size_t groups)
      : domains_(&domains),
        bears_(bears),
        groups_(groups),
        of_(std::move(group_of)),
        count_(domains.all.size() * groups, 0),
        excess_(domains.all.size(), 0) {
    for (std::uint32_t v = 0; v < of_.size(); ++v) Count(v, true);
  }

  const Badness& badness() const { return badness_; }
  std::uint32_t of(std::uint32_t node) const { return of_[node]; }
  bool Fatal(std::size_t domain) const { return excess_[domain] > 0; }
  // Lies in a group of which one of its domains takes too much.
  bool Bad(std::uint32_t node) const {
    const auto& mine = domains_->of[node];
    return std::any_of(mine.begin(), mine.end(),
                       [&](std::uint32_t d) { return count_[d * groups_ + of_[node]] > bears_; });
  }
  // Nodes that lose state with the domain.
  std::uint32_t Lost(std::size_t domain) const {
    std::uint32_t lost = 0;
    for (std::size_t g = 0; g < groups_; ++g) {
      const std::uint32_t taken = count_[domain * groups_ + g];
      lost += taken > bears_ ? taken : 0;
    }
    return lost;
  }
  void Swap(std::uint32_t a, std::uint32_t b) {
    Count(a, false);
    Count(b, false);
    std::swap(of_[a], of_[b]);
    Count(a, true);
    Count(b, true);
  }

 private:
  void Count(std::uint32_t node, bool add) {
    for (const std::uint32_t d : domains_->of[node]) {
      std::uint32_t& count = count_[d * groups_ + of_[node]];
      const std::uint32_t before = excess_[d];
      if (add) {
        excess_[d] += count++ >= bears_ ? 1 : 0;
      } else {
        excess_[d] -= count-- > bears_ ? 1 : 0;
      }
      badness_.excess += excess_[d] - before;
      badness_.fatal +=
          static_cast<std::uint32_t>(excess_[d] > 0) - static_cast<std::uint32_t>(before > 0);
    }
  }

  const Domains* domains_;
  std::uint32_t bears_;
  std::size_t groups_;
  std::vector<std::uint32_t> of_;
  std::vector<std::uint32_t> count_;   // by domain, then group: its nodes there
  std::vector<std::uint32_t> excess_;  // by domain
  Badness badness_;
};

// Trades nodes between groups as long as less lies badly.
void Mend(Grouping* grouping, std::uint32_t nodes) {
  std::uint32_t budget = kMendBudget;
  const auto improve = [&](std::uint32_t v) {
    const Badness before = grouping->badness();
    for (std::uint32_t y = 0; y < nodes && budget > 0; ++y) {
      if (grouping->of(y) == grouping->of(v)) continue;
      --budget;
      grouping->Swap(v, y);
      if (grouping->badness() < before) return true;
      grouping->Swap(v, y);
    }
    return false;
  };
  for (bool progress = true; progress && budget > 0;) {
    progress = false;
    for (std::uint32_t v = 0; v < nodes; ++v) {
      while (grouping->Bad(v) && improve(v)) progress = true;
    }
  }
}

}  // namespace

std::vector<ParityRow> RowsOf(const std::vector<std::uint32_t>& group, std::uint32_t parity) {
  EVERSTEP_CHECK(parity < group.size());
  const std::size_t n = group.size();
  std::vector<ParityRow> rows(n);
  for (std::size_t s = 0; s < n; ++s) {
    rows[s].holders.reserve(parity);
    rows[s].members.reserve(n - parity);
    for (std::size_t i = 0; i < n; ++i) {
      (i < parity ? rows[s].holders : rows[s].members).push_back(group[(s + i) % n]);
    }
  }
  return rows;
}

std::vector<LossGroup> LossGroupsOf(const ParityPlacement& placement) {
  std::vector<LossGroup> out;
  out.reserve(placement.groups.size());
  for (const auto& group : placement.groups) out.push_back({group, placement.policy.parity});
  return out;
}

ParityPlacement PlaceParity(const ParityInput& input) {
  EVERSTEP_CHECK(input.nodes >= 1);
  EVERSTEP_CHECK(!input.policy.copies());
  for (const auto& level : input.levels) EVERSTEP_CHECK(level.size() == input.nodes);
  ParityPlacement out;
  out.policy = OnNodes(input.policy, input.nodes);
  const std::uint32_t n = input.nodes, bears = out.policy.parity;
  const std::vector<std::uint32_t> sizes = Sizes(out.policy, n, input.strategy);
  const PlacementInput lists{.nodes = n, .levels = input.levels, .together = input.together};
  // Domains of up to `bears` nodes harm no group.
  const Domains domains(lists, bears + 1, 1);
  const auto build = [&](const std::vector<std::uint32_t>& at) {
    std::vector<std::uint32_t> group_of(n, 0);
    std::size_t position = 0;
    for (std::uint32_t g = 0; g < sizes.size(); ++g) {
      for (std::uint32_t i = 0; i < sizes[g]; ++i) group_of[at[position++]] = g;
    }
    Grouping grouping(domains, bears, std::move(group_of), sizes.size());
    if (sizes.size() > 1) Mend(&grouping, n);
    return grouping;
  };
  std::vector<std::uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0U);
  if (!domains.all.empty()) order = Deal(sizes, ByDomain(input.levels, input.together, order));
  Grouping best = build(order);
  // A domain of more nodes than all groups bear is fatal wherever they lie.
  const auto hopeless = static_cast<std::uint32_t>(
      std::count_if(domains.all.begin(), domains.all.end(),
                    [&](const auto& d) { return d.nodes > sizes.size() * bears; }));
  if (sizes.size() > 1 && n <= kFewNodes) {
    for (std::uint32_t start = 0; start < kStarts && best.badness().fatal > hopeless; ++start) {
      Random random(start + 1);
      for (std::size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[random.Below(i)]);
      Grouping other = build(order);
      if (other.badness() < best.badness()) best = std::move(other);
    }
  }
  out.groups.resize(sizes.size());
  for (std::uint32_t v = 0; v < n; ++v) out.groups[best.of(v)].push_back(v);
  std::sort(out.groups.begin(), out.groups.end());
  for (std::size_t d = 0; d < domains.all.size(); ++d) {
    if (!best.Fatal(d)) continue;
    const Domains::Domain& domain = domains.all[d];
    out.fatal.push_back({.level = domain.level,
                         .number = domain.number,
                         .nodes = domain.nodes,
                         .lost = best.Lost(d)});
  }
  const auto [least, largest] = std::minmax_element(sizes.begin(), sizes.end());
  out.price = PriceOf(out.policy, *least, *largest);
  return out;
}

}  // namespace everstep::checkpoint
