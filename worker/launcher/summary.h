// The last words of a run on the console: which worker failed first and why, in torchrun's layout
// (tools grep it), then what Everstep did about the faults of the run and what the exit code means.
//
// Pure: facts in, text out. Thread-safe: no state.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::launcher {

// One worker that ended badly.
struct WorkerFailure {
  Rank rank = 0;
  std::int32_t local_rank = 0;
  NodeId node;
  std::int32_t pid = 0;
  std::int32_t exit_code = 0;  // or -signal
  std::string time;            // as it is to be printed
  std::string error_file;      // empty: the worker wrote none
  std::string error_json;      // its content; empty: none
};

// One fault that was recovered from, or was the last.
struct FaultLine {
  std::string reason;            // "worker_killed"
  std::string subject;           // "rank 1 on n2"
  std::string action;            // "restart in place"; empty: none was taken
  double recovery_seconds = -1;  // -1: never recovered
  std::int64_t steps_lost = -1;  // -1: unknown
};

struct RunOutcome {
  JobId job;
  std::string script;
  std::string state;    // "SUCCEEDED", "FAILED", "CANCELLED"
  std::string reason;   // "restarts_exhausted"
  std::string message;  // the controller's sentence
  std::int32_t exit_code = 0;
  std::uint32_t restarts = 0;  // charged to the script
  std::int32_t max_restarts = 0;
  std::uint32_t lost_capacity = 0;  // restarts not charged to it
  Step best_step = kNoStep;
  double seconds_lost = 0;              // in recoveries, all faults together
  std::string logs;                     // their directory, or the command that shows them
  std::vector<WorkerFailure> failures;  // the first is the root cause
  std::vector<FaultLine> faults;        // oldest first
};

// At most this many failures and faults are listed; the rest is counted.
inline constexpr std::size_t kMaxListed = 16;

// What a worker's error file tells: the Python traceback if there is one, else the message. When
// the file is empty or not torch's JSON: the signal by name, or how to get a traceback.
std::string FailureMessage(const WorkerFailure& failure);

// Whole text, with its last newline. Empty when the run succeeded without a fault: silence is good
// news.
std::string FormatSummary(const RunOutcome& outcome);

}  // namespace everstep::launcher
