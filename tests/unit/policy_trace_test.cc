// Capacity traces: read, drawn, and as a job sees them; tables of models.
#include <gtest/gtest.h>

#include <cmath>

#include "controller/planner/compose.h"
#include "controller/policy/model.h"
#include "controller/policy/simulate.h"
#include "controller/policy/spot.h"
#include "controller/policy/table_text.h"
#include "controller/policy/trace.h"
#include "tests/unit/policy_models.h"

namespace everstep::policy {
namespace {

TEST(Trace, IsReadAndWrittenAlike) {
  const std::string text =
      "t_ms,event,node\n0,add,a\n0,add,b\n5000,remove,a\n7000,add,a\n9000,end,\n";
  const auto trace = ParseTrace(text, "t");
  ASSERT_TRUE(trace.ok()) << trace.refusal().what;
  EXPECT_EQ(trace.value().events.size(), 4U);
  EXPECT_EQ(trace.value().end_ms, 9000);
  EXPECT_EQ(TraceText(trace.value()), text);
  const auto bare = ParseTrace("0,add,a\r\n# a note\n\n60000,remove,a\r\n", "t");
  ASSERT_TRUE(bare.ok()) << "no head, no end, a note, Windows' lines";
  EXPECT_EQ(bare.value().end_ms, 60000);
}

TEST(Trace, RefusalsNameTheLineAndWhatIsWrong) {
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"", "nothing happens"},
      {"0,end,\n", "nothing happens"},
      {"0,add\n", "line 1: not three columns"},
      {"0,add,a,b\n", "line 1: not three columns"},
      {"0,add,a\nx,remove,a\n", "line 2: the time is no number"},
      {"0,add,a\n-1,remove,a\n", "line 2: the time is no number"},
      {"5,add,a\n4,remove,a\n", "line 2: time runs backwards, it was 5"},
      {"5,join,a\n", "line 1: unknown event"},
      {"5,add,\n", "line 1: the node has no name"},
      {"5,remove,a\n", "line 1: it is not there"},
      {"5,add,a\n6,add,a\n", "line 2: it is there already"},
      {"5,add,a\n6,end,\n7,remove,a\n", "line 3: something stands behind the end"},
  };
  for (const auto& [text, says] : wrong) {
    const auto trace = ParseTrace(text, "t");
    ASSERT_FALSE(trace.ok()) << text;
    EXPECT_NE(trace.refusal().what.find(says), std::string::npos)
        << text << " gives " << trace.refusal().what;
  }
}

TEST(Capacity, NodesCountOnceTheyHaveBootedAndASecondIsOneMoment) {
  const Trace trace = models::Written({{0, true, 1, 3},
                                       {50'000, true, 4, 4},  // leaves while it boots
                                       {70'000, false, 4, 4},
                                       {100'100, false, 1, 1},  // one moment with the next
                                       {100'900, false, 2, 2},
                                       {101'000, true, 2, 2},  // another node by the same name
                                       {200'000, false, 3, 3}},
                                      300'000);
  const Capacity c = CapacityOf(trace, 45'000'000);
  ASSERT_EQ(c.changes.size(), 4U);
  EXPECT_EQ(c.changes[0].at_us, 45'000'000);
  EXPECT_EQ(c.changes[0].joined, (std::vector<NodeId>{0, 1, 2}));
  EXPECT_EQ(c.changes[1].at_us, 100'100'000);
  EXPECT_EQ(c.changes[1].lost, (std::vector<NodeId>{0, 1}));
  EXPECT_EQ(c.changes[2].at_us, 146'000'000);
  EXPECT_EQ(c.changes[2].joined, (std::vector<NodeId>{4}));
  EXPECT_EQ(c.changes[3].lost, (std::vector<NodeId>{2}));
  EXPECT_EQ(c.losses, 3U);
  EXPECT_EQ(c.loss_changes, 2U);
  EXPECT_EQ(c.largest_loss, 2U);
  EXPECT_EQ(c.most_nodes, 3U);
  EXPECT_EQ(c.mean_loss_gap_us, 150'000'000);
  // 100.1 + 100.9 + 200 + 20 + 199 seconds, booting paid for.
  EXPECT_EQ(c.billed_us, 620'000'000);
  EXPECT_NEAR(c.mean_nodes * 300, 55.1 + 55.9 + 155 + 154, 1e-6);
}

// What a law says of a recording holds for what is drawn from it, over a hundred seeds.
TEST(SpotLaw, DrawnTracesHaveItsNodesGapsAndBatches) {
  for (const SpotLaw& law : SpotLaws()) {
    double nodes = 0, moments = 0, losses = 0, hours = 0;
    std::uint32_t largest = 0;
    for (std::uint64_t seed = 1; seed <= 100; ++seed) {
      const Trace trace = DrawTrace(law, seed);
      ASSERT_TRUE(ParseTrace(TraceText(trace), "again").ok()) << law.name << " seed " << seed;
      const Capacity c = CapacityOf(trace, 0);
      nodes += c.mean_nodes / 100;
      moments += c.loss_changes;
      losses += c.losses;
      hours += law.hours;
      EXPECT_LE(c.most_nodes, law.most_nodes);
      largest = std::max(largest, c.largest_loss);
    }
    EXPECT_NEAR(hours * 60 / moments, law.minutes_between, 0.1 * law.minutes_between) << law.name;
    EXPECT_NEAR(losses / moments, law.batch_mean, 0.1 * law.batch_mean) << law.name;
    if (law.returns) {
      EXPECT_NEAR(nodes, law.mean_nodes, 0.08 * law.mean_nodes) << law.name;
    }
    // Two draws may fall into one second.
    EXPECT_LE(largest, 2 * law.batch_most) << law.name;
  }
  EXPECT_EQ(FindSpotLaw("nowhere"), nullptr);
}

TEST(SpotLaw, ASeedIsOneTrace) {
  const SpotLaw& law = *FindSpotLaw("ec2-p3");
  EXPECT_EQ(TraceText(DrawTrace(law, 7)), TraceText(DrawTrace(law, 7)));
  EXPECT_NE(TraceText(DrawTrace(law, 7)), TraceText(DrawTrace(law, 8)));
}

constexpr char kModel[] =
    "everstep-model 1\nmodel = m\nbatch = 100\nleast-nodes = 2\nreconfigure-s = 2\n"
    "checkpoint-s = 3\nrestart-s = 30\nrebalance-s = 4\nredundant-stages = 2\n"
    "nodes,grid,templates,redundant,restart_s\n6,60,66,30,31\n7,60,77,30,\n8,80,88,,\n";

TEST(ModelTable, IsReadAsItStandsThere) {
  const auto table = ParseModel(kModel);
  ASSERT_TRUE(table.ok()) << table.refusal().what;
  EXPECT_EQ(table.value().name, "m");
  EXPECT_EQ(table.value().batch, 100);
  EXPECT_EQ(table.value().grid.first, 6U);
  EXPECT_EQ(table.value().grid.speeds, (std::vector<double>{60, 60, 80}));
  EXPECT_EQ(table.value().redundant.speeds, (std::vector<double>{30, 30}));
  EXPECT_EQ(table.value().restart.speeds, (std::vector<double>{31}));
  EXPECT_EQ(table.value().rebalance_s, 4);
}

TEST(ModelTable, RefusalsNameTheSettingOrTheRow) {
  const auto with = [](const std::string& from, const std::string& to) {
    std::string text = kModel;
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"", "empty"},
      {"model = m\n", "first line"},
      {with("batch = 100\n", ""), "batch is missing"},
      {with("batch = 100", "batch = -1"), "batch is \"-1\""},
      {with("batch = 100", "batch = 0"), "a batch of 0"},
      {with("batch = 100", "batch = 1\nbatch = 2"), "batch stands there twice"},
      {with("least-nodes = 2", "least-nodes = 0"), "least-nodes is 0"},
      {with("restart-s = 30", "restart-s = nan"), "restart-s is \"nan\""},
      {with("checkpoint-s", "chekpoint-s"), "no setting is called \"chekpoint-s\""},
      {with("nodes,grid", "n,grid"), "no column is called nodes"},
      {with("7,60,77,30,", "7,60,77,30"), "4 columns"},
      {with("7,60,77,30,", "6,60,77,30,"), "6 nodes stand there twice"},
      {with("7,60,77,30,", "9,60,77,30,"), "grid of 7 nodes is missing"},
      {with("7,60,77", "7,fast,77"), "grid of 7 nodes is \"fast\""},
      {with("7,60,77", "0,60,77"), "0 nodes"},
  };
  for (const auto& [text, says] : wrong) {
    const auto table = ParseModel(text);
    ASSERT_FALSE(table.ok()) << text;
    EXPECT_NE(table.refusal().what.find(says), std::string::npos)
        << says << ", but " << table.refusal().what;
  }
}

TEST(Model, IsNotClampedBelowItsTable) {
  const Model model = models::EvenModel();
  EXPECT_EQ(model.most_nodes, 16U);
  EXPECT_EQ(model.grid[1], 0) << "one copy needs two nodes";
  EXPECT_EQ(model.grid[3], 3) << "in proportion below the first row";
  EXPECT_EQ(model.templates[3], 0) << "two copies need four nodes";
  EXPECT_EQ(model.templates[4], 4);
  EXPECT_EQ(model.redundant[3], 0);
  EXPECT_EQ(model.best[16], 16);
  EXPECT_EQ(FastestWithin(model.redundant, 0, 15), 12U) << "the fewest of equals";
  EXPECT_EQ(FastestWithin(model.redundant, 0, 3), 0U);
  const auto least = planner::MakeTemplates(model.profile, 16);
  EXPECT_EQ(least.front().nodes, model.least_nodes) << "the memory is such that two nodes hold it";
  const auto library = planner::MakeLibrary(model.profile, {.nodes = 16, .faults = 1}).value();
  const auto best = planner::Compose(library, {.nodes = 16, .microbatches = model.microbatches});
  EXPECT_NEAR(static_cast<double>(best.value().time_ns), 4e9, 0.2e9) << "64 samples at 16 a second";
}

TEST(Model, ATraceOfTooManyStepsIsRefused) {
  const Trace hour = models::Written({{0, true, 1, 16}}, 3'600'000);
  EXPECT_FALSE(TooManySteps(hour, models::EvenModel()).has_value());
  Model quick = models::EvenModel();
  quick.batch = 0.001;
  const auto refused = TooManySteps(hour, quick);
  ASSERT_TRUE(refused.has_value());
  EXPECT_NE(refused->what.find("57600000 steps"), std::string::npos) << refused->what;
}

TEST(Model, PlannedSpeedsAreThoseOfThePlanner) {
  planner::Profile profile = models::EvenProfile(12);
  profile.device_memory_bytes = std::int64_t{4} << 30;
  const auto model = PlannedModel(AssumedCosts(profile, 128), profile, 10, {});
  ASSERT_TRUE(model.ok()) << model.refusal().what;
  const Model& m = model.value();
  EXPECT_EQ(m.microbatches, 128U);
  for (std::uint32_t n = 1; n <= 10; ++n) {
    EXPECT_LE(m.grid[n], m.best[n]);
    EXPECT_GE(m.best[n], m.best[n - 1]);
    EXPECT_EQ(m.templates[n] > 0, n >= 2 * m.least_nodes);
  }
  EXPECT_EQ(m.grid[m.least_nodes - 1], 0);
  EXPECT_GT(m.grid[m.least_nodes], 0);
}

}  // namespace
}  // namespace everstep::policy
