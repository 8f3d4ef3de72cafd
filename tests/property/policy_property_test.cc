// What holds for every policy on any trace: drawn capacity, drawn models, drawn rules.
#include <gtest/gtest.h>

#include <cstdlib>

#include "controller/policy/policies.h"
#include "controller/policy/simulate.h"
#include "controller/policy/spot.h"
#include "proto/base/random.h"
#include "tests/unit/policy_models.h"

namespace everstep::policy {
namespace {

std::vector<Policy> Everyone() {
  std::vector<Policy> all;
  all.reserve(Policies().size());
  for (const PolicyName& name : Policies()) all.push_back(name.policy);
  return all;
}

ModelTable DrawTable(Random* random) {
  ModelTable table;
  table.name = "drawn";
  table.batch = static_cast<double>(random->Between(16, 4096));
  table.least_nodes = static_cast<std::uint32_t>(random->Between(1, 4));
  table.reconfigure_s = static_cast<double>(random->Between(0, 20));
  table.checkpoint_s = static_cast<double>(random->Between(0, 100));
  table.restart_s = static_cast<double>(random->Between(0, 600));
  if (random->Chance(700)) table.rebalance_s = static_cast<double>(random->Between(0, 100));
  table.redundant_stages = static_cast<std::uint32_t>(random->Between(2, 6));
  const auto first = static_cast<std::uint32_t>(random->Between(2, 8));
  for (Curve* curve : {&table.grid, &table.templates, &table.redundant}) {
    curve->first = first;
    for (std::uint32_t n = first; n <= 24; ++n) {
      curve->speeds.push_back(static_cast<double>(n * random->Between(600, 1000)) / 300);
    }
  }
  return table;
}

SpotLaw DrawLaw(Random* random) {
  SpotLaw law;
  law.name = "drawn";
  law.hours = static_cast<double>(random->Between(1, 6));
  law.most_nodes = static_cast<std::uint32_t>(random->Between(2, 32));
  law.mean_nodes = law.most_nodes * (0.3 + 0.07 * static_cast<double>(random->Below(10)));
  law.minutes_between = static_cast<double>(random->Between(2, 60));
  law.batch_most = static_cast<std::uint32_t>(random->Between(1, 12));
  law.batch_mean = 1 + 0.4 * (law.batch_most - 1);
  law.returns = random->Chance(900);
  return law;
}

TEST(Policies, BookAllTimeOnceAndNeverBeatTheOracle) {
  Random random(20);
  for (int i = 0; i < 150; ++i) {
    const std::uint64_t seed = random.Next();
    Random mine(seed);
    const Trace trace = DrawTrace(DrawLaw(&mine), mine.Next());
    if (trace.events.empty()) continue;
    Rules rules;
    rules.boot_us = mine.Between(0, 90'000'000);
    rules.detect_us = mine.Between(0, 30'000'000);
    rules.notice_us = mine.Chance(500) ? 0 : mine.Between(1, 150'000'000);
    const Answer<Model> model = MeasuredModel(
        DrawTable(&mine), models::EvenProfile(24),
        {.same = mine.Chance(200), .faults = static_cast<std::uint32_t>(mine.Between(0, 2))});
    ASSERT_TRUE(model.ok()) << model.refusal().what;
    const Simulation s = Simulate(trace, model.value(), rules, Everyone());
    const Simulation again = Simulate(trace, model.value(), rules, Everyone());
    ASSERT_EQ(s.reports.size(), Policies().size());
    for (std::size_t p = 0; p < s.reports.size(); ++p) {
      const Report& r = s.reports[p];
      if (!r.possible) continue;
      std::int64_t sum = 0;
      for (const std::int64_t us : r.us) {
        EXPECT_GE(us, 0) << r.policy << " seed " << seed;
        sum += us;
      }
      EXPECT_EQ(sum, s.capacity.end_us) << r.policy << " seed " << seed;
      EXPECT_LE(r.samples, s.oracle_samples * (1 + 1e-6) + 1) << r.policy << " seed " << seed;
      EXPECT_GE(r.samples, 0) << r.policy << " seed " << seed;
      double before = 0;
      for (const auto& [us, samples] : r.course) {
        EXPECT_GE(samples, before - 1e-9) << r.policy << " seed " << seed;
        before = samples;
      }
      EXPECT_EQ(r.samples, again.reports[p].samples) << "the same again: " << seed;
      EXPECT_EQ(r.us, again.reports[p].us) << "the same again: " << seed;
    }
  }
}

// Losses that are three times as frequent leave fewer samples of those that the oracle makes.
TEST(Policies, DoWorseTheMoreIsLost) {
  const Model model = models::EvenModel();
  const auto shares = [&](double minutes) {
    std::vector<double> sum(Policies().size(), 0.0);
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
      const SpotLaw law{.name = "some",
                        .hours = 6,
                        .most_nodes = 16,
                        .mean_nodes = 13,
                        .minutes_between = minutes,
                        .batch_mean = 1.5,
                        .batch_most = 4};
      const Simulation s = Simulate(DrawTrace(law, seed), model, {}, Everyone());
      for (std::size_t p = 0; p < sum.size(); ++p) sum[p] += s.OfOracle(s.reports[p]) / 20;
    }
    return sum;
  };
  const std::vector<double> often = shares(5), seldom = shares(15), hardly = shares(60);
  for (std::size_t p = 0; p < often.size(); ++p) {
    EXPECT_LT(often[p], seldom[p]) << Policies()[p].name;
    EXPECT_LT(seldom[p], hardly[p] + 0.002) << Policies()[p].name;
  }
}

// Without joins, with Oobleck's speeds, nothing kept and nothing paid for moves: the same history.
TEST(Everstep, IsOobleckWithoutWhatIsItsOwn) {
  ModelTable table = models::EvenTable();
  const Model model = MeasuredModel(table, models::EvenProfile(16), {}).value();
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    const SpotLaw law{.name = "lost",
                      .hours = 1,
                      .most_nodes = 16,
                      .mean_nodes = 16,
                      .minutes_between = 8,
                      .batch_mean = 1.2,
                      .batch_most = 2,
                      .returns = false};
    Trace trace = DrawTrace(law, seed);
    // Down to the fewest nodes of two copies: below, ours goes on with one.
    std::size_t losses = 0;
    std::erase_if(trace.events, [&](const TraceEvent& e) { return !e.add && ++losses > 12; });
    const Capacity c = CapacityOf(trace, 45'000'000);
    const Report ours =
        PlannedReport(c, model, {}, {.keep_gradients = false, .price_moves = false});
    const Report published = OobleckReport(c, model, {});
    if (ours.rolled_back > 0) continue;  // no copy was left, which Oobleck does not count
    EXPECT_EQ(ours.us, published.us) << "seed " << seed;
  }
}

// Every recording, the two models at the ends: an 11-hour trace in far less than a second.
TEST(Recordings, BookAllTimeOnceAndKeepTheirOrder) {
  const std::filesystem::path folder = models::Recordings();
  if (folder.empty()) GTEST_SKIP() << "no recordings: set EVERSTEP_TRACES";
  int traces = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder / "norm")) {
    const Trace trace = models::RecordedTrace(entry.path());
    ++traces;
    for (const auto& [name, profile] : {std::pair{"BERT-large", "bert-mb8-seq512-v100.csv"},
                                        std::pair{"GPT-3-6.7b", "gpt-6.7b-mb1-seq2048-v100.csv"}}) {
      const planner::Profile layers =
          planner::ParseProfile(models::ReadText(folder / "profiles" / profile)).value();
      const Model model = MeasuredModel(models::RecordedTable(name), layers, {}).value();
      const Simulation s = Simulate(trace, model, {}, Everyone());
      double oobleck = 0, everstep = 0;
      for (const Report& r : s.reports) {
        if (!r.possible) continue;
        EXPECT_EQ(r.total_us(), s.capacity.end_us) << trace.name << " " << r.policy;
        EXPECT_LE(r.samples, s.oracle_samples) << trace.name << " " << r.policy;
        if (r.policy == "oobleck") oobleck = r.samples;
        if (r.policy == "everstep") everstep = r.samples;
      }
      EXPECT_GT(everstep, 0.99 * oobleck) << trace.name << " " << name;
    }
  }
  EXPECT_GE(traces, 15);
}

}  // namespace
}  // namespace everstep::policy
