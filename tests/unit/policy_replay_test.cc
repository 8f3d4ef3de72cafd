// Each policy on traces that are short enough to reckon with: one sample a second and node, on 4 to
// 16 nodes; an iteration is 64 samples, so 4 s on 16 nodes. Everybody is there after 45 s.
#include <gtest/gtest.h>

#include "controller/policy/plot.h"
#include "controller/policy/policies.h"
#include "controller/policy/simulate.h"
#include "tests/unit/policy_models.h"

namespace everstep::policy {
namespace {

using models::EvenModel;
using models::Written;

constexpr std::size_t kProductive = 0, kLost = 1, kSwitching = 2, kCheckpoint = 3, kIdle = 4;

double Seconds(const Report& report, std::size_t account) {
  return static_cast<double>(report.us[account]) / 1e6;
}

const std::vector<Policy>& Everyone() {
  static const std::vector<Policy> all = {Policy::kVaruna, Policy::kBamboo, Policy::kOobleck,
                                          Policy::kMemory, Policy::kEverstep};
  return all;
}

Simulation Simulated(const Trace& trace) {
  return Simulate(trace, EvenModel(), {}, Everyone());
}

TEST(Policies, WithoutFaultsAllTrainAllTheTime) {
  const Simulation s = Simulated(Written({{0, true, 1, 16}}, 1'045'000));
  EXPECT_NEAR(s.oracle_samples, 16'000, 1e-6);
  EXPECT_NEAR(s.cost, 16 * 1045.0 / 3600 * 0.91, 1e-9);
  for (const Report& r : s.reports) {
    EXPECT_EQ(Seconds(r, kIdle), 45) << r.policy;
    EXPECT_EQ(Seconds(r, kLost), 0) << r.policy;
    EXPECT_EQ(Seconds(r, kSwitching), 0) << r.policy;
    EXPECT_EQ(r.stopped, 0U) << r.policy;
    const bool writes = r.policy == "varuna" || r.policy == "bamboo";
    EXPECT_EQ(Seconds(r, kCheckpoint) > 0, writes) << r.policy;
    const double speed = r.policy == "bamboo" ? 8 : 16;
    EXPECT_NEAR(r.samples, speed * Seconds(r, kProductive), 0.01) << r.policy;
  }
}

// The ninth iteration is at its second second when a node is lost.
TEST(Oobleck, LosesTheIterationAndSwitches) {
  const Simulation s =
      Simulated(Written({{0, true, 1, 16}, {45'000 + 34'000, false, 3, 3}}, 45'000 + 100'000));
  const Report& r = s.reports[2];
  EXPECT_EQ(Seconds(r, kLost), 2);
  EXPECT_EQ(Seconds(r, kSwitching), 5 + 2) << "detected, switched";
  EXPECT_EQ(Seconds(r, kProductive), 32 + 59);
  EXPECT_NEAR(r.samples, 32 * 16 + 59 * 15, 0.01);
  EXPECT_EQ(r.stopped, 1U);
}

TEST(Memory, LosesTheIterationAndRestarts) {
  const Simulation s =
      Simulated(Written({{0, true, 1, 16}, {45'000 + 34'000, false, 3, 3}}, 45'000 + 100'000));
  const Report& r = s.reports[3];
  EXPECT_EQ(Seconds(r, kLost), 2);
  EXPECT_EQ(Seconds(r, kSwitching), 5 + 30);
  EXPECT_NEAR(r.samples, 32 * 16 + 31 * 15, 0.01);
}

TEST(Varuna, LosesWhatIsNewerThanItsCheckpoint) {
  const Capacity c = CapacityOf(
      Written({{0, true, 1, 16}, {45'000 + 34'000, false, 3, 3}}, 45'000 + 100'000), 45'000'000);
  // Checkpoints of 3 s after 5 iterations of 4 s: one, then 2 iterations and 3 s.
  const Report r = RestartReport(c, EvenModel(), {}, {.every = 5});
  EXPECT_EQ(Seconds(r, kLost), 8 + 3);
  EXPECT_EQ(r.rolled_back, 1U);
  // Again on 15 nodes, from the 69th second: 31 s are 7 iterations and a checkpoint.
  EXPECT_EQ(Seconds(r, kSwitching), 5 + 30);
  EXPECT_EQ(Seconds(r, kCheckpoint), 3 + 3);
  EXPECT_NEAR(r.samples, 20 * 16 + 28 * 15, 0.01);
}

TEST(Varuna, WritesACheckpointInANoticeAndLosesNothing) {
  const Capacity c = CapacityOf(
      Written({{0, true, 1, 16}, {45'000 + 34'000, false, 3, 3}}, 45'000 + 100'000), 45'000'000);
  Rules rules;
  rules.notice_us = 20'000'000;
  const Report r = RestartReport(c, EvenModel(), rules, {.every = kNoCheckpoints});
  EXPECT_EQ(Seconds(r, kLost), 0);
  EXPECT_EQ(Seconds(r, kCheckpoint), 3);
  EXPECT_EQ(Seconds(r, kSwitching), 30);
  EXPECT_NEAR(r.samples, 28 * 16 + (100 - 28 - 33) * 15, 0.01) << "at the boundary after 28 s";
}

// Pipelines of 4: places 0..3, 4..7, ...
TEST(Bamboo, CoversOneLossAndRollsBackForTwoNeighbours) {
  const auto run = [](int first, int last) {
    const Capacity c = CapacityOf(
        Written({{0, true, 1, 16}, {45'000 + 34'000, false, first, last}}, 45'000 + 100'000),
        45'000'000);
    return BambooReport(c, EvenModel(), {}, kNoCheckpoints);
  };
  const Report covered = run(3, 3);
  EXPECT_EQ(Seconds(covered, kLost), 0);
  EXPECT_EQ(Seconds(covered, kSwitching), 5 + 10);
  EXPECT_NEAR(covered.samples, 34 * 8 + 51 * 6, 0.01) << "it goes on where it stood";
  const Report apart = run(4, 5);  // of two pipelines
  EXPECT_EQ(Seconds(apart, kLost), 0);
  const Report neighbours = run(2, 3);
  EXPECT_EQ(Seconds(neighbours, kLost), 34) << "no checkpoint was written";
  EXPECT_EQ(Seconds(neighbours, kSwitching), 5 + 30 + 10);
}

// Half of the nodes are one of two pipelines: the other keeps what it has.
TEST(Everstep, KeepsWhatTheOtherPipelinesHaveDone) {
  const Trace trace =
      Written({{0, true, 1, 16}, {45'000 + 35'000, false, 16, 16}}, 45'000 + 100'000);
  const Capacity c = CapacityOf(trace, 45'000'000);
  const Report keeps = PlannedReport(c, EvenModel(), {});
  const Report drops = PlannedReport(c, EvenModel(), {}, {.keep_gradients = false});
  EXPECT_LE(Seconds(keeps, kLost), 1.5) << "of the 3 seconds of this iteration";
  EXPECT_GT(Seconds(keeps, kLost), 0);
  EXPECT_EQ(Seconds(drops, kLost), 3);
  EXPECT_GT(keeps.samples, drops.samples);
}

TEST(Everstep, LeavesAtTheLastBoundaryOfANotice) {
  const Trace trace =
      Written({{0, true, 1, 16}, {45'000 + 34'000, false, 16, 16}}, 45'000 + 100'000);
  Rules rules;
  rules.notice_us = 20'000'000;
  const Report r = PlannedReport(CapacityOf(trace, 45'000'000), EvenModel(), rules);
  EXPECT_EQ(r.stopped, 0U);
  EXPECT_EQ(Seconds(r, kLost), 0);
  EXPECT_EQ(r.course.at(7).first, 45'000'000 + 32'000'000) << "eight iterations on all nodes";
  rules.notice_us = 1'000'000;  // no boundary within: it goes a second early
  const Report early = PlannedReport(CapacityOf(trace, 45'000'000), EvenModel(), rules);
  EXPECT_EQ(early.stopped, 1U);
  EXPECT_LE(Seconds(early, kLost), 0.5) << "a pipeline's part of one second";
}

// With the same speeds, without gradients kept and with moves for nothing it is Oobleck.
TEST(Everstep, IsOobleckWithoutWhatIsItsOwn) {
  const Trace trace = Written(
      {{0, true, 1, 16}, {80'000, false, 16, 16}, {133'500, false, 1, 2}, {301'000, false, 7, 7}},
      700'000);
  const Capacity c = CapacityOf(trace, 45'000'000);
  const Report planned =
      PlannedReport(c, EvenModel(), {}, {.keep_gradients = false, .price_moves = false});
  const Report published = OobleckReport(c, EvenModel(), {});
  EXPECT_EQ(planned.us, published.us);
  EXPECT_NEAR(planned.samples, published.samples, 1e-6 * published.samples);
}

TEST(Policies, ASpareThatIsLostCostsNothing) {
  const Simulation s = Simulated(Written({{0, true, 1, 20}, {145'000, false, 17, 20}}, 300'000));
  for (const Report& r : s.reports) {
    EXPECT_EQ(r.stopped, 0U) << r.policy;
    EXPECT_EQ(Seconds(r, kLost), 0) << r.policy;
  }
}

TEST(Policies, ASpareTakesALostPlaceAtOnce) {
  const Simulation s = Simulated(Written({{0, true, 1, 20}, {145'000, false, 1, 1}}, 1'000'000));
  for (const Report& r : s.reports) {
    EXPECT_EQ(r.stopped, 1U) << r.policy;
    EXPECT_EQ(r.switches, 1U) << r.policy;
  }
}

// 8 nodes, then 3, which only Everstep and those that need one copy can use, then 1, then 8.
TEST(Policies, WaitWithTooFewNodesAndGoOnByThemselves) {
  const Simulation s = Simulated(Written(
      {{0, true, 1, 8}, {145'000, false, 4, 8}, {245'000, false, 2, 3}, {300'000, true, 4, 10}},
      1'045'000));
  for (const Report& r : s.reports) {
    const double idle = Seconds(r, kIdle);
    const bool two_copies = r.policy == "oobleck" || r.policy == "bamboo";
    EXPECT_EQ(idle, 45 + (two_copies ? 200 : 100)) << r.policy;
    EXPECT_GT(r.samples, 0.5 * s.oracle_samples * (r.policy == "bamboo" ? 0.5 : 1)) << r.policy;
  }
}

// A batch that takes both copies of a layer: the last step comes from peers' memory.
TEST(Everstep, GoesBackToMemoryWhenNoCopyIsLeft) {
  Model model = EvenModel();
  const Trace trace =
      Written({{0, true, 1, 5}, {146'000, false, 2, 5}, {200'000, true, 6, 9}}, 900'000);
  const Report r = PlannedReport(CapacityOf(trace, 45'000'000), model, {});
  EXPECT_GE(Seconds(r, kSwitching), 30) << "restored from memory";
  EXPECT_GT(r.samples, 0);
}

TEST(Policies, SameSpeedsLeaveRecoveryAlone) {
  ModelTable table = models::EvenTable();
  for (double& speed : table.templates.speeds) speed /= 2;
  const Model model = MeasuredModel(table, models::EvenProfile(16), {.same = true}).value();
  EXPECT_EQ(model.templates, model.ours.empty() ? model.grid : model.templates);
  for (std::uint32_t n = 4; n <= 16; ++n) {
    EXPECT_EQ(model.templates[n], n);
    EXPECT_EQ(model.grid[n], n);
    EXPECT_EQ(model.redundant[n], n);
  }
}

TEST(Plots, AreWholeDocumentsThatNameEveryPolicy) {
  const Simulation s = Simulated(Written({{0, true, 1, 16}, {145'000, false, 1, 1}}, 1'000'000));
  for (const std::string& svg : {CoursePlot(s), GridPlot({s, s})}) {
    EXPECT_EQ(svg.rfind("<svg ", 0), 0U);
    EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
    for (const Report& r : s.reports) EXPECT_NE(svg.find(r.policy), std::string::npos) << r.policy;
    EXPECT_EQ(svg.find("nan"), std::string::npos);
    EXPECT_EQ(svg.find("inf"), std::string::npos);
  }
}

}  // namespace
}  // namespace everstep::policy
