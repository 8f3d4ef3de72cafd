// The probabilities of checkpoint survival: published figures, brute force and simulation agree.
#include "checkpoint/core/survival.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <set>

#include "checkpoint/core/placement.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

std::vector<NodeSet> Hosts(std::uint32_t n, std::uint32_t m, Strategy strategy) {
  return Place({.nodes = n, .copies = m, .strategy = strategy}).hosts;
}

double Exact(std::uint32_t n, std::uint32_t m, std::uint32_t k, Strategy strategy) {
  const auto p = SurvivalByLosses(n, Hosts(n, m, strategy), k);
  EXPECT_TRUE(p.has_value());
  return p ? p->back() : -1;
}

std::vector<NodeSet> RandomSets(std::uint32_t n, Random* random) {
  std::vector<NodeSet> sets(1 + random->Below(n));
  for (NodeSet& set : sets) {
    std::set<std::uint32_t> members;
    const std::uint64_t size = 1 + random->Below(4);
    while (members.size() < std::min<std::uint64_t>(size, n)) {
      members.insert(static_cast<std::uint32_t>(random->Below(n)));
    }
    set.assign(members.begin(), members.end());
  }
  return sets;
}

TEST(Survival, HasThePublishedFigures) {
  struct Row {
    std::uint32_t n, m, k;
    double best, ring, corollary;  // < 0: not given
  };
  // GEMINI's group and mixed strategies, a ring, and the paper's bound.
  for (const Row& r : std::vector<Row>{{16, 2, 2, .9333, .8667, .9333},
                                       {16, 2, 3, .8000, .6286, .8000},
                                       {16, 2, 4, .6154, .3626, .6000},
                                       {16, 2, 5, .4103, .1538, .3333},
                                       {16, 2, 6, .2238, -1, 0},
                                       {16, 3, 3, .9857, .9714, -1},
                                       {17, 2, 2, .9265, .875, -1},
                                       {17, 3, 3, .9868, .975, -1},
                                       {17, 3, 4, .9492, .9071, -1},
                                       {16, 4, 4, .9978, .9912, -1}}) {
    SCOPED_TRACE(testing::Message() << r.n << " nodes, " << r.m << " copies, " << r.k << " lost");
    EXPECT_NEAR(Exact(r.n, r.m, r.k, Strategy::kGemini), r.best, 5.1e-5);
    if (r.ring >= 0) {
      EXPECT_NEAR(Exact(r.n, r.m, r.k, Strategy::kRing), r.ring, 5.1e-5);
    }
    if (r.corollary >= 0) {
      EXPECT_NEAR(CorollaryBound(r.n, r.m, r.k), r.corollary, 5.1e-5);
    }
  }
  const std::vector<std::tuple<std::uint32_t, std::uint32_t, double>> large = {
      {128, 2, .99213}, {128, 3, .97638}, {128, 4, .95294}, {128, 8, .79254},
      {1000, 2, .999},  {1000, 3, .997},  {1000, 4, .994},  {1000, 8, .97218}};
  for (const auto& [n, k, expected] : large) {
    EXPECT_NEAR(Exact(n, 2, k, Strategy::kGemini), expected, n == 1000 && k < 8 ? 5.1e-4 : 5.1e-6)
        << n << " " << k;
  }
}

TEST(Survival, IsInclusionAndExclusionOverClosedGroups) {
  // 1 - sum over j of (-1)^(j+1) C(g,j) C(N-jm,k-jm) / C(N,k).
  const auto choose = [](int n, int k) {
    double value = k < 0 || k > n ? 0 : 1;
    for (int i = 1; i <= k && value > 0; ++i) value = value * (n - k + i) / i;
    return value;
  };
  for (const auto& [n, m] : std::vector<std::pair<int, int>>{{12, 2}, {24, 3}, {32, 4}, {40, 2}}) {
    for (int k = 0; k <= n; ++k) {
      double p = 1;
      for (int j = 1; j <= n / m && j * m <= k; ++j) {
        p += (j % 2 == 0 ? 1 : -1) * choose(n / m, j) * choose(n - j * m, k - j * m) / choose(n, k);
      }
      EXPECT_NEAR(Exact(static_cast<std::uint32_t>(n), static_cast<std::uint32_t>(m),
                        static_cast<std::uint32_t>(k), Strategy::kBalanced),
                  p, 1e-7)
          << n << " " << m << " " << k;
    }
  }
}

TEST(Survival, CountsAnyHostSetsAsBruteForceDoes) {
  Random random(11);
  for (int round = 0; round < 200; ++round) {
    const auto n = static_cast<std::uint32_t>(2 + random.Below(11));
    const std::vector<NodeSet> sets = RandomSets(n, &random);
    std::vector<double> safe(n + 1, 0), all(n + 1, 0);
    for (std::uint32_t lost = 0; lost < 1U << n; ++lost) {
      const auto k = static_cast<std::size_t>(std::popcount(lost));
      bool survives = true;
      for (const NodeSet& set : sets) {
        bool whole = true;
        for (const std::uint32_t v : set) whole = whole && (lost >> v & 1U) != 0;
        survives = survives && !whole;
      }
      all[k] += 1;
      safe[k] += survives ? 1 : 0;
    }
    const auto p = SurvivalByLosses(n, sets, n);
    ASSERT_TRUE(p.has_value());
    for (std::uint32_t k = 0; k <= n; ++k) EXPECT_NEAR((*p)[k], safe[k] / all[k], 1e-12) << k;
  }
}

TEST(Survival, AgreesWithSimulation) {
  Random random(5);
  for (const auto& [n, m, k] : std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>{
           {17, 3, 5}, {100, 2, 9}, {23, 4, 9}, {64, 3, 12}}) {
    const std::vector<NodeSet> hosts = Hosts(n, m, Strategy::kBalanced);
    const double exact = SurvivalByLosses(n, hosts, k)->back();
    constexpr int kRounds = 20'000;
    int safe = 0;
    for (int i = 0; i < kRounds; ++i) {
      std::set<std::uint32_t> lost;
      while (lost.size() < k) lost.insert(static_cast<std::uint32_t>(random.Below(n)));
      safe += LostWith(hosts, NodeSet(lost.begin(), lost.end())).empty();
    }
    const double sigma = std::sqrt(exact * (1 - exact) / kRounds);
    EXPECT_NEAR(static_cast<double>(safe) / kRounds, exact, 4.5 * sigma + 1e-9) << n << " " << m;
  }
}

TEST(Survival, IsStableForAThousandNodes) {
  for (const Strategy strategy : {Strategy::kBalanced, Strategy::kRing}) {
    const auto p = SurvivalByLosses(1024, Hosts(1024, 3, strategy), 1024);
    ASSERT_TRUE(p.has_value());
    EXPECT_DOUBLE_EQ((*p)[0], 1);
    EXPECT_DOUBLE_EQ((*p)[2], 1);
    for (std::size_t k = 1; k < p->size(); ++k) {
      ASSERT_LE((*p)[k], (*p)[k - 1] * (1 + 1e-12)) << k;  // more losses are never better
      ASSERT_GE((*p)[k], 0) << k;
    }
    EXPECT_EQ(p->back(), 0);
  }
  // Group of three at k=3: 341 groups and a ring of four at the end are 340 + 4 host sets.
  EXPECT_NEAR(Exact(1024, 3, 3, Strategy::kBalanced), 1 - 344 / (1024. * 1023 * 1022 / 6), 1e-15);
}

TEST(Survival, WhatNobodyHoldsIsLostAlready) {
  const std::vector<NodeSet> hosts = {{0, 1}, {}};
  EXPECT_EQ(*SurvivalByLosses(4, hosts, 2), (std::vector<double>{0, 0, 0}));
  EXPECT_EQ(SurvivalByDomain(hosts, {{0}, {1}}, 1).probability, 0);
  EXPECT_EQ(LostWith(hosts, {}), NodeSet{1});
}

TEST(Survival, SaysWhoseStateIsGone) {
  const std::vector<NodeSet> hosts = {{0, 1}, {1, 0}, {2, 3}, {3, 2}};
  EXPECT_EQ(LostWith(hosts, {2, 0}), NodeSet{});
  EXPECT_EQ(LostWith(hosts, {3, 0, 2}), (NodeSet{2, 3}));
}

TEST(Survival, CountsDomainsExactlyWhenTheyAreFew) {
  // Four nodes in two zones of two racks; copies across zones.
  const std::vector<NodeSet> hosts = {{0, 2}, {1, 3}, {2, 0}, {3, 1}};
  const Estimate zone = SurvivalByDomain(hosts, {{0, 1}, {2, 3}}, 1);
  EXPECT_TRUE(zone.exact);
  EXPECT_EQ(zone.probability, 1);
  EXPECT_EQ(zone.scenarios, 2U);
  const Estimate racks = SurvivalByDomain(hosts, {{0}, {1}, {2}, {3}}, 2);
  EXPECT_EQ(racks.scenarios, 6U);
  EXPECT_NEAR(racks.probability, 4. / 6, 1e-12);
  // Domains that overlap, and one that takes both copies.
  EXPECT_NEAR(SurvivalByDomain(hosts, {{0, 1}, {0, 2}, {1, 2}}, 1).probability, 2. / 3, 1e-12);
  EXPECT_EQ(SurvivalByDomain(hosts, {{0, 1}, {2, 3}}, 7).probability, 0);  // all of them
}

TEST(Survival, SamplesManyDomainsAndItsIntervalHoldsTheTruth) {
  constexpr std::uint32_t kNodes = 60;
  const std::vector<NodeSet> hosts = Hosts(kNodes, 2, Strategy::kBalanced);
  std::vector<NodeSet> each;
  for (std::uint32_t v = 0; v < kNodes; ++v) each.push_back({v});
  const double truth = SurvivalByLosses(kNodes, hosts, 8)->back();
  int held = 0;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    const Estimate e = SurvivalByDomain(hosts, each, 8, {.samples = 2'000, .seed = seed});
    EXPECT_FALSE(e.exact);
    EXPECT_EQ(e.scenarios, 2'000U);
    EXPECT_LT(e.high - e.low, 0.05);
    held += e.low <= truth && truth <= e.high;
  }
  EXPECT_GE(held, 34);  // of 40 intervals at 95 %
  const Estimate once = SurvivalByDomain(hosts, each, 8, {.seed = 3});
  EXPECT_EQ(once.probability, SurvivalByDomain(hosts, each, 8, {.seed = 3}).probability);
}

TEST(Survival, FallsBackToSamplesWhereSetsOverlapTooMuch) {
  Random random(9);
  std::vector<NodeSet> sets;
  for (int i = 0; i < 400; ++i) {
    std::set<std::uint32_t> s;
    while (s.size() < 4) s.insert(static_cast<std::uint32_t>(random.Below(80)));
    sets.emplace_back(s.begin(), s.end());
  }
  EXPECT_FALSE(SurvivalByLosses(80, sets, 10).has_value());
  const Estimate e = Survival(80, sets, 10);
  EXPECT_FALSE(e.exact);
  EXPECT_LE(e.low, e.probability);
  EXPECT_GE(e.high, e.probability);
}

}  // namespace
}  // namespace everstep::checkpoint
