// Where copies lie: the shapes, their loads, and that copies stay where they are.
#include "checkpoint/core/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

namespace everstep::checkpoint {
namespace {

using Sets = std::vector<std::vector<std::uint32_t>>;

std::vector<std::uint32_t> Loads(const Placement& p) {
  std::vector<std::uint32_t> held(p.hosts.size(), 0);
  for (const auto& set : p.hosts) {
    for (const std::uint32_t v : set) ++held[v];
  }
  return held;
}

void ExpectSound(const Placement& p, std::uint32_t n, std::uint32_t m, std::uint32_t cap) {
  ASSERT_EQ(p.hosts.size(), n);
  for (std::uint32_t v = 0; v < n; ++v) {
    ASSERT_EQ(p.hosts[v].size(), m);
    ASSERT_EQ(p.hosts[v].front(), v);
    const std::set<std::uint32_t> different(p.hosts[v].begin(), p.hosts[v].end());
    ASSERT_EQ(different.size(), m);
    ASSERT_LT(*different.rbegin(), n);
  }
  const auto held = Loads(p);
  EXPECT_EQ(*std::max_element(held.begin(), held.end()), p.most_held);
  EXPECT_LE(p.most_held, cap);
}

TEST(Placement, MakesClosedGroupsWhereTheyFit) {
  const Placement p = Place({.nodes = 4, .copies = 2});
  EXPECT_EQ(p.hosts, (Sets{{0, 1}, {1, 0}, {2, 3}, {3, 2}}));
  EXPECT_EQ(p.shape, "group");
  EXPECT_EQ(p.host_sets, 2U);
}

TEST(Placement, GeminiPutsLeftOverNodesIntoARing) {
  const Placement p = Place({.nodes = 5, .copies = 2, .strategy = Strategy::kGemini});
  EXPECT_EQ(p.hosts, (Sets{{0, 1}, {1, 0}, {2, 3}, {3, 4}, {4, 2}}));
  EXPECT_EQ(p.shape, "mixed");
  EXPECT_EQ(p.host_sets, 4U);  // (g - 1) + (m + r)
}

TEST(Placement, BalancedHasFewerHostSetsThanARingOfLeftOverNodes) {
  const auto sets = [](std::uint32_t n, std::uint32_t m, Strategy s) {
    return Place({.nodes = n, .copies = m, .strategy = s}).host_sets;
  };
  EXPECT_EQ(sets(5, 3, Strategy::kGemini), 5U);
  EXPECT_EQ(sets(5, 3, Strategy::kBalanced), 4U);
  EXPECT_EQ(sets(6, 4, Strategy::kGemini), 6U);
  EXPECT_EQ(sets(6, 4, Strategy::kBalanced), 3U);
  EXPECT_EQ(sets(9, 4, Strategy::kGemini), 6U);
  EXPECT_EQ(sets(9, 4, Strategy::kBalanced), 5U);
}

TEST(Placement, MaxSurvivalHasTheFewestHostSetsThereCanBe) {
  for (std::uint32_t m = 2; m <= 6; ++m) {
    for (std::uint32_t n = m; n <= 40; ++n) {
      const Placement p = Place({.nodes = n, .copies = m, .strategy = Strategy::kMaxSurvival});
      ExpectSound(p, n, m, 2 * m - 1);
      EXPECT_EQ(p.host_sets, (n + m - 1) / m) << n << " " << m;
    }
  }
}

TEST(Placement, EveryStrategyIsSoundForAnyNumbers) {
  for (const Strategy s :
       {Strategy::kBalanced, Strategy::kMaxSurvival, Strategy::kGemini, Strategy::kRing}) {
    for (std::uint32_t n = 1; n <= 33; ++n) {
      for (std::uint32_t m = 1; m <= 9; ++m) {
        SCOPED_TRACE(testing::Message() << StrategyName(s) << " " << n << " " << m);
        const Placement p = Place({.nodes = n, .copies = m, .strategy = s});
        const std::uint32_t used = std::min(n, m);
        EXPECT_EQ(p.copies, used);
        ExpectSound(p, n, used, s == Strategy::kMaxSurvival ? 2 * used - 1 : used);
      }
    }
  }
}

TEST(Placement, BoundsWhatANodeHolds) {
  for (std::uint32_t cap = 4; cap <= 7; ++cap) {
    const Placement p =
        Place({.nodes = 11, .copies = 4, .strategy = Strategy::kMaxSurvival, .max_held = cap});
    ExpectSound(p, 11, 4, cap);
  }
}

TEST(Placement, SpreadsCopiesOverNestedDomains) {
  // 3 zones of 4 racks of 2 hosts: three copies in three zones.
  PlacementInput in{.nodes = 24, .copies = 3};
  in.levels.resize(3);
  for (std::uint32_t v = 0; v < 24; ++v) {
    in.levels[0].push_back(v / 8);
    in.levels[1].push_back(v / 2);
    in.levels[2].push_back(v);
  }
  const Placement p = Place(in);
  ExpectSound(p, 24, 3, 3);
  EXPECT_EQ(p.host_sets, 8U);
  EXPECT_TRUE(p.fatal.empty());
  for (const auto& set : p.hosts) {
    const std::set<std::uint32_t> zones = {set[0] / 8, set[1] / 8, set[2] / 8};
    EXPECT_EQ(zones.size(), 3U);
  }
}

TEST(Placement, KeepsCopiesOutOfSetsThatAreEvictedTogether) {
  // Consecutive nodes share a rack; i and i + 4 share a spot pool: pairs must cross both.
  PlacementInput in{.nodes = 8, .copies = 2};
  in.levels = {{0, 0, 1, 1, 2, 2, 3, 3}};
  in.together = {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 2, 4, 6}};
  const Placement p = Place(in);
  ExpectSound(p, 8, 2, 2);
  EXPECT_TRUE(p.fatal.empty());
  EXPECT_EQ(p.host_sets, 4U);
}

TEST(Placement, NamesTheDomainThatCannotBeSurvived) {
  PlacementInput in{.nodes = 4, .copies = 2};
  in.levels = {{7, 7, 7, 9}};
  const Placement p = Place(in);
  ASSERT_EQ(p.fatal.size(), 1U);
  EXPECT_EQ(p.fatal[0], (FatalDomain{.level = 0, .number = 7, .nodes = 3, .lost = 2}));
  // Where the one outside may hold more, everyone has a copy there.
  in.strategy = Strategy::kMaxSurvival;
  in.max_held = 4;
  EXPECT_TRUE(Place(in).fatal.empty());
}

TEST(Placement, ANodeWithoutADomainIsInNone) {
  PlacementInput in{.nodes = 4, .copies = 2};
  in.levels = {{1, 1, kNoDomain, kNoDomain}};
  const Placement p = Place(in);
  EXPECT_TRUE(p.fatal.empty());
}

TEST(Placement, StaysAsItIsWhenNothingChanged) {
  PlacementInput in{.nodes = 6, .copies = 2};
  in.previous = {{0, 5}, {1, 4}, {2, 3}, {3, 2}, {4, 1}, {5, 0}};
  const Placement p = Place(in);
  EXPECT_EQ(p.moved, 0U);
  EXPECT_EQ(p.hosts, in.previous);
}

TEST(Placement, ASpareTakesTheLostNodesPlaceAndNobodyElseMoves) {
  PlacementInput in{.nodes = 6, .copies = 2};
  in.previous = {{0, 5}, {1, 4}, {2}, {3}, {4, 1}, {5, 0}};  // 2 is new, 3's peer is gone
  const Placement p = Place(in);
  EXPECT_EQ(p.hosts, (Sets{{0, 5}, {1, 4}, {2, 3}, {3, 2}, {4, 1}, {5, 0}}));
  EXPECT_EQ(p.moved, 2U);
}

TEST(Placement, ShrinkingMovesAsFewCopiesAsCanBe) {
  PlacementInput in{.nodes = 7, .copies = 2};  // eight nodes were pairs; 7's mate is gone
  in.previous = {{0, 1}, {1, 0}, {2, 3}, {3, 2}, {4, 5}, {5, 4}, {6}};
  const Placement p = Place(in);
  EXPECT_EQ(p.host_sets, 5U);  // two pairs and a ring of three
  EXPECT_EQ(p.moved, 2U);      // 6 sends somewhere, and one of a pair sends to 6
}

TEST(Placement, MovesAPairThatCameToShareADomain) {
  PlacementInput in{.nodes = 6, .copies = 2};
  in.previous = {{0, 1}, {1, 0}, {2, 3}, {3, 2}, {4, 5}, {5, 4}};
  in.levels = {{1, 1, 2, 3, 2, 3}};
  const Placement p = Place(in);
  EXPECT_TRUE(p.fatal.empty());
  EXPECT_EQ(p.moved, 4U);  // one more pair had to give way
}

TEST(Placement, IsTheSameEachTime) {
  PlacementInput in{.nodes = 37, .copies = 3};
  in.levels.resize(2);
  for (std::uint32_t v = 0; v < 37; ++v) {
    in.levels[0].push_back(v % 4);
    in.levels[1].push_back(v % 11);
  }
  in.together = {{1, 2, 3, 9, 30}, {5, 6, 7, 8}};
  EXPECT_EQ(Place(in).hosts, Place(in).hosts);
}

TEST(Placement, AThousandNodesOnFourLevels) {
  PlacementInput in{.nodes = 1024, .copies = 3};
  in.levels.resize(4);
  for (std::uint32_t v = 0; v < 1024; ++v) {
    in.levels[0].push_back(v / 256);
    in.levels[1].push_back(v / 64);
    in.levels[2].push_back(v / 16);
    in.levels[3].push_back(v / 4);
  }
  const Placement p = Place(in);
  ExpectSound(p, 1024, 3, 3);
  EXPECT_EQ(p.host_sets, 344U);  // 340 groups and four nodes left over
  EXPECT_TRUE(p.fatal.empty());
}

}  // namespace
}  // namespace everstep::checkpoint
