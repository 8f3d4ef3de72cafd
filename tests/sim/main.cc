// everstep_sim: runs simulated worlds and says which of them broke a truth.
//
//   everstep_sim --seeds 2000 [--from 1] [--bug NAME] [--jobs N]   worlds 1 to 2000
//   everstep_sim --seed 17 [--faults LIST] [--verbose|--trace]     one world, its story
//
// Exit codes: 0 every truth held; 1 a truth was broken; 2 wrong usage.
#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "controller/core/bugs.h"
#include "tests/sim/kernel/shrink.h"
#include "tests/sim/world/world.h"

namespace everstep::sim {
namespace {

struct Bug {
  const char* name;
  std::uint32_t bit;
};
constexpr Bug kBugs[] = {{"missing_fence", controller::kBugMissingFence},
                         {"unsynced_batch", controller::kBugUnsyncedBatch},
                         {"premature_commit", controller::kBugPrematureCommit},
                         {"double_activation", controller::kBugDoubleActivation},
                         {"lost_wakeup", controller::kBugLostWakeup}};

constexpr const char* kUsage =
    R"(everstep_sim: the production cores in simulated worlds, one for each seed.

  everstep_sim --seeds N [--from S] [--bug NAME] [--jobs N]
  everstep_sim --seed S [--faults LIST] [--bug NAME] [--verbose | --trace]

  --seeds N       run N worlds (default 1000)
  --from S        ... with seeds from S on (default 1)
  --jobs N        ... on N threads (default: one for each processor)
  --keep-going    ... and do not stop at the first failure
  --seed S        run one world
  --faults LIST   with these faults instead of those the seed draws: TIME:KIND[:TARGET[:LASTS]],...; none
  --no-shrink     print a failing world's faults as they were drawn
  --bug NAME      switch a seeded bug on: missing_fence unsynced_batch premature_commit double_activation lost_wakeup
  --verbose       tell the story of the world; --trace: with each event
  --stats         say what the worlds reached

Exit codes: 0 every truth held, 1 a truth was broken, 2 wrong usage.
)";

struct Arguments {
  std::optional<std::uint64_t> seed;
  std::uint64_t seeds = 1000;
  std::uint64_t from = 1;
  unsigned jobs = std::max(1U, std::thread::hardware_concurrency());
  std::optional<std::vector<Fault>> faults;
  std::string bug;
  std::uint32_t bugs = 0;
  bool verbose = false, trace = false, keep_going = false, shrink = true, stats = false;
};

int Fail(const std::string& message) {
  fmt::print(stderr, "error: {}\nsee everstep_sim --help\n", message);
  return 2;
}

// 0: go on; else the exit code plus one (help is success).
int Parse(int argc, char** argv, Arguments* out) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto has_value = [&] { return i + 1 < argc; };
    const auto number = [&](std::uint64_t* value) {
      if (!has_value()) return false;
      const char* text = argv[++i];
      const auto [end, error] = std::from_chars(text, text + std::strlen(text), *value);
      return error == std::errc() && *end == '\0';
    };
    std::uint64_t n = 0;
    if (flag == "--help" || flag == "-h") {
      fmt::print("{}", kUsage);
      return 1;
    } else if (flag == "--seed") {
      if (!number(&n)) return Fail("--seed wants a number") + 1;
      out->seed = n;
    } else if (flag == "--seeds") {
      if (!number(&out->seeds)) return Fail("--seeds wants a number") + 1;
    } else if (flag == "--from") {
      if (!number(&out->from)) return Fail("--from wants a number") + 1;
    } else if (flag == "--jobs") {
      if (!number(&n) || n == 0 || n > 256) return Fail("--jobs wants a number from 1 to 256") + 1;
      out->jobs = static_cast<unsigned>(n);
    } else if (flag == "--faults") {
      if (!has_value()) return Fail("--faults wants a list") + 1;
      std::string error;
      out->faults = ParseFaults(argv[++i], &error);
      if (!out->faults) return Fail(error) + 1;
      for (const Fault& fault : *out->faults) {
        const auto& kinds = FaultKinds();
        if (std::find(kinds.begin(), kinds.end(), fault.kind) == kinds.end()) {
          return Fail(fmt::format("no fault is called '{}'; there are: {}", fault.kind,
                                  fmt::join(kinds, " "))) +
                 1;
        }
      }
    } else if (flag == "--bug") {
      if (!has_value()) return Fail("--bug wants a name") + 1;
      out->bug = argv[++i];
      for (const Bug& bug : kBugs) {
        if (out->bug == bug.name) out->bugs = bug.bit;
      }
      if (out->bugs == 0) return Fail(fmt::format("no seeded bug is called '{}'", out->bug)) + 1;
    } else if (flag == "--verbose") {
      out->verbose = true;
    } else if (flag == "--trace") {
      out->verbose = out->trace = true;
    } else if (flag == "--keep-going") {
      out->keep_going = true;
    } else if (flag == "--no-shrink") {
      out->shrink = false;
    } else if (flag == "--stats") {
      out->stats = true;
    } else {
      return Fail(fmt::format("unknown argument '{}'", flag)) + 1;
    }
  }
  return 0;
}

void Tell(Timestamp now, const std::string& line) {
  fmt::print("{:10.3f} s  {}\n", static_cast<double>(now.ns) / 1e9, line);
}

// What failed, the command that shows it again, and the few faults it takes.
void Report(const Arguments& args, std::uint64_t seed, const std::vector<Fault>& faults,
            const RunResult& result) {
  fmt::print("FAILED seed {}: {}\n", seed, result.violations.front());
  fmt::print("  replay: {}\n", ReproduceCommand(seed, faults, args.bug));
  if (!args.shrink || faults.empty()) return;
  const std::string rule = result.violations.front().substr(0, result.violations.front().find(':'));
  const WorldOptions options = DrawWorld(seed, args.bugs);
  const ShrinkResult small = Shrink(
      faults,
      [&](const std::vector<Fault>& fewer) {
        const RunResult run = RunWorld(options, fewer);
        return !run.ok() && run.violations.front().starts_with(rule + ":");
      },
      300);
  fmt::print("  shrunk: {}   ({} of {} faults, {} runs{})\n",
             ReproduceCommand(seed, small.faults, args.bug), small.faults.size(), faults.size(),
             small.runs, small.minimal ? "" : ", budget spent");
}

int RunOne(const Arguments& args) {
  const WorldOptions options = DrawWorld(*args.seed, args.bugs);
  const std::vector<Fault> faults = args.faults ? *args.faults : DrawFaults(options);
  if (args.verbose) fmt::print("{}\n", Describe(options));
  const RunResult result =
      RunWorld(options, faults, args.verbose ? Storyteller(Tell) : Storyteller(), args.trace);
  fmt::print("seed {}: {} in {:.1f} virtual seconds, {} events, digest {:016x}\n", *args.seed,
             result.ok() ? "clean" : "FAILED", result.virtual_seconds, result.events,
             result.digest);
  if (args.stats) {
    for (const auto& [what, count] : result.counts) fmt::print("  {:>9} {}\n", count, what);
  }
  if (result.ok()) return 0;
  if (args.faults) {
    fmt::print("FAILED seed {}: {}\n", *args.seed, result.violations.front());
  } else {
    Report(args, *args.seed, faults, result);
  }
  return 1;
}

int RunMany(const Arguments& args) {
  const auto began = std::chrono::steady_clock::now();
  std::atomic<std::uint64_t> next{args.from};
  std::atomic<bool> stop{false};
  std::mutex mutex;  // guards what follows
  std::map<std::uint64_t, RunResult> failures;
  std::map<std::string, std::uint64_t> counts;
  std::uint64_t done = 0, events = 0, digests = 0;
  const std::uint64_t end = args.from + args.seeds;
  const auto work = [&] {
    while (!stop) {
      const std::uint64_t seed = next++;
      if (seed >= end) return;
      const WorldOptions options = DrawWorld(seed, args.bugs);
      RunResult result = RunWorld(options, DrawFaults(options));
      const std::lock_guard<std::mutex> lock(mutex);
      ++done;
      events += result.events;
      digests ^= result.digest;  // the order of threads does not show
      for (const auto& [what, count] : result.counts) counts[what] += count;
      if (result.ok()) continue;
      if (!args.keep_going) stop = true;
      failures.emplace(seed, std::move(result));
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < args.jobs; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  const double processor_seconds = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  if (args.stats) {
    for (const auto& [what, count] : counts) fmt::print("{:>12} {}\n", count, what);
  }
  int told = 0;
  for (const auto& [seed, result] : failures) {
    if (++told > 10) {
      fmt::print("FAILED seed {}: {}\n", seed, result.violations.front());
      continue;
    }
    Report(args, seed, DrawFaults(DrawWorld(seed, args.bugs)), result);
  }
  fmt::print(
      "{} worlds from seed {}: {} failed; {} events in {:.1f} s on {} threads, {:.0f} worlds a "
      "minute "
      "of processor time, digest {:016x}\n",
      done, args.from, failures.size(), events, seconds, args.jobs,
      static_cast<double>(done) / processor_seconds * 60, digests);
  return failures.empty() ? 0 : 1;
}

}  // namespace
}  // namespace everstep::sim

int main(int argc, char** argv) {
  everstep::sim::Arguments args;
  if (const int code = everstep::sim::Parse(argc, argv, &args); code != 0) return code - 1;
  return args.seed ? everstep::sim::RunOne(args) : everstep::sim::RunMany(args);
}
