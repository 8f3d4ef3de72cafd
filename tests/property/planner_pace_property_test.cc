// Nodes of different speed against brute force: every division of the layers, every way to share
// out microbatches, every set of nodes to leave.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include <fmt/format.h>

#include "controller/planner/pace.h"
#include "proto/base/random.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

using models::Draw;

std::vector<std::uint32_t> DrawPaces(Random* random, std::uint32_t stages) {
  std::vector<std::uint32_t> paces(stages, kUsualPace);
  for (std::uint32_t& pace : paces) {
    if (random->Chance(500)) pace = static_cast<std::uint32_t>(random->Between(200, 2000));
  }
  return paces;
}

TEST(PaceProperty, NoDivisionIsFasterForThePacesOfItsStages) {
  Random random(41);
  int compared = 0, fewer_layers = 0;
  for (int round = 0; round < 700; ++round) {
    const auto layers = static_cast<std::uint32_t>(random.Between(1, 9));
    const auto stages = static_cast<std::uint32_t>(random.Between(1, std::min(layers + 1, 5U)));
    const Profile p = Draw(&random, {.layers = layers,
                                     .equal = random.Chance(300),
                                     .uneven_links = random.Chance(400),
                                     .tight_memory = random.Chance(400)});
    const ShapeCosts costs = CostsOf(p, {}).value();
    const PartitionInput input{.stages = stages, .most_microbatches = random.Chance(300) ? 2U : 0U};
    const std::vector<std::uint32_t> paces = DrawPaces(&random, stages);
    std::int64_t best = -1;
    if (stages <= layers) {
      models::EveryDivision(layers, stages, [&](const std::vector<std::uint32_t>& cuts) {
        for (std::uint32_t i = 0; i < stages; ++i) {
          const std::int64_t bytes = StageBytes(costs, cuts, i, input.most_microbatches);
          if (costs.memory > 0 && bytes > costs.memory) return;
        }
        const std::int64_t t = MeasurePaced(costs, cuts, paces).TimeNs(4LL * stages);
        if (best < 0 || t < best) best = t;
      });
    }
    const auto found = BestPacedPartition(costs, input, paces);
    ASSERT_EQ(found.has_value(), best >= 0) << "round " << round;
    if (!found) continue;
    EXPECT_EQ(found->TimeNs(4LL * stages), best) << "round " << round;
    ++compared;
    // At the usual pace it is the division of a template.
    const std::vector<std::uint32_t> usual(stages, kUsualPace);
    const auto plain = BestPacedPartition(costs, input, usual);
    ASSERT_TRUE(plain.has_value());
    EXPECT_EQ(plain->TimeNs(4LL * stages), BestPartition(costs, input)->TimeNs(4LL * stages));
    fewer_layers += plain->cuts != found->cuts;
  }
  EXPECT_GT(compared, 300);
  EXPECT_GT(fewer_layers, 100) << "paces never mattered";
}

// Splits of `left` microbatches over the pipelines from `at` on, each at least one.
std::int64_t BestSplit(const std::vector<std::function<std::int64_t(std::int64_t)>>& times,
                       std::size_t at, std::int64_t left) {
  if (at + 1 == times.size()) return times[at](left);
  std::int64_t best = -1;
  const auto others = static_cast<std::int64_t>(times.size() - at - 1);
  for (std::int64_t m = 1; m + others <= left; ++m) {
    const std::int64_t t = std::max(times[at](m), BestSplit(times, at + 1, left - m));
    if (best < 0 || t < best) best = t;
  }
  return best;
}

struct Drawn {
  Library library;
  Seated seated;
};
std::optional<Drawn> DrawSeated(Random* random, std::uint32_t nodes) {
  Profile p = Draw(random, {.layers = 9, .tight_memory = random->Chance(300)});
  Answer<Library> made = MakeLibrary(p, {.nodes = nodes, .faults = 1});
  if (!made.ok()) return std::nullopt;
  const auto composed =
      Compose(made.value(),
              {.nodes = nodes, .microbatches = static_cast<std::uint64_t>(random->Between(8, 24))});
  if (!composed.ok()) return std::nullopt;
  std::vector<NodeId> ids(nodes);
  std::iota(ids.begin(), ids.end(), 0U);
  Drawn drawn{.library = std::move(made.value()), .seated = {}};
  drawn.seated = Seat(composed.value(), drawn.library, ids);
  return drawn;
}

TEST(PaceProperty, MicrobatchesAreSharedOutAsWellAsCanBe) {
  Random random(42);
  int compared = 0;
  for (int round = 0; round < 250; ++round) {
    const auto drawn = DrawSeated(&random, static_cast<std::uint32_t>(random.Between(4, 7)));
    if (!drawn || drawn->seated.nodes.size() > 3) continue;
    const auto slow = static_cast<NodeId>(random.Below(drawn->seated.composition.nodes));
    const auto pace = static_cast<std::uint32_t>(random.Between(200, 950));
    const PacedChoice choice = PlanForPaces(drawn->library, drawn->seated, {{slow, pace}}).value();
    for (const PacedPlan& plan : choice.options) {
      if (plan.remedy != Remedy::kMicrobatches && plan.remedy != Remedy::kLayers) continue;
      std::vector<std::function<std::int64_t(std::int64_t)>> times;
      std::uint64_t sum = 0;
      for (std::size_t p = 0; p < plan.cuts.size(); ++p) {
        const Template& t = drawn->library.templates[plan.seated.composition.pipelines[p].form];
        std::vector<std::uint32_t> paces(t.partition.stages(), kUsualPace);
        for (std::uint32_t place = 0; place < t.nodes; ++place) {
          if (plan.seated.nodes[p][place] != slow) continue;
          paces[place * t.shape.stages_per_node / t.shape.nodes_per_stage] = pace;
        }
        const Partition partition =
            MeasurePaced(CostsOf(drawn->library.profile, t.shape).value(), plan.cuts[p], paces);
        const std::int64_t tail =
            plan.seated.composition.pipelines[p].time_ns -
            partition.TimeNs(plan.seated.composition.pipelines[p].microbatches);
        EXPECT_GE(tail, 0);
        times.emplace_back(
            [partition, tail](std::int64_t m) { return partition.TimeNs(m) + tail; });
        sum += plan.seated.composition.pipelines[p].microbatches;
      }
      EXPECT_EQ(sum, drawn->seated.composition.microbatches);
      EXPECT_EQ(plan.time_ns, BestSplit(times, 0, static_cast<std::int64_t>(sum)))
          << "round " << round;
      ++compared;
    }
  }
  EXPECT_GT(compared, 100);
}

// In their order none is worse than the one before but eviction; the cheapest is taken, and each of
// them wins somewhere: a little slow gets fewer microbatches, slower fewer layers, very slow
// leaves.
TEST(PaceProperty, TheCheapestRemedyIsTakenAndEachHasItsTurn) {
  Random random(43);
  std::vector<int> wins(4, 0);
  for (int round = 0; round < 600; ++round) {
    const auto drawn = DrawSeated(&random, static_cast<std::uint32_t>(random.Between(5, 8)));
    if (!drawn) continue;
    const auto slow = static_cast<NodeId>(random.Below(drawn->seated.composition.nodes));
    const auto pace = static_cast<std::uint32_t>(random.Between(kLeastPace, 990));
    const std::int64_t horizon = random.Chance(500) ? 0 : random.Between(1'000, 1'000'000'000);
    const PacedChoice choice =
        PlanForPaces(drawn->library, drawn->seated, {{slow, pace}}, horizon).value();
    ASSERT_GE(choice.options.size(), 3U);
    EXPECT_GE(choice.options[0].time_ns, drawn->seated.composition.time_ns);
    EXPECT_LE(choice.options[1].time_ns, choice.options[0].time_ns);
    EXPECT_EQ(choice.options[1].moved_bytes, 0);
    const auto worth = [horizon](const PacedPlan& plan) {
      return static_cast<double>(plan.time_ns) *
             (horizon == 0 ? 1
                           : 1 + static_cast<double>(plan.move_ns) / static_cast<double>(horizon));
    };
    const PacedPlan& best = choice.options[choice.best];
    for (const PacedPlan& plan : choice.options) {
      EXPECT_LE(worth(best), worth(plan)) << "round " << round;
      const bool leaves = plan.remedy == Remedy::kEviction;
      EXPECT_EQ(plan.evicted.size(), leaves ? 1U : 0U);
      for (const auto& nodes : plan.seated.nodes) {
        const bool there = std::find(nodes.begin(), nodes.end(), slow) != nodes.end();
        EXPECT_FALSE(leaves && there);
      }
    }
    ++wins[static_cast<std::size_t>(best.remedy)];
  }
  fmt::print("nothing {}, microbatches {}, layers {}, eviction {}\n", wins[0], wins[1], wins[2],
             wins[3]);
  for (std::size_t remedy = 1; remedy < wins.size(); ++remedy) EXPECT_GT(wins[remedy], 5) << remedy;
}

TEST(PaceProperty, WrongPacesAreRefused) {
  Random random(44);
  std::optional<Drawn> drawn;
  while (!drawn) drawn = DrawSeated(&random, 6);
  const auto refused = [&](NodeId node, std::uint32_t pace) {
    const auto answer = PlanForPaces(drawn->library, drawn->seated, {{node, pace}});
    return answer.ok() ? std::string() : answer.refusal().what;
  };
  EXPECT_NE(refused(99, 500).find("node 99 has no place"), std::string::npos);
  EXPECT_NE(refused(1, 0).find("node 1 at 0"), std::string::npos);
  EXPECT_NE(refused(1, kMostPace + 1).find("node 1 at 20"), std::string::npos);
  EXPECT_TRUE(refused(1, kUsualPace).empty());
}

}  // namespace
}  // namespace everstep::planner
