// The vocabulary of the controller's core: specs, states, reasons. Plain values, no behaviour
// beyond naming. What the agents speak of too stands in proto/base/plan.h. The record format in
// proto/ mirrors these one to one; controller/store/convert.cc is the only place that knows both.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/plan.h"
#include "proto/base/time.h"

namespace everstep::controller {

// Why a decision was taken. The same code stands in the log, `events`, `job show`, metrics and the
// run's summary; ReasonName gives the one spelling (docs/reference/events.md lists them).
enum class Reason : std::uint8_t {
  kNone = 0,
  // a job's progress through its life
  kSubmitted,        // the job was handed in
  kCapacityReached,  // enough nodes: the first generation may form
  kWaitingForNodes,  // fewer nodes than min_nodes
  kCompleted,        // every worker exited 0
  kCancelled,        // an operator or the launcher asked
  kJoinTimeout,      // fewer nodes than min_nodes for longer than join_timeout
  // faults
  kWorkerExited,       // a worker ended with an exit code other than 0
  kWorkerKilled,       // a worker was ended by a signal that neither it nor Everstep sent
  kWorkerOutOfMemory,  // the kernel's memory killer took it
  kWorkerStopped,      // process state T (SIGSTOP)
  kGroupNotFormed,     // workers run, their process group never formed
  kSpawnFailed,        // the agent could not start a worker
  kNodeLost,           // lease expired
  kNodeDied,           // its processes are known dead
  kKeeperDied,         // the keeper and its workers are gone, the agent lives
  kNodeReturned,       // a node came back with nothing (new keeper)
  kPrepareTimeout,     // a node did not finish prepare or activate in time
  kPrepareRefused,     // a node said it cannot take part
  // planned changes
  kNodeJoined,           // capacity grew
  kNodeDrained,          // an operator drains the node
  kNotice,               // the node said it will go away
  kControllerRestarted,  // recovery found the job in the middle of a switch
  // ends
  kRestartsExhausted,  // the script failed more often than max_restarts
  kCrashAtStart,       // ... and never got past its start
  kNoProgress,         // generations end one after the other without a step of progress
  kStartFailures,      // the process group never formed, too often
  // nodes
  kRegistered,
  kReattached,        // an agent or the controller restarted, nothing was lost
  kStreamBroken,      // suspect
  kHeartbeatOverdue,  // suspect
  kUndrained,
  kStale,  // a message of an old generation or incarnation was dropped
  // checkpoints
  kCommitted,
  kRestoredFromLocal,
  kRestoredFromPeer,
  kNoCommonStep,  // no step is complete: starts from nothing (or the script's own file)
  // added later: numbers are stored
  kTooManyNodes,       // the controller's limit
  kHeartbeatResumed,   // a suspect node is heard again
  kRetentionOver,      // what a failed job captured was kept long enough
  kWorkersLinger,      // workers go on long after their peers' good end
  kPersistDue,         // the job's interval for its checkpoint directory is over
  kLastBreath,         // what the memory holds is written before it may go
  kOperatorSave,       // an operator asked for a checkpoint
  kPersistFailed,      // a step could not be written to the checkpoint directory
  kRestoredFromFiles,  // ranks start from files in the checkpoint directory
  kChecksumFailed,     // a copy in a node's memory failed its checksum
  kRolledBack,         // an operator sent the job back to a step
  kQuietSteps,         // enough steps followed in which nothing strange was reported
  kOperatorAnomaly,    // an operator reported an anomaly of the training
  kRestoredByRanges,   // another world, or shares: each rank takes its bytes from all shards
  kTargetOverwritten,  // the step of a roll-back is gone, nothing older is left: it is undone
  kRebuiltFromParity,  // shards whose every copy was lost are made anew out of parities
  kRebuildTimeout,     // ... which took too long: an older step is taken
  kLedgerRefuted,      // what a job told does not show each (step, microbatch) to be in once
  kInputRefused,       // a worker refused what it was given, and said why: no restart helps
  kCount
};
const char* ReasonName(Reason reason);  // "worker_killed"

enum class NodeHealth : std::uint8_t { kAlive, kSuspect, kLost };
enum class JobState : std::uint8_t {
  kWaiting,     // not enough nodes
  kPreparing,   // generation g: old workers are being stopped, holdings reported
  kActivating,  // plan of g persisted, workers are being forked
  kRunning,
  kStopping,  // terminal outcome decided, nodes clean up
  kSucceeded,
  kFailed,
  kCancelled
};
enum class Phase : std::uint8_t { kPrepare, kActivate, kRun, kEnded };
const char* NodeHealthName(NodeHealth health);  // "ALIVE"
const char* JobStateName(JobState state);       // "RUNNING"
const char* PhaseName(Phase phase);             // "prepare"
// A generation is being prepared, being started or running.
inline bool Switches(JobState s) {
  return s == JobState::kPreparing || s == JobState::kActivating || s == JobState::kRunning;
}
inline bool IsTerminal(JobState s) {
  return s >= JobState::kSucceeded;
}

inline constexpr std::uint32_t kDefaultCopies = 2;

struct JobSpec {
  JobId job;
  std::uint32_t min_nodes = 1;
  std::uint32_t max_nodes = 1;
  std::uint32_t nproc_per_node = 1;
  std::uint32_t spares = 0;         // warm nodes held back beyond max_nodes
  std::int32_t max_restarts = 0;    // charged to the script's own failures
  bool strict_restarts = false;     // every worker failure is charged, whatever killed it
  Duration join_timeout = {};       // WAITING for this long ends the job; 0: for ever
  Duration last_call = Seconds(1);  // the first generation waits this long for more than min_nodes
  std::uint32_t max_no_progress = 5;  // consecutive generations without progress
  std::uint32_t max_start_failures = 5;
  std::uint32_t master_port = 0;       // 0: the store host's port of the generation
  std::vector<NodeId> only_nodes;      // empty: any
  std::string ckpt_dir;                // file tier; empty: none
  std::uint64_t ckpt_every_steps = 0;  // each such step goes there; 0: by time
  Duration ckpt_every = {};            // the newest step goes there this often; 0: not by time
  std::uint32_t copies =
      0;  // of each rank's state in memory, its own among them; 0: kDefaultCopies
  // k of xor(k+1) and rs(k+r): states that share a parity, of which there are copies - 1. Below 2:
  // kept by copies.
  std::uint32_t parity_states = 0;
  std::uint32_t verify_after = 0;  // quiet steps that make a checkpoint a verified one; 0: never
  Timestamp submitted;
  CommandSpec command;
  friend bool operator==(const JobSpec&, const JobSpec&) = default;
};

struct NodeFacts {
  std::string address;
  std::uint32_t data_port = 0;
  std::uint32_t slots = 0;
  std::map<std::string, std::string> labels;
  friend bool operator==(const NodeFacts&, const NodeFacts&) = default;
};

// --- the plan of a generation ---

struct GenerationPlan {
  JobId job;
  Generation generation = 0;
  Phase phase = Phase::kPrepare;
  std::vector<NodePlan>
      nodes;  // by group rank; in kPrepare only node, group_rank, address, data_port
  std::string master_addr;
  std::uint32_t master_port = 0;
  std::uint32_t restart_count = 0;
  Step restore_step = kNoStep;
  ParityPlan parity;  // of what this generation captures
  RestoreCut cut;     // of restores by ranges: the world or its layout is another one
  Reason reason = Reason::kNone;
  std::string evidence;
  friend bool operator==(const GenerationPlan&, const GenerationPlan&) = default;
};

// One fault and its recovery.
struct Fault {
  std::uint64_t id = 0;
  Reason reason = Reason::kNone;
  std::string subject;   // "rank 1 on n2", "node n3"
  std::string evidence;  // "signal=9 pid=4711 ran_ms=5312"
  std::string action;    // "restart in place", "spare n4 takes over", "shrink to 2 nodes", ...
  Timestamp detected;
  Timestamp occurred;   // ns == 0: unknown
  Timestamp recovered;  // ns == 0: not yet
  Generation generation_before = 0;
  Generation generation_after = 0;
  Step step_before = kNoStep;
  Step step_after = kNoStep;
  friend bool operator==(const Fault&, const Fault&) = default;
};

struct Commit {
  Generation generation = 0;
  Step step = kNoStep;
  std::int32_t world_size = 0;
  std::uint32_t copies = 0;
  bool replicated_layout = false;
  std::vector<HeldShard> shards;    // one per rank, by rank
  ParityPlan parity;                // of the parities
  std::vector<HeldShard> parities;  // one per rank and parity, by rank; empty: kept by copies
  friend bool operator==(const Commit&, const Commit&) = default;
};

}  // namespace everstep::controller
