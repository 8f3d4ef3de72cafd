// Templates are the optimum: against every division of layers, by both ways of finding it, for all
// kinds of costs; and the optimum of the formula is close to the optimum of a discrete-event
// simulation.
#include <gtest/gtest.h>

#include <map>

#include <fmt/format.h>

#include "controller/planner/library.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

using models::Draw;
using models::Drawn;

TEST(TemplatesProperty, EqualBruteForceForAllKindsOfCosts) {
  Random random(11);
  int fits = 0, does_not = 0;
  std::map<bool, int> uniform;
  for (int round = 0; round < 1500; ++round) {
    const Drawn how{.layers = static_cast<std::uint32_t>(random.Between(1, 9)),
                    .equal = random.Chance(300),
                    .uneven_links = random.Chance(400),
                    .tight_memory = random.Chance(500)};
    Profile p = Draw(&random, how);
    p.devices_per_node = 1u << random.Below(4);
    const Shape shapes[] = {{1u << random.Below(4), 1}, {1, 1u << random.Below(3)}};
    const Shape shape = shapes[random.Below(2)];
    const auto costs = CostsOf(p, shape);
    if (!costs) continue;
    ++uniform[costs->uniform];
    for (std::uint32_t stages = 1; stages <= how.layers; ++stages) {
      const auto most = static_cast<std::uint32_t>(random.Chance(300) ? random.Between(1, 4) : 0);
      const auto expected = models::LeastByBruteForce(*costs, stages, most);
      for (const bool by_tables : {false, true}) {
        const auto found = BestPartition(
            *costs, {.stages = stages, .most_microbatches = most, .by_tables = by_tables});
        ASSERT_EQ(found.has_value(), expected.has_value())
            << "round " << round << " stages " << stages << " tables " << by_tables;
        if (!found) continue;
        ASSERT_EQ(found->TimeNs(4LL * stages), *expected)
            << "round " << round << " stages " << stages << " tables " << by_tables << "\n"
            << ProfileText(p);
        ASSERT_EQ(found->stages(), stages);
        for (std::uint32_t i = 0; i < stages && costs->memory > 0; ++i) {
          ASSERT_LE(StageBytes(*costs, found->cuts, i, most), costs->memory);
        }
        const auto again = BestPartition(
            *costs, {.stages = stages, .most_microbatches = most, .by_tables = by_tables});
        ASSERT_EQ(again->cuts, found->cuts) << "not the same twice";
      }
      ++(expected ? fits : does_not);
    }
  }
  EXPECT_GT(fits, 3000);
  EXPECT_GT(does_not, 300);
  EXPECT_GT(uniform[true], 300);
  EXPECT_GT(uniform[false], 300);
}

TEST(TemplatesProperty, BothWaysAgreeOnModelsTooLargeForBruteForce) {
  Random random(12);
  for (int round = 0; round < 40; ++round) {
    Profile p = Draw(
        &random, {.layers = 30, .equal = random.Chance(200), .tight_memory = random.Chance(500)});
    p.devices_per_node = 4;
    p.microbatch = 4;
    for (const Shape shape : {Shape{1, 1}, Shape{2, 1}, Shape{4, 1}}) {
      const auto costs = CostsOf(p, shape);
      ASSERT_TRUE(costs && costs->uniform);
      for (std::uint32_t stages = 1; stages <= 30; ++stages) {
        const auto greedy = BestPartition(*costs, {.stages = stages});
        const auto tables = BestPartition(*costs, {.stages = stages, .by_tables = true});
        ASSERT_EQ(greedy.has_value(), tables.has_value()) << round << " stages " << stages;
        if (!greedy) continue;
        ASSERT_EQ(greedy->TimeNs(4LL * stages), tables->TimeNs(4LL * stages))
            << "round " << round << " stages " << stages;
      }
    }
  }
}

TEST(TemplatesProperty, AreCloseToTheBestOfADiscreteEventSimulation) {
  Random random(13);
  double worse = 0, formula_low = 0, formula_high = 0;
  int cases = 0;
  for (int round = 0; round < 120; ++round) {
    const auto layers = static_cast<std::uint32_t>(random.Between(6, 10));
    Profile p = Draw(&random, {.layers = layers, .uneven_links = random.Chance(300)});
    // Times as they are measured: layers differ by some, backward takes twice as long.
    for (Layer& l : p.layers) {
      l.forward_ns = random.Between(3'000, 6'000);
      l.backward_ns = 2 * l.forward_ns + random.Between(-300, 300);
    }
    const auto costs = CostsOf(p, {1, 1});
    const auto stages = static_cast<std::uint32_t>(random.Between(2, 5));
    const auto plan = BestPartition(*costs, {.stages = stages});
    ASSERT_TRUE(plan);
    const std::int64_t ours = models::Simulated1F1B(p, plan->cuts, 4 * stages);
    std::int64_t best = ours;
    models::EveryDivision(layers, stages, [&](const std::vector<std::uint32_t>& cuts) {
      best = std::min(best, models::Simulated1F1B(p, cuts, 4 * stages));
    });
    const double formula =
        static_cast<double>(plan->TimeNs(4LL * stages)) / static_cast<double>(ours) - 1;
    formula_low = std::min(formula_low, formula);
    formula_high = std::max(formula_high, formula);
    worse += static_cast<double>(ours) / static_cast<double>(best) - 1;
    ++cases;
  }
  fmt::print("mean {:.3f} % over the best; formula {:.1f} to {:.1f} % of the simulation\n",
             100 * worse / cases, 100 * formula_low, 100 * formula_high);
  RecordProperty("mean_worse_ppm", static_cast<int>(worse / cases * 1e6));
  EXPECT_LE(worse / cases, 0.002) << "mean over " << cases << " cases";
  EXPECT_GE(formula_low, -0.08) << "the formula is a lower estimate, a close one";
  EXPECT_LE(formula_high, 0.02);
}

TEST(TemplatesProperty, OneMicrobatchTakesT1AndTimeGrowsWithEveryMicrobatch) {
  Random random(14);
  for (int round = 0; round < 300; ++round) {
    const Profile p = Draw(&random, {.layers = 9, .uneven_links = random.Chance(500)});
    for (const Template& t : MakeTemplates(p, 6)) {
      EXPECT_EQ(t.TimeNs(1), t.partition.t1_ns);
      EXPECT_EQ(t.MostWithin(t.TimeNs(1) - 1), 0);
      for (std::int64_t m = 1; m < 30; ++m) {
        ASSERT_LE(t.TimeNs(m), t.TimeNs(m + 1));
        // The most that fits in T(m) takes no longer, and one more does.
        const std::int64_t most = t.MostWithin(t.TimeNs(m));
        ASSERT_GE(most, m);
        ASSERT_LE(t.TimeNs(most), t.TimeNs(m));
        ASSERT_GT(t.TimeNs(most + 1), t.TimeNs(m));
      }
    }
  }
}

TEST(TemplatesProperty, LibrariesCoverEveryNumberOfNodesOrSayWhatWould) {
  Random random(15);
  int made = 0, refused = 0;
  for (int round = 0; round < 400; ++round) {
    const Profile p = Draw(&random, {.layers = static_cast<std::uint32_t>(random.Between(1, 12)),
                                     .tight_memory = random.Chance(700)});
    const LibraryInput in{.nodes = static_cast<std::uint32_t>(random.Between(1, 24)),
                          .faults = static_cast<std::uint32_t>(random.Between(0, 3))};
    const Answer<Library> answer = MakeLibrary(p, in);
    if (!answer.ok()) {
      ++refused;
      EXPECT_FALSE(answer.refusal().what.empty());
      EXPECT_FALSE(answer.refusal().change.empty()) << answer.refusal().what;
      continue;
    }
    ++made;
    const Library& library = answer.value();
    EXPECT_EQ(library.fewest_nodes, (in.faults + 1) * library.least_nodes);
    // Written out apart from MostParts: sums of exactly q sizes.
    std::vector<std::vector<bool>> sums(1, std::vector<bool>(in.nodes + 1, false));
    sums[0][0] = true;
    for (std::uint32_t q = 1; q <= in.nodes; ++q) {
      sums.emplace_back(in.nodes + 1, false);
      for (std::uint32_t n = 0; n <= in.nodes; ++n) {
        for (const std::uint32_t size : library.sizes) {
          if (size <= n && sums[q - 1][n - size]) sums[q][n] = true;
        }
      }
    }
    for (std::uint32_t n = library.fewest_nodes; n <= in.nodes; ++n) {
      bool covered = false;
      for (std::uint32_t q = in.faults + 1; q <= in.nodes; ++q) covered = covered || sums[q][n];
      EXPECT_TRUE(covered) << n << " nodes";
    }
    // Every homogeneous grid of f + 1 pipelines or more, where the model divides so.
    for (std::uint32_t d = in.faults + 1; d <= in.nodes; ++d) {
      if (in.nodes % d != 0) continue;
      const std::uint32_t size = in.nodes / d;
      const bool exists = MakeTemplate(p, {1, 1}, size).has_value();
      const bool has =
          std::find(library.sizes.begin(), library.sizes.end(), size) != library.sizes.end();
      EXPECT_TRUE(has || !exists) << d << " pipelines of " << size;
    }
  }
  EXPECT_GT(made, 100);
  EXPECT_GT(refused, 50);
}

}  // namespace
}  // namespace everstep::planner
