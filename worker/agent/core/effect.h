// What an agent's core wants done. The shell carries effects out in order and reports the outcome
// of each asynchronous one as an event; a failure is an outcome.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "worker/agent/core/event.h"

namespace everstep::agent {

// --- to the controller; the shell stamps the registration's incarnation ---

// First message of a stream. The shell adds what it knows of the node, and each job's shards as
// they lie in memory at this moment.
struct SendRegister {
  Incarnation previous = 0;
  std::vector<JobOnNode> jobs;
};
struct JobProgress {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;
  std::uint32_t running = 0;
};
struct SendHeartbeat {
  std::uint64_t sequence = 0;
  Timestamp sent;
  Duration interval = {};
  std::vector<JobProgress> jobs;
};
struct SendPrepared {
  JobOnNode holds;  // .job, .generation: which prepare this answers
  std::uint32_t store_port = 0;
  bool refused = false;
  std::string message;
};
struct SendActivated {
  JobId job;
  Generation generation = 0;
  std::vector<WorkerOnNode> workers;
  bool failed = false;
  std::string message;
};
struct SendWorkerExited {
  JobId job;
  Generation generation = 0;
  WorkerOnNode worker;
};
struct SendWorkerStalled {
  WorkerStalled stalled;
};
struct SendShardCopied {
  JobId job;
  HeldShard shard;
};
struct SendShardDamaged {
  ShardDamaged damaged;
};
struct SendPersisted {
  Persisted persisted;
};
struct SendTold {
  WorkerTold told;
};
struct SendNotice {
  Notice notice;
};
struct SendNodeWarm {
  JobId job;
  bool warm = false;
  std::string message;
};
struct SendKeeperLost {
  std::string message;  // the shell adds the new keeper's identity
};
struct SendStopped {
  JobId job;
  Generation generation = 0;
};
// Ends the stream; a new one is opened with the usual backoff.
struct CloseSession {
  std::string why;
};

// --- to the keeper ---

struct StartForkServer {
  JobId job;
  CommandSpec command;
};
// -> StoreReady or StoreFailed
struct StartStore {
  JobId job;
  Generation generation = 0;
  CommandSpec command;
};
// Begins the restores this node's part of the plan names, forks the workers and sends captured
// slots to the plan's replica node from now on. -> WorkerStarted or WorkerStartFailed for each
// worker.
struct StartWorkers {
  Activate activate;
};
// Every process of generations up to `generation`: SIGTERM, `grace`, SIGKILL. -> WorkerExited each.
// With `park` (0: nobody) those that can are parked within that time instead, else killed;
// `planned`: they may end their step before. -> WorkerParked.
struct KillWorkers {
  JobId job;
  Generation generation = 0;
  Duration grace = {};
  bool stores = false;  // store hosts of those generations too
  Duration park = {};
  bool planned = false;
};
// The worker is told that its words up to `sequence` are durable.
struct TellWorker {
  ToldAck ack;
};
// A drill's real signal.
struct KillRank {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::int32_t signal = 0;
};
// The job is over on this node: exits, fork server, stores, arenas, memory.
struct ForgetJob {
  JobId job;
};
// What a restarted agent has to know: kept in the keeper's memory.
struct RememberIncarnation {
  Incarnation incarnation = 0;
};
struct RememberPrepared {
  JobId job;
  Generation generation = 0;
  CommandSpec command;
  std::string data_key;
};
struct RememberActivated {
  Activate activate;
};

// --- to the checkpoint plane and the logs ---

// -> Surveyed
struct Survey {
  JobId job;
  Generation generation = 0;
  CommandSpec command;
  std::vector<Cut> given_up = {};  // files beyond are marked and not told of
};
// -> ShardCopied when it is whole again; else nothing: whoever finds it damaged says so again.
struct MendShard {
  JobId job;
  HeldShard shard;
  NodeId source_node;
  std::string source_address;
};
// -> ShardCopied when it is there; tried again until the job is at a newer generation.
struct MakeShard {
  JobId job;
  Generation generation = 0;
  ShardBuild build;
};
struct MarkCommitted {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;      // kNoStep: none yet
  Step released = kNoStep;  // slots of other steps up to this one may be overwritten
};
// Writes these ranks' shards into the job's checkpoint directory. -> Persisted, whatever becomes of
// the job meanwhile.
struct PersistStep {
  JobId job;
  CommandSpec command;
  Generation generation = 0;
  Step step = kNoStep;
  std::vector<Rank> ranks;
  Cut verified = {};
};
// Whether commits can be had: set in the arenas' headers, so that trainers need not wait for one.
struct ControllerAway {
  bool away = false;
};
struct Tail {
  TailLogs request;
  Generation generation = 0;
  std::vector<WorkerOnNode> workers;  // whose files; empty: none here, the answer is an end
};
// A message died at the door; the shell logs it.
struct Dropped {
  std::string what;
  std::string why;
};

using Effect =
    std::variant<SendRegister, SendHeartbeat, SendPrepared, SendActivated, SendWorkerExited,
                 SendWorkerStalled, SendShardCopied, SendShardDamaged, SendPersisted, SendTold,
                 SendNotice, SendNodeWarm, SendKeeperLost, SendStopped, CloseSession,
                 StartForkServer, StartStore, StartWorkers, KillWorkers, TellWorker, KillRank,
                 ForgetJob, RememberIncarnation, RememberPrepared, RememberActivated, Survey,
                 MendShard, MakeShard, MarkCommitted, PersistStep, ControllerAway, Tail, Dropped>;
using Effects = std::vector<Effect>;

}  // namespace everstep::agent
