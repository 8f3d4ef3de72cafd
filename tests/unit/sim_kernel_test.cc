// The simulator's own ground: if these truths fail, no seed means anything.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/sim/kernel/disk.h"
#include "tests/sim/kernel/fault.h"
#include "tests/sim/kernel/network.h"
#include "tests/sim/kernel/shrink.h"
#include "tests/sim/kernel/timeline.h"

namespace everstep::sim {
namespace {

TEST(SimTimeline, RunsInTimeOrderAndAdvancesTheClock) {
  Timeline timeline(1, Timestamp{1000});
  std::vector<int> order;
  timeline.After(Milliseconds(2), "b", [&] { order.push_back(2); });
  timeline.After(Milliseconds(1), "a", [&] {
    order.push_back(1);
    timeline.At(Timestamp{0}, "past is now", [&] { order.push_back(10); });
  });
  const EventId cancelled = timeline.After(Milliseconds(3), "c", [&] { order.push_back(3); });
  EXPECT_TRUE(timeline.Cancel(cancelled));
  EXPECT_FALSE(timeline.Cancel(cancelled));
  timeline.RunUntil(Timestamp{1000} + Seconds(1));
  EXPECT_EQ(order, (std::vector<int>{1, 10, 2}));
  EXPECT_EQ(timeline.now(), Timestamp{1000} + Seconds(1));
  EXPECT_TRUE(timeline.idle());
}

std::vector<int> OrderOfOneInstant(std::uint64_t seed) {
  Timeline timeline(seed);
  std::vector<int> order;
  for (int i = 0; i < 8; ++i) timeline.At(Timestamp{5}, "x", [&order, i] { order.push_back(i); });
  timeline.RunUntil(Timestamp{5});
  return order;
}

TEST(SimTimeline, DrawsTheOrderOfOneInstantFromTheSeed) {
  EXPECT_EQ(OrderOfOneInstant(7), OrderOfOneInstant(7));
  int different = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    different += OrderOfOneInstant(seed) != OrderOfOneInstant(seed + 1) ? 1 : 0;
  }
  EXPECT_GT(different, 15);
}

TEST(SimTimeline, BoundsAWorldThatNeverRests) {
  Timeline timeline(1, {}, 100);
  std::function<void()> again = [&] { timeline.After(Duration(0), "again", again); };
  again();
  EXPECT_FALSE(timeline.RunUntil(Timestamp{1}));
  EXPECT_TRUE(timeline.exhausted());
}

// A small world over every part of the kernel; returns its digest.
std::uint64_t RunSmallWorld(std::uint64_t seed) {
  Timeline timeline(seed);
  Network network(&timeline,
                  {.drop_per_mille = 100, .duplicate_per_mille = 100, .slow_per_mille = 100});
  const StreamId stream = network.Open("a", "b");
  int got = 0;
  for (int i = 0; i < 200; ++i) {
    timeline.After(Milliseconds(i), "tick", [&, i] {
      network.Send("a", "b", "datagram", [&] { ++got; });
      network.SendOn(stream, "b", "stream", [&] { ++got; });
      if (i == 50) network.Partition("a", "b");
      if (i == 80) network.HealAll();
      if (i == 150) network.Break(stream);
    });
  }
  timeline.RunUntil(Timestamp{} + Seconds(5));
  timeline.digest().Add(static_cast<std::uint64_t>(got));
  return timeline.digest().value();
}

TEST(SimTimeline, SameSeedSameDigest) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(RunSmallWorld(seed), RunSmallWorld(seed)) << "seed " << seed;
    EXPECT_NE(RunSmallWorld(seed), RunSmallWorld(seed + 1)) << "seed " << seed;
  }
}

TEST(SimNetwork, DropsDoublesAndReordersDatagrams) {
  Timeline timeline(3);
  Network network(&timeline, {.drop_per_mille = 200, .duplicate_per_mille = 200});
  std::vector<int> got;
  for (int i = 0; i < 1000; ++i) network.Send("a", "b", "m", [&got, i] { got.push_back(i); });
  timeline.RunUntil(Timestamp{} + Seconds(1));
  EXPECT_GT(network.dropped(), 100U);
  EXPECT_GT(network.duplicated(), 100U);
  EXPECT_EQ(got.size(), 1000 - network.dropped() + network.duplicated());
  EXPECT_FALSE(std::is_sorted(got.begin(), got.end()));
}

TEST(SimNetwork, PartitionLosesDatagramsAndStallsStreamsInOrder) {
  Timeline timeline(4);
  Network network(&timeline, {});
  const StreamId stream = network.Open("a", "b");
  std::vector<int> got;
  int datagrams = 0;
  network.SendOn(stream, "a", "m", [&] { got.push_back(0); });
  network.Partition("a", "b");  // while the first one is under way
  network.Send("a", "b", "d", [&] { ++datagrams; });
  for (int i = 1; i < 20; ++i) network.SendOn(stream, "a", "m", [&got, i] { got.push_back(i); });
  timeline.RunUntil(Timestamp{} + Seconds(1));
  EXPECT_TRUE(got.empty());
  network.Heal("a", "b");
  for (int i = 20; i < 40; ++i) network.SendOn(stream, "a", "m", [&got, i] { got.push_back(i); });
  timeline.RunUntil(Timestamp{} + Seconds(2));
  EXPECT_EQ(datagrams, 0);
  ASSERT_EQ(got.size(), 40U);
  EXPECT_TRUE(std::is_sorted(got.begin(), got.end()));
}

TEST(SimNetwork, BrokenStreamLosesWhatIsInFlightButForTheMailbox) {
  Timeline timeline(5);
  Network network(&timeline, {.late_per_mille = 500});
  const StreamId stream = network.Open("a", "b");
  int got = 0;
  for (int i = 0; i < 100; ++i) network.SendOn(stream, "a", "m", [&] { ++got; });
  network.Break(stream);
  EXPECT_FALSE(network.IsOpen(stream));
  EXPECT_FALSE(network.SendOn(stream, "a", "m", [&] { got += 1000; }));
  timeline.RunUntil(Timestamp{} + Seconds(1));
  EXPECT_GT(got, 20);
  EXPECT_LT(got, 80);
}

TEST(SimDisk, CrashLosesExactlyWhatWasNotSynced) {
  Disk<int> disk;
  disk.Write("a", 1);
  disk.Write("b", 1);
  disk.Sync();
  disk.Write("a", 2);
  disk.Delete("b");
  EXPECT_EQ(disk.Read("a"), 2);
  EXPECT_EQ(disk.Read("b"), std::nullopt);
  disk.Crash();
  EXPECT_EQ(disk.Read("a"), 1);
  EXPECT_EQ(disk.Read("b"), 1);
  EXPECT_EQ(disk.unsynced(), 0U);
}

TEST(SimDisk, TornCrashKeepsSome) {
  Random random(9);
  Disk<int> disk;
  for (int i = 0; i < 100; ++i) disk.Write("k" + std::to_string(i), i);
  disk.CrashTorn(&random, 500);
  EXPECT_GT(disk.durable().size(), 20U);
  EXPECT_LT(disk.durable().size(), 80U);
}

TEST(SimFault, TextRoundTripsAndNamesWhatIsWrong) {
  const std::vector<Fault> faults = {{Milliseconds(1250), "node_crash", "n2", {}},
                                     {Seconds(3), "partition", "n1", Milliseconds(800)},
                                     {Duration(7), "controller_crash", "", {}},
                                     {Seconds(4), "slow", "", Milliseconds(1)}};
  const std::string text = FormatFaults(faults);
  EXPECT_EQ(text, "1250ms:node_crash:n2,3s:partition:n1:800ms,7ns:controller_crash,4s:slow::1ms");
  std::string error;
  EXPECT_EQ(ParseFaults(text, &error), faults);
  EXPECT_EQ(ParseFaults("none", &error), std::vector<Fault>{});
  for (const char* bad :
       {"1250", "x:node_crash", "1s:", "1s:a:b:c", "1s:a:b:1s:z", "-1s:a", "1s:a,"}) {
    error.clear();
    EXPECT_FALSE(ParseFaults(bad, &error)) << bad;
    EXPECT_NE(error.find("is not TIME:KIND"), std::string::npos) << error;
  }
  EXPECT_EQ(ReproduceCommand(17, {faults[0]}, "x"),
            "tests/run.sh sim --seed 17 --faults 1250ms:node_crash:n2 --bug x");
}

std::vector<Fault> Numbered(int n) {
  std::vector<Fault> faults;
  faults.reserve(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) faults.push_back({Milliseconds(i), "f", std::to_string(i), {}});
  return faults;
}

TEST(SimShrink, FindsTheFewFaultsThatMatter) {
  const std::vector<Fault> all = Numbered(64);
  const auto has = [](const std::vector<Fault>& faults, const char* name) {
    return std::any_of(faults.begin(), faults.end(),
                       [&](const Fault& f) { return f.target == name; });
  };
  const ShrinkResult result = Shrink(
      all, [&](const std::vector<Fault>& f) { return has(f, "3") && has(f, "40") && has(f, "41"); },
      1000);
  EXPECT_TRUE(result.minimal);
  EXPECT_EQ(result.faults, (std::vector<Fault>{all[3], all[40], all[41]}));
  EXPECT_LT(result.runs, 200U);
}

TEST(SimShrink, DropsEveryFaultWhenNoneIsNeededAndHonoursItsBudget) {
  const ShrinkResult none = Shrink(
      Numbered(10), [](const auto&) { return true; }, 100);
  EXPECT_TRUE(none.minimal);
  EXPECT_TRUE(none.faults.empty());
  EXPECT_EQ(none.runs, 1U);
  const ShrinkResult all = Shrink(
      Numbered(10), [](const auto& f) { return f.size() == 10; }, 5);
  EXPECT_FALSE(all.minimal);
  EXPECT_EQ(all.faults.size(), 10U);
  EXPECT_EQ(all.runs, 5U);
}

}  // namespace
}  // namespace everstep::sim
