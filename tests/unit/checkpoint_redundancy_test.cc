// Redundancy as people write it, what becomes of it on few nodes, and what it costs.
#include "checkpoint/core/redundancy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <set>

#include "checkpoint/core/parity_groups.h"
#include "checkpoint/core/parity_ranks.h"
#include "checkpoint/core/policy_prices.h"

namespace everstep::checkpoint {
namespace {

std::string Read(std::string_view text) {
  Redundancy policy;
  const std::string wrong = ParseRedundancy(text, &policy);
  return wrong.empty() ? PrintRedundancy(policy) : wrong;
}

TEST(Redundancy, IsReadAndPrintedInOneWay) {
  EXPECT_EQ(Read("replicate(1)"), "replicate(1)");
  EXPECT_EQ(Read("copies(3)"), "replicate(3)");
  EXPECT_EQ(Read("xor(4+1)"), "xor(4+1)");
  EXPECT_EQ(Read(" rs( 8 + 3 ) "), "rs(8+3)");
  EXPECT_EQ(Read("rs(4+1)"), "xor(4+1)");
  EXPECT_EQ(Read("rs(1+2)"), "replicate(3)");
  for (std::uint32_t k = 1; k <= kMostShards; ++k) {
    for (std::uint32_t r = 1; r <= kMostParity; ++r) {
      Redundancy again;
      ASSERT_EQ(ParseRedundancy(PrintRedundancy({k, r}), &again), "");
      ASSERT_EQ(again, (Redundancy{k, r}));
    }
  }
}

TEST(Redundancy, SaysWhatIsWrongAndWhatWouldBeRight) {
  const std::string forms =
      "it is replicate(m), xor(k+1) or rs(k+r), for example replicate(2), xor(4+1), rs(4+2)";
  for (const char* text : {"", "rs", "rs(4+2", "raid(4+2)", "(4+2)", "rs 4+2", "rs(4+2))x"}) {
    EXPECT_EQ(Read(text), "redundancy '" + std::string(text) + "': " + forms);
  }
  EXPECT_EQ(Read("replicate(0)"),
            "redundancy 'replicate(0)': replicate(m) takes the number of copies, the node's own "
            "among them, 1 to 100");
  EXPECT_EQ(Read("copies(x)"),
            "redundancy 'copies(x)': copies(m) takes the number of copies, the node's own among "
            "them, 1 to 100");
  EXPECT_EQ(Read("xor(4+2)"), "redundancy 'xor(4+2)': xor has one parity; for 2 write rs(4+2)");
  EXPECT_EQ(Read("rs(33+2)"),
            "redundancy 'rs(33+2)': k, the nodes whose states share a parity, is 1 to 32");
  EXPECT_EQ(Read("rs(0+2)"),
            "redundancy 'rs(0+2)': k, the nodes whose states share a parity, is 1 to 32");
  EXPECT_EQ(Read("rs(4+9)"), "redundancy 'rs(4+9)': r, the parities of a group, is 1 to 8");
  EXPECT_EQ(Read("rs(4+0)"), "redundancy 'rs(4+0)': r, the parities of a group, is 1 to 8");
  for (const char* text :
       {"rs(4)", "rs(+2)", "rs(4+)", "rs(-4+2)", "rs(4+2+1)", "rs(4294967297+1)"}) {
    EXPECT_EQ(Read(text),
              "redundancy '" + std::string(text) +
                  "': rs takes the states under a group's parities and those, as rs(4+2)");
  }
  // What is far too long is not repeated whole, and a refusal leaves the policy alone.
  Redundancy policy{4, 2};
  EXPECT_LT(ParseRedundancy(std::string(1'000'000, '('), &policy).size(), 250U);
  EXPECT_EQ(policy, (Redundancy{4, 2}));
}

TEST(Redundancy, OnFewNodesItKeepsWhatItPromisesAsLongAsItCan) {
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 100)), "rs(4+2)");
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 6)), "rs(4+2)");
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 5)), "rs(3+2)");
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 3)), "replicate(3)");
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 2)), "replicate(2)");
  EXPECT_EQ(PrintRedundancy(OnNodes({4, 2}, 1)), "replicate(1)");
  EXPECT_EQ(PrintRedundancy(OnNodes({1, 1}, 8)), "replicate(2)");
  EXPECT_EQ(PrintRedundancy(OnNodes({1, 4}, 2)), "replicate(2)");
}

TEST(Redundancy, AParityTradesMemoryForTheBytesOfARestore) {
  const RedundancyPrice two = PriceOf({1, 1}, 0, 0);
  EXPECT_EQ(two, (RedundancyPrice{1, 1, 0, 1, 0, 1}));
  EXPECT_EQ(PriceOf({1, 0}, 0, 0), RedundancyPrice{});
  EXPECT_EQ(PriceOf({4, 1}, 5, 5), (RedundancyPrice{0.25, 1, 1, 4, 4, 1}));
  EXPECT_EQ(PriceOf({4, 2}, 6, 6), (RedundancyPrice{0.5, 2, 2, 4, 4, 2}));
  EXPECT_EQ(PriceOf({4, 2}, 6, 7), (RedundancyPrice{0.5, 2, 2, 5, 5, 2}));
}

// The price is what RowsOf makes: counted over pieces, not computed from k and r.
TEST(Redundancy, ThePriceIsWhatTheRowsCost) {
  for (const Redundancy policy : {Redundancy{2, 1}, Redundancy{4, 2}, Redundancy{8, 3}}) {
    for (std::uint32_t n = policy.shards + policy.parity; n <= 40; ++n) {
      for (const Strategy strategy : {Strategy::kBalanced, Strategy::kMaxSurvival}) {
        const ParityPlacement p = PlaceParity({.nodes = n, .policy = policy, .strategy = strategy});
        std::vector<double> memory(n, 0), sent(n, 0), received(n, 0), restored(n, 0);
        for (const auto& group : p.groups) {
          const double piece = 1. / static_cast<double>(group.size() - policy.parity);
          for (const ParityRow& row : RowsOf(group, policy.parity)) {
            for (const std::uint32_t h : row.holders) {
              memory[h] += piece;
              received[h] += piece * static_cast<double>(row.members.size());
            }
            for (const std::uint32_t v : row.members) {
              sent[v] += piece * policy.parity;
              // The others' pieces and one parity.
              restored[v] += piece * static_cast<double>(row.members.size());
            }
          }
        }
        const auto most = [](const std::vector<double>& v) {
          return *std::max_element(v.begin(), v.end());
        };
        ASSERT_NEAR(p.price.memory, most(memory), 1e-12) << n;
        ASSERT_NEAR(p.price.restored, most(restored), 1e-12);
        for (std::uint32_t v = 0; v < n; ++v) {
          ASSERT_NEAR(p.price.sent, sent[v], 1e-12);
          ASSERT_NEAR(p.price.encoded, received[v], 1e-12);
        }
        const double bound = static_cast<double>(policy.parity) / policy.shards;
        if (strategy == Strategy::kBalanced) {
          ASSERT_LE(p.price.memory, bound + 1e-12);
        }
      }
    }
  }
}

// Ranks 1, 4, 7, 9, 2 of a world of 10 in one group.
TEST(ParityRanks, EveryRankHoldsOneOfEachNumberAndCoversNothingOfItsOwn) {
  const std::vector<Rank> group = {1, 4, 7, 9, 2};
  const std::int32_t world = 10;
  const std::vector<Codeword> words = CodewordsOf(group, 2, world);
  ASSERT_EQ(words.size(), group.size());
  std::set<Rank> parities;
  std::vector<int> pieces(10, 0);
  for (const Codeword& word : words) {
    ASSERT_EQ(word.members.size(), 3U);
    ASSERT_EQ(word.parities.size(), 2U);
    for (std::uint32_t p = 0; p < 2; ++p) {
      const Rank parity = word.parities[p];
      EXPECT_TRUE(IsParity(parity, world));
      EXPECT_EQ(parity, ParityRank(HolderOf(parity, world), p, world));
      EXPECT_EQ(std::count(word.members.begin(), word.members.end(), HolderOf(parity, world)), 0);
      EXPECT_TRUE(parities.insert(parity).second) << parity << " is of two rows";
    }
    for (const Rank rank : word.members) ++pieces[static_cast<std::size_t>(rank)];
  }
  EXPECT_EQ(parities.size(), 10U);
  for (const Rank rank : group) EXPECT_EQ(pieces[static_cast<std::size_t>(rank)], 3);
  EXPECT_FALSE(IsParity(9, world));
}

// Ranks go with what they hold: any r of them come back, r + 1 do not.
TEST(ParityRanks, AGroupBearsTheLossOfAsManyRanksAsItHasParities) {
  for (std::uint32_t n = 2; n <= 8; ++n) {
    for (std::uint32_t r = 1; r < n; ++r) {
      std::vector<Rank> group;
      for (std::uint32_t i = 0; i < n; ++i) group.push_back(static_cast<Rank>(i));
      const auto world = static_cast<std::int32_t>(n);
      const std::vector<Codeword> words = CodewordsOf(group, r, world);
      for (std::uint32_t lost = 0; lost < 1U << n; ++lost) {
        std::set<Rank> have;
        for (std::uint32_t i = 0; i < n; ++i) {
          if ((lost >> i & 1) != 0) continue;
          have.insert(static_cast<Rank>(i));
          for (std::uint32_t p = 0; p < r; ++p) {
            have.insert(ParityRank(static_cast<Rank>(i), p, world));
          }
        }
        ASSERT_EQ(Recoverable(words, have), std::popcount(lost) <= static_cast<int>(r))
            << n << " ranks, " << r << " parities, lost " << lost;
      }
    }
  }
}

TEST(Redundancy, OnlyWhatCanBeToldApartIsCompared) {
  for (std::uint32_t n = 1; n <= 64; ++n) {
    for (const Redundancy in_force : {Redundancy{1, 1}, Redundancy{8, 3}, Redundancy{5, 4}}) {
      const std::vector<Redundancy> all = PoliciesToCompare(in_force, n);
      ASSERT_LE(all.size(), 12U);
      ASSERT_EQ(all.front(), OnNodes(in_force, n));
      for (std::size_t i = 0; i < all.size(); ++i) {
        ASSERT_EQ(OnNodes(all[i], n), all[i]);
        ASSERT_EQ(std::count(all.begin(), all.end(), all[i]), 1) << PrintRedundancy(all[i]);
      }
    }
  }
}

TEST(Redundancy, OfPoliciesThatMakeTheSameGroupsTheWidestIsShown) {
  const auto names = [](std::uint32_t n) {
    std::vector<std::string> out;
    for (const Redundancy& p : PoliciesToCompare({1, 1}, n)) out.push_back(PrintRedundancy(p));
    return out;
  };
  EXPECT_EQ(names(2), (std::vector<std::string>{"replicate(2)", "replicate(1)"}));
  EXPECT_EQ(names(4), (std::vector<std::string>{"replicate(2)", "replicate(1)", "xor(3+1)",
                                                "replicate(3)", "rs(2+2)"}));
  EXPECT_EQ(names(6), (std::vector<std::string>{"replicate(2)", "replicate(1)", "xor(2+1)",
                                                "xor(4+1)", "replicate(3)", "rs(4+2)"}));
  EXPECT_EQ(names(1000),
            (std::vector<std::string>{"replicate(2)", "replicate(1)", "xor(2+1)", "xor(3+1)",
                                      "xor(4+1)", "xor(8+1)", "replicate(3)", "rs(2+2)", "rs(4+2)",
                                      "rs(8+2)", "rs(8+3)"}));
}

// Three zones of two: pairs cross them, a group of six has two nodes in each.
TEST(Redundancy, APriceSaysWhichDomainsAreFatal) {
  PlacementInput where{.nodes = 6, .levels = {{0, 0, 1, 1, 2, 2}}};
  const PolicyPrice pairs = PricePolicy(where, {1, 1}, false, 2);
  EXPECT_EQ(pairs.fatal, 0U);
  EXPECT_NEAR(pairs.survival[1].probability, 12. / 15, 1e-12);
  EXPECT_EQ(PricePolicy(where, {4, 1}, false, 2).fatal, 3U);
  EXPECT_EQ(PricePolicy(where, {4, 2}, false, 2).fatal, 0U);
  EXPECT_EQ(PricePolicy(where, {2, 1}, false, 2).fatal, 0U);  // two groups, a node of each zone
  EXPECT_EQ(PricePolicy(where, {4, 1}, true, 2).fatal, 0U);
  where.together = {{0, 1, 2, 3, 4, 5}};
  EXPECT_EQ(PricePolicy(where, {4, 1}, true, 2).fatal, 1U);
}

}  // namespace
}  // namespace everstep::checkpoint
