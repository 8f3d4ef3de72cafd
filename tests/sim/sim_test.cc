// The simulator's own tests: determinism, replay, shrinking, and that it finds the bugs it is there
// for.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <utility>

#include "controller/core/bugs.h"
#include "tests/sim/kernel/shrink.h"
#include "tests/sim/world/world.h"

namespace everstep::sim {
namespace {

RunResult RunSeed(std::uint64_t seed, std::uint32_t bugs = 0) {
  const WorldOptions options = DrawWorld(seed, bugs);
  return RunWorld(options, DrawFaults(options));
}

TEST(Simulator, SameSeedSameRun) {
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    const RunResult once = RunSeed(seed);
    const RunResult again = RunSeed(seed);
    ASSERT_EQ(once.digest, again.digest) << "seed " << seed;
    ASSERT_EQ(once.events, again.events) << "seed " << seed;
    ASSERT_EQ(once.counts, again.counts) << "seed " << seed;
    ASSERT_NE(once.digest, RunSeed(seed + 1000).digest) << "seed " << seed;
  }
}

std::string Output(const std::string& command) {
  std::string text;
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return text;
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) text.append(buffer, n);
  pclose(pipe);
  return text;
}

TEST(Simulator, SameSeedSameDigestInAnotherProcess) {
  const std::string program = EVERSTEP_BINARY_DIR "/tests/everstep_sim";
  for (const char* arguments : {" --seed 7", " --seed 8 --faults 9s:node_crash:n1:2s"}) {
    const std::string once = Output(program + arguments);
    EXPECT_NE(once.find("digest"), std::string::npos) << once;
    EXPECT_EQ(once, Output(program + arguments));
  }
}

TEST(Simulator, FaultsAreReplayedFromTheirText) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    const WorldOptions options = DrawWorld(seed, 0);
    const std::vector<Fault> faults = DrawFaults(options);
    std::string error;
    const auto parsed = ParseFaults(FormatFaults(faults), &error);
    ASSERT_TRUE(parsed) << error;
    ASSERT_EQ(*parsed, faults);
    ASSERT_EQ(RunWorld(options, *parsed).digest, RunSeed(seed).digest);
  }
}

// A simulator that injects nothing finds nothing.
TEST(Simulator, WorldsReachWhatTheyAreThereFor) {
  std::map<std::string, std::uint64_t> counts;
  for (std::uint64_t seed = 1; seed <= 600; ++seed) {
    for (const auto& [what, count] : RunSeed(seed).counts) counts[what] += count;
  }
  for (const std::string& kind : FaultKinds()) EXPECT_GT(counts["fault " + kind], 0u) << kind;
  for (const char* what : {"groups formed",
                           "groups finished",
                           "steps",
                           "captures",
                           "captures skipped",
                           "commits",
                           "committed steps lost with all copies of a shard",
                           "controller starts",
                           "late commands",
                           "stale commands",
                           "lost: node_lost",
                           "lost: node_died",
                           "lost: node_returned",
                           "lost: prepare_timeout",
                           "restores failed",
                           "slots corrupted",
                           "slots mended",
                           "rolled back",
                           "syncs failed",
                           "ranks planned behind a taker",
                           "shards passed on",
                           "shards from another holder",
                           "lines acknowledged",
                           "ledgers with lines taken back",
                           "ledgers with lines told again",
                           "ledgers that were true"}) {
    EXPECT_GT(counts[what], 0u) << what;
  }
}

struct Seeded {
  const char* name;
  std::uint32_t bug;
};
class SeededBug : public ::testing::TestWithParam<Seeded> {};

TEST_P(SeededBug, IsFoundWithin2000Seeds) {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    const WorldOptions options = DrawWorld(seed, GetParam().bug);
    const std::vector<Fault> faults = DrawFaults(options);
    const RunResult result = RunWorld(options, faults);
    if (result.ok()) continue;
    ASSERT_TRUE(RunSeed(seed).ok()) << "seed " << seed << " fails without the bug, too";
    // The shrunk list shows it again, and is no longer than what was drawn.
    const auto fails = [&](const std::vector<Fault>& fewer) {
      return !RunWorld(options, fewer).ok();
    };
    const ShrinkResult small = Shrink(faults, fails, 200);
    EXPECT_TRUE(fails(small.faults));
    EXPECT_LE(small.faults.size(), faults.size());
    RecordProperty("seed", static_cast<int>(seed));
    std::printf("%s: seed %llu: %s\n", GetParam().name, static_cast<unsigned long long>(seed),
                result.violations.front().c_str());
    return;
  }
  FAIL() << "2000 worlds and the bug was not seen";
}

INSTANTIATE_TEST_SUITE_P(
    Bugs, SeededBug,
    ::testing::Values(Seeded{"missing_fence", controller::kBugMissingFence},
                      Seeded{"unsynced_batch", controller::kBugUnsyncedBatch},
                      Seeded{"premature_commit", controller::kBugPrematureCommit},
                      Seeded{"double_activation", controller::kBugDoubleActivation},
                      Seeded{"lost_wakeup", controller::kBugLostWakeup}),
    [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace everstep::sim
