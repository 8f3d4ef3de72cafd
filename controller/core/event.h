// Everything that can happen to a controller. Shells turn messages, timers and requests into these.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "controller/core/types.h"
#include "proto/base/told.h"

namespace everstep::controller {

// Ties a request of the admin API to its Reply. Chosen by the shell, unique while in flight.
using RequestId = std::uint64_t;

// --- from agents; `incarnation` as the agent believes it (0 in NodeRegistered) ---

struct NodeRegistered {
  NodeId node;
  std::uint64_t session = 0;    // the shell's handle of the stream, echoed in the reply command
  std::uint64_t keeper_id = 0;  // hash of (boot id, pid namespace, keeper pid, keeper start time):
                                // equal across two registrations = nothing on the node was lost
  Incarnation previous_incarnation = 0;
  NodeFacts facts;
  std::vector<JobOnNode> jobs;
};
struct SessionClosed {
  NodeId node;
  Incarnation incarnation = 0;
  std::string evidence;  // "connection reset"
};
// The shell knows that the node's keeper process does not exist any more.
struct NodeProcessDead {
  NodeId node;
  Incarnation incarnation = 0;
  std::string evidence;  // "keeper pid 4711 is gone"
};
struct JobProgress {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;
  std::uint32_t running = 0;
};
struct Heartbeat {
  NodeId node;
  Incarnation incarnation = 0;
  std::uint64_t sequence = 0;
  Timestamp sent;  // the agent's clock: only differences between two beats of one agent are used
  std::vector<JobProgress> jobs;
};
struct Prepared {
  NodeId node;
  Incarnation incarnation = 0;
  JobOnNode holds;  // .job, .generation: which prepare this answers
  std::uint32_t store_port = 0;
  bool refused = false;
  std::string message;
};
struct Activated {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
  std::vector<WorkerOnNode> workers;
  bool failed = false;
  std::string message;
};
struct WorkerExited {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::int32_t local_rank = 0;
  std::int32_t pid = 0;
  ExitInfo exit;
};
struct WorkerStalled {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  StallKind kind = StallKind::kStopped;
  std::string evidence;
  Duration stalled = {};
};
struct ShardCopied {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  HeldShard shard;
};
// A copy that this node held fails its checksum: it holds it no longer.
struct ShardDamaged {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  HeldShard shard;
  std::int64_t chunk = 0;  // the first that fails; -1: the table of checksums itself
  std::string found_by;    // "scrub", "survey", "push"
};
// This node's part of a Persist command is on the disk, or cannot be.
struct Persisted {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;
  bool sealed = false;  // every rank's file is there: the manifest stands
  std::uint64_t bytes = 0;
  Duration took = {};
  std::string error;
  std::string missing;
};
struct Notice {
  NodeId node;
  Incarnation incarnation = 0;
  std::string source;
  Duration deadline = {};  // 0: unknown
};
struct NodeWarm {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  bool warm = false;
  std::string message;
};
struct KeeperLost {
  NodeId node;
  Incarnation incarnation = 0;
  std::uint64_t new_keeper_id = 0;
  std::string message;
};
struct Stopped {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
};

// A worker speaks. Words that are durable are acknowledged; all others are said again.
struct Told {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;  // of the worker
  Rank rank = 0;
  std::vector<ToldWord> words;  // sequences follow each other
};

// --- from people ---

struct SubmitJob {
  RequestId request = 0;
  JobSpec spec;
  std::string data_key;  // random, made by the shell
};
struct CancelJob {
  RequestId request = 0;
  JobId job;
  std::string reason;
  bool forget = false;  // of a job that has ended: its record and its memory are given up
};
struct DrainNode {
  RequestId request = 0;
  NodeId node;
  std::string reason;
  bool allow_pause = false;
};
struct UndrainNode {
  RequestId request = 0;
  NodeId node;
};
// Answered when the newest committed step stands in the job's checkpoint directory.
struct SaveCheckpoint {
  RequestId request = 0;
  JobId job;
};

// The job goes back to a step, and never again beyond it to what was captured before.
struct RollBack {
  RequestId request = 0;
  JobId job;
  Step step = kNoStep;  // kNoStep: the newest verified one
};
// Something is wrong with the training: nothing is verified until enough quiet steps have passed.
struct ReportAnomaly {
  RequestId request = 0;
  JobId job;
  std::string why;
};

struct Tick {};  // NextWakeup() has come

using Event =
    std::variant<NodeRegistered, SessionClosed, NodeProcessDead, Heartbeat, Prepared, Activated,
                 WorkerExited, WorkerStalled, ShardCopied, ShardDamaged, Persisted, Notice,
                 NodeWarm, KeeperLost, Stopped, Told, SubmitJob, CancelJob, DrainNode, UndrainNode,
                 SaveCheckpoint, RollBack, ReportAnomaly, Tick>;

}  // namespace everstep::controller
