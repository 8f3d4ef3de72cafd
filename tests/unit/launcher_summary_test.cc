// The summary names the first failure, what was done, and what the exit code asks for.
#include "worker/launcher/summary.h"

#include <gtest/gtest.h>

#include "worker/launcher/error_file.h"
#include "worker/launcher/exit_codes.h"

namespace everstep::launcher {
namespace {

WorkerFailure Killed() {
  return {
      .rank = 3, .local_rank = 1, .node = "n2", .pid = 4711, .exit_code = -9, .time = "12:00:00"};
}

bool Has(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

TEST(LauncherSummary, ASuccessWithoutFaultsIsSilent) {
  EXPECT_EQ(FormatSummary({.job = "j", .script = "t.py", .state = "SUCCEEDED"}), "");
}

TEST(LauncherSummary, TheRootCauseIsInTorchrunsLayout) {
  RunOutcome o{.job = "j",
               .script = "train.py",
               .state = "FAILED",
               .reason = "restarts_exhausted",
               .message = "rank 3 on n2 was killed",
               .exit_code = kExitFailed,
               .restarts = 2,
               .max_restarts = 2,
               .best_step = 41,
               .logs = "/logs/j"};
  o.failures = {Killed()};
  EXPECT_EQ(FormatSummary(o),
            "=====================================================\n"
            "train.py FAILED\n"
            "-----------------------------------------------------\n"
            "Failures:\n"
            "  <NO_OTHER_FAILURES>\n"
            "-----------------------------------------------------\n"
            "Root Cause (first observed failure):\n"
            "[0]:\n"
            "  time      : 12:00:00\n"
            "  host      : n2\n"
            "  rank      : 3 (local_rank: 1)\n"
            "  exitcode  : -9 (pid: 4711)  (SIGKILL)\n"
            "  error_file: <N/A>\n"
            "  traceback : Signal 9 (SIGKILL) received by PID 4711\n"
            "=====================================================\n"
            "everstep: job j FAILED (restarts_exhausted): rank 3 on n2 was killed\n"
            "everstep: 2 of 2 restarts used, best step 41, logs: /logs/j\n"
            "everstep: exit code 1: a worker failed and its restarts are spent, or the run was "
            "cancelled; see the root cause, correct the script, run again\n");
}

TEST(LauncherSummary, FaultsThatWereSurvivedAreTold) {
  RunOutcome o{.job = "j",
               .script = "t.py",
               .state = "SUCCEEDED",
               .lost_capacity = 1,
               .seconds_lost = 0.314};
  o.faults = {{.reason = "worker_killed",
               .subject = "rank 1 on n1",
               .action = "restart in place",
               .recovery_seconds = 0.314,
               .steps_lost = 1}};
  EXPECT_EQ(
      FormatSummary(o),
      "everstep: 1 fault in this run (0 restarts charged to the script, 1 not); "
      "0.31 s lost, 1 step\n"
      "everstep:   rank 1 on n1: worker_killed; restart in place; recovered in 0.31 s, 1 steps "
      "lost\n");
}

TEST(LauncherSummary, LongListsAreCutAndCounted) {
  RunOutcome o{.job = "j", .script = "t.py", .state = "FAILED", .exit_code = kExitNoProgress};
  o.failures.assign(kMaxListed + 5, Killed());
  o.faults.assign(kMaxListed + 2, FaultLine{.reason = "node_lost", .subject = "node n3"});
  const std::string text = FormatSummary(o);
  EXPECT_TRUE(Has(text, "  and 5 more\n"));
  EXPECT_TRUE(Has(text, "2 earlier ones are not listed"));
  EXPECT_TRUE(Has(text, "exit code 93"));
  EXPECT_TRUE(Has(text, "do not requeue"));
}

TEST(LauncherSummary, TheTracebackComesFromTheErrorFile) {
  WorkerFailure f{.rank = 0, .exit_code = 1};
  f.error_json = R"({"message":{"message":"ValueError: boom","extraInfo":{"py_callstack":
    "Traceback\n  boom","timestamp":"1"}}})";
  EXPECT_EQ(FailureMessage(f), "Traceback\n  boom");
  f.error_json = R"({"message":{"message":"ValueError: boom"}})";
  EXPECT_EQ(FailureMessage(f), "ValueError: boom");
  f.error_json = R"({"message":"plain"})";
  EXPECT_EQ(FailureMessage(f), "plain");
}

TEST(LauncherSummary, AnythingMayStandInAnErrorFile) {
  for (const char* json : {"", "{", "[]", "{\"message\":7}", "{\"message\":{\"extraInfo\":[]}}",
                           "\xff\xfe", "{\"message\":{\"message\":null}}"}) {
    EXPECT_EQ(TextOfErrorFile(json), "") << json;
  }
}

TEST(LauncherSummary, CapacityIsToBeSubmittedAgain) {
  const std::string text = FormatSummary({.job = "j",
                                          .script = "t.py",
                                          .state = "FAILED",
                                          .reason = "join_timeout",
                                          .exit_code = kExitCapacity});
  EXPECT_TRUE(Has(text, "exit code 75: too few nodes"));
  EXPECT_TRUE(Has(text, "submit it again"));
  EXPECT_FALSE(Has(text, "Root Cause"));
}

}  // namespace
}  // namespace everstep::launcher
