// What a controller decides. The shell carries it out in this order and no other:
//   1. all `records` are ONE synced batch; if it fails the process aborts and recovery re-reads the
//      store;
//   2. only then `commands` go out, each to the session of (node, incarnation), in order;
//   3. only then `replies` are answered.
// Commands are idempotent: a lost one is sent again when the node registers anew.
#pragma once

#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "controller/core/event.h"
#include "controller/core/ledger.h"
#include "controller/core/types.h"

namespace everstep::controller {

// --- records: the durable state, whole values ---

struct NodeRecord {
  NodeId node;
  Incarnation incarnation = 0;
  std::uint64_t keeper_id = 0;
  NodeHealth health = NodeHealth::kLost;
  bool draining = false;
  std::string drain_reason;
  NodeFacts facts;
  Timestamp leave_by;  // after a notice: its jobs leave it then at the latest; ns == 0: not known
};
struct JobRecord {
  JobSpec spec;
  JobState state = JobState::kWaiting;
  Generation generation = 0;
  std::uint32_t restarts = 0;
  std::uint32_t lost_capacity = 0;
  std::uint32_t start_failures = 0;
  std::uint32_t no_progress = 0;
  Step best_step = kNoStep;
  Reason end_reason = Reason::kNone;
  std::string end_message;
  std::int32_t exit_code = 0;
  Timestamp started;
  Timestamp ended;
  std::string data_key;
  Generation earlier_runs = 0;  // captures of generations up to this one are of runs that are over
  bool memory_freed = false;    // ended, and its nodes were told to give up what it captured
  std::uint64_t shards_damaged = 0;    // copies that failed their checksum
  std::uint64_t shards_repaired = 0;   // ... and were put right from another one
  std::vector<Cut> given_up;           // by roll-backs
  bool forgotten = false;              // only the id and its newest generation are still known
  std::vector<Fault> faults;           // newest 256
  std::vector<WorkerOnNode> failures;  // of the generation that ended the job, by error time
};
struct GenerationRecord {
  GenerationPlan plan;
};
struct CommitRecord {
  JobId job;
  std::vector<Commit> commits;          // newest first, at most two
  Generation persisted_generation = 0;  // newest step that stands in the checkpoint directory
  Step persisted_step = kNoStep;
  Timestamp persisted;     // when it was known to
  std::vector<Cut> files;  // checkpoints there that may yet be verified, newest first
  Cut verified;            // newest verified checkpoint
  Timestamp verified_at;   // ns == 0: none
  std::uint64_t anomalies = 0;
  Step anomaly_step = kNoStep;  // of the newest
  std::string anomaly_why;
};
enum class Severity : std::uint8_t { kInfo, kWarning, kError };
// A line of history: what a person reads in `everstep events`. `type` is a stable event name.
struct JournalRecord {
  std::uint64_t sequence = 0;
  Timestamp time;
  std::string type;  // "node_lost"
  Severity severity = Severity::kInfo;
  Reason reason = Reason::kNone;
  JobId job;
  NodeId node;
  Rank rank = -1;
  Generation generation = 0;
  std::string message;
  std::string evidence;
};
using Record = std::variant<NodeRecord, JobRecord, GenerationRecord, CommitRecord, JournalRecord,
                            LedgerRecord, LayoutRecord, ToldRecord>;

// Which record to remove. Key as in proto/record.proto.
struct Deletion {
  enum class Table : std::uint8_t {
    kNode,
    kJob,
    kGeneration,
    kCommit,
    kJournal,
    kLedger,
    kLayout,
    kTold
  } table;
  std::string key;
};

// --- commands to agents ---

struct RegisteredCommand {
  std::uint64_t session = 0;  // which stream this answers
  Duration heartbeat_interval = {};
  Duration lease = {};
  std::vector<JobId> known_jobs;
};
struct WarmCommand {
  JobId job;
  CommandSpec command;
  std::uint32_t nproc_per_node = 1;
};
struct PrepareCommand {
  JobId job;
  Generation generation = 0;
  CommandSpec command;
  std::uint32_t nproc_per_node = 1;
  bool host_store = false;
  bool failed = false;  // a peer is dead already: the short grace
  std::string data_key;
  std::vector<Cut> given_up = {};  // files beyond are marked, and not told of
  bool park = false;               // the node stays: workers that can park live on
};
struct ActivateCommand {
  // Whole, the same for every node of the generation; the shell sends each its part. Never null.
  std::shared_ptr<const GenerationPlan> plan;
  NodeId node;
  std::uint32_t nproc_per_node = 1;
  CommandSpec command;
  std::string data_key;
  Step committed_step = kNoStep;
  std::vector<Cut> given_up = {};  // slots beyond are torn
};
struct StopJobCommand {
  JobId job;
  Generation generation = 0;
  bool forget = false;
  bool failed = false;
  Reason reason = Reason::kNone;
};
struct CommittedCommand {
  JobId job;
  Generation generation = 0;
  Step step = kNoStep;  // newest committed step of the generation
  // Steps up to this one that are not committed never will be: their slots may be overwritten.
  // Before it is said a captured slot stays, since it may be committed at any moment.
  Step released = kNoStep;
};
struct PersistCommand {
  JobId job;
  Generation generation = 0;  // that captured the step
  Step step = kNoStep;
  std::vector<Rank> ranks;  // whose shards this node writes
  Cut verified = {};        // this checkpoint stays whatever the retention; step kNoStep: none
};
struct RepairShardCommand {
  JobId job;
  HeldShard shard;  // damaged on this node
  NodeId source_node;
  std::string source_address;  // host:port; these very bytes lie there
};
struct BuildShardCommand {
  JobId job;
  Generation generation = 0;  // of the job now
  ShardBuild build;
};
// What a rank told up to this word is durable.
struct ToldAckCommand {
  JobId job;
  Generation generation = 0;
  Rank rank = 0;
  std::uint64_t sequence = 0;
};
struct Command {
  NodeId node;
  Incarnation incarnation = 0;
  std::uint64_t sequence = 0;
  std::variant<RegisteredCommand, WarmCommand, PrepareCommand, ActivateCommand, StopJobCommand,
               CommittedCommand, PersistCommand, RepairShardCommand, BuildShardCommand,
               ToldAckCommand>
      body;
};

// --- answers to people ---

enum class ReplyCode : std::uint8_t {
  kOk,
  kNotFound,
  kAlreadyExists,
  kFailedPrecondition,
  kInvalid
};
struct Reply {
  RequestId request = 0;
  ReplyCode code = ReplyCode::kOk;
  std::string message;  // who, what, the limit
  std::string hint;     // what to do next
};

struct Decisions {
  std::vector<Record> records;
  std::vector<Deletion> deletions;
  std::vector<Command> commands;
  std::vector<Reply> replies;
  std::vector<NodeId> close_sessions;  // fence: end these nodes' streams (a newer registration won)

  bool empty() const {
    return records.empty() && deletions.empty() && commands.empty() && replies.empty() &&
           close_sessions.empty();
  }
  void Clear() { *this = Decisions{}; }
};

}  // namespace everstep::controller
