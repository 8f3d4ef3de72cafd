// Everything that can happen to an agent. The shell turns the controller's messages, the keeper's
// events and timers into these; the core never sees a socket.
//
// The values of plans, exits and shards are those the controller speaks of (proto/base/plan.h).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/plan.h"
#include "proto/base/time.h"

namespace everstep::agent {

// --- the session with the controller ---

// A stream is up; nothing was said on it yet.
struct SessionOpened {};
struct SessionLost {
  std::string why;
};

// Every command carries the registration it is meant for, and its number within it.
struct Header {
  Incarnation incarnation = 0;
  std::uint64_t sequence = 0;
};
struct Registered {
  Header header;
  Duration heartbeat_interval = {};
  Duration lease = {};
  std::vector<JobId> known_jobs;  // whatever else is held here is cleaned up
};
// A heartbeat was taken in. Nothing follows from it but that the controller is there.
struct Heard {
  Header header;
};
struct Warm {
  Header header;
  JobId job;
  CommandSpec command;
};
struct Prepare {
  Header header;
  JobId job;
  Generation generation = 0;
  CommandSpec command;
  bool host_store = false;
  Duration grace = {};   // SIGTERM to SIGKILL
  std::string data_key;  // authenticates this job's checkpoint sessions
  std::vector<Cut> given_up = {};
  bool park = false;     // this node stays: workers that can park live on
  bool planned = false;  // nobody is lost: those that can park end their step first
};
struct Activate {
  Header header;
  JobId job;
  Generation generation = 0;
  CommandSpec command;
  NodePlan plan;                // this node's part
  RestoreCut cut;               // of restores by ranges
  bool kept_by_parity = false;  // other nodes make parities of what is captured here
  std::uint32_t world_size = 0;
  std::uint32_t group_world_size = 0;
  std::uint32_t nproc_per_node = 0;
  std::string master_addr;
  std::uint32_t master_port = 0;
  std::uint32_t restart_count = 0;
  std::string data_key;
  Step committed_step = kNoStep;
  std::vector<Cut> given_up = {};  // slots beyond are torn before anything else is done
};
struct StopJob {
  Header header;
  JobId job;
  Generation generation = 0;  // this and older ones
  bool forget = false;        // the job is over: nothing of it stays
  Duration grace = {};
};
struct Committed {
  Header header;
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;      // newest of the generation; kNoStep: none yet
  Step released = kNoStep;  // uncommitted steps up to this one never will be
};
struct Persist {
  Header header;
  JobId job;
  Generation generation = 0;  // that captured the step
  Step step = kNoStep;
  std::vector<Rank> ranks;  // whose shards this node writes
  Cut verified = {};        // stays whatever the retention; step kNoStep: none
};
// A damaged copy here: its bytes lie whole at source_address.
struct RepairShard {
  Header header;
  JobId job;
  HeldShard shard;
  NodeId source_node;
  std::string source_address;
};
// A shard to make out of others' bytes; of no use once the job is at a newer generation.
struct BuildShard {
  Header header;
  JobId job;
  Generation generation = 0;
  ShardBuild build;
};
// A worker's words up to this one are durable.
struct ToldAck {
  Header header;
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::uint64_t sequence = 0;
};
struct TailLogs {
  Header header;
  std::uint64_t request = 0;
  JobId job;
  Rank rank = -1;  // -1: all local ones
  bool follow = false;
  std::int64_t tail_lines = -1;  // -1: from the beginning
  bool cancel = false;
};
struct KillForDrill {
  Header header;
  JobId job;
  Rank rank = 0;
  std::int32_t signal = 0;
};

// --- the keeper ---

// What a keeper held of a job when the agent became its owner.
struct AdoptedJob {
  // generation: newest prepared or activated; activated: the keeper remembers its Activate, and
  // workers lists all of that plan, pid 0 for one that was never forked. Shards are not looked at.
  JobOnNode holds;
  std::vector<std::pair<Generation, WorkerOnNode>> old_workers;  // alive, of older generations
  CommandSpec command;
  std::int32_t group_rank = 0;
  bool fork_server_ready = false;
  Step step = kNoStep;  // newest captured in holds.generation
};
// The agent owns a keeper now. `fresh`: this keeper started after the agent's last one died, or it
// is the first of this node; it holds nothing.
struct KeeperAttached {
  bool fresh = true;
  Incarnation remembered = 0;  // newest registration of this node, as the keeper remembers it
  std::vector<AdoptedJob> jobs;
};
// The keeper process is gone, and its workers with it.
struct KeeperGone {
  std::string message;
};
struct WorkerStarted {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::int32_t local_rank = 0;
  std::int32_t pid = 0;
};
struct WorkerStartFailed {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::string message;
};
struct WorkerExited {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::int32_t pid = 0;
  ExitInfo exit;
};
// It touches neither its arena nor its peers any more; whoever starts its local rank next gets this
// very process.
struct WorkerParked {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::int32_t pid = 0;
};
// A worker's words for the controller (proto/base/told.h). It says again what is not acknowledged.
struct WorkerTold {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::string words;
};
struct WorkerStalled {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  StallKind kind = StallKind::kStopped;
  std::string evidence;
  Duration stalled = {};
};
struct ForkServerState {
  JobId job;
  bool ready = false;  // false: it will never be; workers start as fresh processes
  std::string message;
};
struct StoreReady {
  JobId job;
  Generation generation = 0;
  std::uint32_t port = 0;
};
struct StoreFailed {
  JobId job;
  Generation generation = 0;
  std::string message;
};

// --- the checkpoint plane ---

// Answer to effect Survey: what lies verified in this node's memory of the job.
struct Surveyed {
  JobId job;
  Generation generation = 0;  // as in Survey
  std::vector<HeldShard> shards;
};
// This node verified and holds a copy of a slot.
struct ShardCopied {
  JobId job;
  HeldShard shard;
};
// A copy here fails its checksum. Said again as long as it is found so.
struct ShardDamaged {
  JobId job;
  HeldShard shard;
  std::int64_t chunk = 0;  // the first that fails; -1: the table of checksums itself
  std::string found_by;
};
// Answer to effect PersistStep: what Persist asked for is on the disk, or cannot be.
struct Persisted {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;
  bool sealed = false;
  std::uint64_t bytes = 0;
  Duration took = {};
  std::string error;
  std::string missing;
};
// A local rank captured a step.
struct StepCaptured {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;
};

// --- this machine ---

struct Notice {
  std::string source;
  Duration deadline = {};  // 0: unknown
};
struct Tick {};  // NextWakeup() has come

using Event =
    std::variant<SessionOpened, SessionLost, Registered, Heard, Warm, Prepare, Activate, StopJob,
                 Committed, Persist, RepairShard, BuildShard, ToldAck, TailLogs, KillForDrill,
                 KeeperAttached, KeeperGone, WorkerStarted, WorkerStartFailed, WorkerExited,
                 WorkerParked, WorkerTold, WorkerStalled, ForkServerState, StoreReady, StoreFailed,
                 Surveyed, ShardCopied, ShardDamaged, Persisted, StepCaptured, Notice, Tick>;

}  // namespace everstep::agent
