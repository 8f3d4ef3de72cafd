// Parity groups against brute force: what survives is what the rows say, piece by piece; no other
// grouping has fewer fatal domains.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "checkpoint/core/parity_groups.h"
#include "proto/base/random.h"
#include "tests/property/drawn_domains.h"

namespace everstep::checkpoint {
namespace {

using Mask = std::uint32_t;

Mask MaskOf(const std::vector<std::uint32_t>& nodes) {
  Mask mask = 0;
  for (const std::uint32_t v : nodes) mask |= Mask{1} << v;
  return mask;
}

// From first principles: in a row whose lost members are more than the parities left, they are
// gone.
Mask GoneBy(const ParityPlacement& p, Mask lost) {
  Mask gone = 0;
  for (const auto& group : p.groups) {
    for (const ParityRow& row : RowsOf(group, p.policy.parity)) {
      const Mask members = MaskOf(row.members) & lost;
      const int parities = std::popcount(MaskOf(row.holders) & ~lost);
      if (std::popcount(members) > parities) gone |= members;
    }
  }
  return gone;
}

std::vector<Redundancy> Policies() {
  std::vector<Redundancy> out;
  for (std::uint32_t k = 2; k <= 5; ++k) {
    for (std::uint32_t r = 1; r <= 3; ++r) out.push_back({k, r});
  }
  return out;
}

TEST(ParityProperty, NoHolderIsAMemberAndAllCarryTheSame) {
  for (const Redundancy& policy : Policies()) {
    for (std::uint32_t n = 1; n <= 40; ++n) {
      for (const Strategy strategy : {Strategy::kBalanced, Strategy::kMaxSurvival}) {
        const ParityPlacement p = PlaceParity({.nodes = n, .policy = policy, .strategy = strategy});
        std::set<std::uint32_t> seen;
        for (const auto& group : p.groups) {
          ASSERT_GT(group.size(), p.policy.parity);
          seen.insert(group.begin(), group.end());
          const std::size_t size = group.size();
          std::map<std::uint32_t, std::uint32_t> pieces, parities;
          for (const ParityRow& row : RowsOf(group, p.policy.parity)) {
            std::set<std::uint32_t> all(row.members.begin(), row.members.end());
            all.insert(row.holders.begin(), row.holders.end());
            ASSERT_EQ(all.size(), size);  // disjoint, and every node of the group
            ASSERT_EQ(row.holders.size(), p.policy.parity);
            for (const std::uint32_t v : row.members) ++pieces[v];
            for (const std::uint32_t v : row.holders) ++parities[v];
          }
          for (const std::uint32_t v : group) {
            ASSERT_EQ(pieces[v], size - p.policy.parity);
            ASSERT_EQ(parities[v], p.policy.parity);
          }
        }
        ASSERT_EQ(seen.size(), n);
        const std::size_t members =
            std::accumulate(p.groups.begin(), p.groups.end(), std::size_t{0},
                            [](std::size_t sum, const auto& group) { return sum + group.size(); });
        ASSERT_EQ(members, n);
        const auto [least, largest] =
            std::minmax_element(p.groups.begin(), p.groups.end(),
                                [](const auto& a, const auto& b) { return a.size() < b.size(); });
        ASSERT_LE(largest->size() - least->size(), 1U);
        const std::size_t width = p.policy.shards + p.policy.parity;
        if (strategy == Strategy::kBalanced) {
          ASSERT_GE(least->size(), std::min<std::size_t>(n, width));
        } else if (n >= width * (p.policy.parity + 1)) {
          ASSERT_LE(largest->size(), width);
        }
      }
    }
  }
}

TEST(ParityProperty, SurvivalIsWhatEveryLossOfEveryNodesSays) {
  for (const Redundancy& policy : Policies()) {
    for (std::uint32_t n = 1; n <= 12; ++n) {
      for (const Strategy strategy : {Strategy::kBalanced, Strategy::kMaxSurvival}) {
        const ParityPlacement p = PlaceParity({.nodes = n, .policy = policy, .strategy = strategy});
        const std::vector<LossGroup> groups = LossGroupsOf(p);
        std::vector<double> safe(n + 1, 0), all(n + 1, 0);
        for (Mask lost = 0; lost < Mask{1} << n; ++lost) {
          const Mask gone = GoneBy(p, lost);
          NodeSet failed;
          for (std::uint32_t v = 0; v < n; ++v) {
            if ((lost >> v & 1) != 0) failed.push_back(v);
          }
          ASSERT_EQ(MaskOf(LostWith(groups, failed)), gone)
              << PrintRedundancy(policy) << " on " << n << " nodes, lost " << lost;
          ++all[failed.size()];
          safe[failed.size()] += gone == 0;
        }
        const std::vector<double> by_losses = SurvivalByLosses(n, groups, n);
        ASSERT_EQ(by_losses.size(), n + 1);
        for (std::uint32_t k = 0; k <= n; ++k) {
          ASSERT_NEAR(by_losses[k], safe[k] / all[k], 1e-12);
          if (k <= p.price.survives) {
            ASSERT_DOUBLE_EQ(by_losses[k], 1);
          }
        }
        if (p.price.survives < n) {
          ASSERT_LT(by_losses[p.price.survives + 1], 1);
        }
      }
    }
  }
}

// A closed group of m copies is one that tolerates m - 1: both ways of counting agree.
TEST(ParityProperty, CopiesInClosedGroupsAreTheSameSum) {
  for (const std::uint32_t m : {2U, 3U, 4U}) {
    const std::uint32_t n = 4 * m;
    const Placement p = Place({.nodes = n, .copies = m});
    std::set<NodeSet> sets;
    for (NodeSet set : p.hosts) {
      std::sort(set.begin(), set.end());
      sets.insert(std::move(set));
    }
    std::vector<LossGroup> groups;
    groups.reserve(sets.size());
    for (const NodeSet& set : sets) groups.push_back({set, m - 1});
    const auto copies = SurvivalByLosses(n, p.hosts, n);
    const std::vector<double> grouped = SurvivalByLosses(n, groups, n);
    ASSERT_TRUE(copies.has_value());
    for (std::uint32_t k = 0; k <= n; ++k) ASSERT_NEAR(grouped[k], (*copies)[k], 1e-12);
  }
}

ParityInput DrawWorld(Random* random, std::uint32_t n, const Redundancy& policy) {
  ParityInput in{.nodes = n, .policy = policy};
  if (random->Chance(500)) in.strategy = Strategy::kMaxSurvival;
  DrawDomains(random, n, &in);
  return in;
}

std::vector<NodeSet> DomainsOf(const ParityInput& in) {
  std::vector<NodeSet> out;
  for (const auto& level : in.levels) {
    std::map<std::uint32_t, NodeSet> members;
    for (std::uint32_t v = 0; v < in.nodes; ++v) members[level[v]].push_back(v);
    for (auto& [number, nodes] : members) out.push_back(std::move(nodes));
  }
  for (const auto& set : in.together) out.push_back(set);
  return out;
}

// The fewest fatal domains over every way to cut the nodes into groups of these sizes.
std::size_t FewestFatal(const std::vector<std::uint32_t>& sizes, std::uint32_t n, std::uint32_t r,
                        const std::vector<Mask>& domains) {
  std::vector<Mask> groups(sizes.size(), 0);
  std::size_t best = domains.size() + 1;
  const auto fatal = [&] {
    return static_cast<std::size_t>(std::count_if(domains.begin(), domains.end(), [&](Mask d) {
      return std::any_of(groups.begin(), groups.end(),
                         [&](Mask g) { return std::popcount(g & d) > static_cast<int>(r); });
    }));
  };
  const std::function<void(std::uint32_t)> assign = [&](std::uint32_t v) {
    if (best == 0 || fatal() >= best) return;  // more nodes take nothing away
    if (v == n) {
      best = fatal();
      return;
    }
    for (std::size_t g = 0; g < sizes.size(); ++g) {
      if (std::popcount(groups[g]) == static_cast<int>(sizes[g])) continue;
      groups[g] |= Mask{1} << v;
      assign(v + 1);
      groups[g] &= ~(Mask{1} << v);
      if (groups[g] == 0 && g + 1 < sizes.size() && sizes[g + 1] == sizes[g]) break;  // alike
    }
  };
  assign(0);
  return best;
}

TEST(ParityProperty, NoGroupingHasFewerFatalDomains) {
  Random random(7);
  int with_fatal = 0, without = 0, several = 0;
  for (int round = 0; round < 1200; ++round) {
    const Redundancy policy{static_cast<std::uint32_t>(2 + random.Below(3)),
                            static_cast<std::uint32_t>(1 + random.Below(2))};
    const auto n = static_cast<std::uint32_t>(4 + random.Below(8));
    const ParityInput in = DrawWorld(&random, n, policy);
    const ParityPlacement p = PlaceParity(in);
    std::vector<Mask> domains;
    std::size_t fatal = 0;
    for (const NodeSet& d : DomainsOf(in)) {
      domains.push_back(MaskOf(d));
      fatal += !LostWith(LossGroupsOf(p), d).empty();
    }
    for (const FatalDomain& f : p.fatal) {
      NodeSet nodes;
      for (std::uint32_t v = 0; v < n; ++v) {
        const bool in_it = f.level < in.levels.size()
                               ? in.levels[f.level][v] == f.number
                               : (MaskOf(in.together[f.number]) >> v & 1) != 0;
        if (in_it) nodes.push_back(v);
      }
      ASSERT_EQ(f.nodes, nodes.size());
      ASSERT_EQ(f.lost, LostWith(LossGroupsOf(p), nodes).size());
      ASSERT_GT(f.lost, 0U);
    }
    ASSERT_EQ(p.fatal.size(), fatal);
    std::vector<std::uint32_t> sizes;
    for (const auto& group : p.groups) sizes.push_back(static_cast<std::uint32_t>(group.size()));
    std::sort(sizes.begin(), sizes.end(), std::greater<>());
    ASSERT_EQ(fatal, FewestFatal(sizes, n, p.policy.parity, domains))
        << "round " << round << ": " << PrintRedundancy(policy) << " on " << n << " nodes";
    ++(fatal > 0 ? with_fatal : without);
    several += sizes.size() > 1;
  }
  EXPECT_GT(with_fatal, 100);
  EXPECT_GT(without, 100);
  EXPECT_GT(several, 400);
}

TEST(ParityProperty, LossesByDomainAreWhatEveryChoiceSays) {
  Random random(11);
  for (int round = 0; round < 300; ++round) {
    const auto n = static_cast<std::uint32_t>(4 + random.Below(9));
    const ParityInput in = DrawWorld(&random, n, {3, 1});
    const ParityPlacement p = PlaceParity(in);
    const std::vector<NodeSet> domains = DomainsOf(in);  // overlapping ones among them
    const auto d = static_cast<std::uint32_t>(domains.size());
    const auto k = static_cast<std::uint32_t>(1 + random.Below(3));
    double safe = 0, all = 0;
    for (Mask choice = 0; choice < Mask{1} << d; ++choice) {
      if (std::popcount(choice) != static_cast<int>(std::min(k, d))) continue;
      Mask lost = 0;
      for (std::uint32_t i = 0; i < d; ++i) {
        if ((choice >> i & 1) != 0) lost |= MaskOf(domains[i]);
      }
      ++all;
      safe += GoneBy(p, lost) == 0;
    }
    const Estimate e = SurvivalByDomain(LossGroupsOf(p), domains, k);
    ASSERT_TRUE(e.exact);
    ASSERT_NEAR(e.probability, safe / all, 1e-12);
    // And where there are too many to look at each, the range holds the truth.
    const Estimate drawn =
        SurvivalByDomain(LossGroupsOf(p), domains, k, {.enumerate = 0, .samples = 4000});
    ASSERT_FALSE(drawn.exact);
    ASSERT_NEAR(drawn.probability, e.probability, 0.04);
  }
}

}  // namespace
}  // namespace everstep::checkpoint
