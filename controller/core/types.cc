#include "controller/core/types.h"

#include <array>

#include "proto/base/check.h"

namespace everstep::controller {
namespace {

constexpr std::array<const char*, static_cast<std::size_t>(Reason::kCount)> kReasons = {
    "none",
    "submitted",
    "capacity_reached",
    "waiting_for_nodes",
    "completed",
    "cancelled",
    "join_timeout",
    "worker_exited",
    "worker_killed",
    "worker_out_of_memory",
    "worker_stopped",
    "group_not_formed",
    "spawn_failed",
    "node_lost",
    "node_died",
    "keeper_died",
    "node_returned",
    "prepare_timeout",
    "prepare_refused",
    "node_joined",
    "node_drained",
    "notice",
    "controller_restarted",
    "restarts_exhausted",
    "crash_at_start",
    "no_progress",
    "start_failures",
    "registered",
    "reattached",
    "stream_broken",
    "heartbeat_overdue",
    "undrained",
    "stale",
    "committed",
    "restored_from_local",
    "restored_from_peer",
    "no_common_step",
    "too_many_nodes",
    "heartbeat_resumed",
    "retention_over",
    "workers_linger",
    "persist_due",
    "last_breath",
    "operator_save",
    "persist_failed",
    "restored_from_files",
    "checksum_failed",
    "rolled_back",
    "quiet_steps",
    "operator_anomaly",

    "restored_by_ranges",
    "target_overwritten",
    "rebuilt_from_parity",
    "rebuild_timeout",
    "ledger_refuted",
    "input_refused"};
static_assert(kReasons.back() != nullptr, "every reason has a name");

}  // namespace

const char* ReasonName(Reason reason) {
  const auto i = static_cast<std::size_t>(reason);
  return i < kReasons.size() ? kReasons[i] : "unknown";
}

const char* NodeHealthName(NodeHealth health) {
  switch (health) {
    case NodeHealth::kAlive: return "ALIVE";
    case NodeHealth::kSuspect: return "SUSPECT";
    case NodeHealth::kLost: return "LOST";
  }
  return "UNKNOWN";
}

const char* JobStateName(JobState state) {
  switch (state) {
    case JobState::kWaiting: return "WAITING";
    case JobState::kPreparing: return "PREPARING";
    case JobState::kActivating: return "ACTIVATING";
    case JobState::kRunning: return "RUNNING";
    case JobState::kStopping: return "STOPPING";
    case JobState::kSucceeded: return "SUCCEEDED";
    case JobState::kFailed: return "FAILED";
    case JobState::kCancelled: return "CANCELLED";
  }
  return "UNKNOWN";
}

const char* PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kPrepare: return "prepare";
    case Phase::kActivate: return "activate";
    case Phase::kRun: return "run";
    case Phase::kEnded: return "ended";
  }
  return "unknown";
}

}  // namespace everstep::controller
