#include "checkpoint/core/swarm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kHolder = SwarmSource::kHolder;

std::vector<SwarmSource> Plan(std::size_t takers, std::uint64_t chunks, std::size_t holders = 1) {
  std::vector<std::uint64_t> sent(holders);
  return PlanSwarm(takers, chunks * kPassedOnBytes, &sent);
}

// Chunk times over one link until the last taker has all, when every link carries one chunk each
// way at a time and a source serves its takers in turns.
std::uint64_t Rounds(const std::vector<SwarmSource>& plan, std::uint64_t chunks,
                     std::size_t holders) {
  std::vector<std::vector<std::size_t>> of_holder(holders), of_taker(plan.size());
  for (std::size_t i = 0; i < plan.size(); ++i) {
    (plan[i].taker == kHolder ? of_holder[plan[i].holder] : of_taker[plan[i].taker]).push_back(i);
  }
  std::vector<std::uint64_t> have(plan.size());
  std::vector<std::size_t> holder_turn(holders), taker_turn(plan.size());
  for (std::uint64_t round = 1;; ++round) {
    const std::vector<std::uint64_t> before = have;
    const auto send = [&](const std::vector<std::size_t>& to, std::size_t* turn,
                          std::uint64_t has) {
      for (std::size_t n = 0; n < to.size(); ++n) {
        const std::size_t next = to[(*turn + n) % to.size()];
        if (before[next] >= has) continue;
        ++have[next];
        *turn = (*turn + n + 1) % to.size();
        return;
      }
    };
    for (std::size_t h = 0; h < holders; ++h) send(of_holder[h], &holder_turn[h], chunks);
    for (std::size_t t = 0; t < plan.size(); ++t) send(of_taker[t], &taker_turn[t], before[t]);
    if (std::all_of(have.begin(), have.end(), [&](auto n) { return n == chunks; })) return round;
    if (round > 100 * (chunks + plan.size())) return round;
  }
}

TEST(Swarm, OneTakerTakesFromTheHolder) {
  EXPECT_EQ(Plan(1, 64), (std::vector<SwarmSource>{{0, kHolder, 0}}));
  EXPECT_TRUE(Plan(0, 64).empty());
}

TEST(Swarm, ALineSoThatNoLinkCarriesAChunkTwice) {
  EXPECT_EQ(Plan(4, 64),
            (std::vector<SwarmSource>{{0, kHolder, 0}, {0, 0, 1}, {0, 1, 2}, {0, 2, 3}}));
  EXPECT_EQ(Rounds(Plan(8, 16), 16, 1), 16u + 7);
}

TEST(Swarm, ATreeForManyTakersOfFewChunks) {
  const auto plan = Plan(7, 1);
  EXPECT_EQ(
      plan,
      (std::vector<SwarmSource>{
          {0, kHolder, 0}, {0, 0, 1}, {0, 0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 2, 2}, {0, 2, 2}}));
}

TEST(Swarm, EachHolderBeginsALineOfItsOwn) {
  EXPECT_EQ(Plan(5, 64, 2),
            (std::vector<SwarmSource>{
                {0, kHolder, 0}, {1, kHolder, 0}, {0, 0, 1}, {1, 1, 1}, {0, 2, 2}}));
  EXPECT_EQ(Plan(2, 64, 3), (std::vector<SwarmSource>{{0, kHolder, 0}, {1, kHolder, 0}}));
}

TEST(Swarm, WhoSendsLeastIsTaken) {
  constexpr std::uint64_t kShard = 64 * kPassedOnBytes;
  std::vector<std::uint64_t> sent{2 * kShard, kShard, kShard / 2};
  const auto plan = PlanSwarm(3, kShard, &sent);
  // The first one sends a whole shard more than the last: it begins no line.
  EXPECT_EQ(plan, (std::vector<SwarmSource>{{2, kHolder, 0}, {1, kHolder, 0}, {2, 0, 1}}));
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{2 * kShard, 2 * kShard, kShard / 2 + kShard}));
}

// At most twice as many times one shard as doublings of its sources are needed. And nobody waits
// for somebody later.
TEST(Swarm, TimeGrowsNoFasterThanTheLogarithm) {
  for (const std::uint64_t chunks : {1, 2, 5, 16, 64, 300}) {
    for (std::size_t takers = 1; takers <= 300; takers += takers < 20 ? 1 : 37) {
      for (const std::size_t holders : {1, 3}) {
        const auto plan = Plan(takers, chunks, holders);
        for (std::size_t i = 0; i < takers; ++i) {
          if (plan[i].taker == kHolder) {
            EXPECT_EQ(plan[i].depth, 0u);
            continue;
          }
          ASSERT_LT(plan[i].taker, i);
          EXPECT_EQ(plan[i].holder, plan[plan[i].taker].holder);
          EXPECT_EQ(plan[i].depth, plan[plan[i].taker].depth + 1);
        }
        const double doublings = std::ceil(std::log2(static_cast<double>(takers) + 1));
        EXPECT_LE(Rounds(plan, chunks, holders), static_cast<double>(chunks) * 2 * doublings)
            << takers << " takers of " << chunks << " chunks, " << holders << " holders";
      }
    }
  }
}

}  // namespace
}  // namespace everstep::checkpoint
