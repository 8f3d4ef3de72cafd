// The controller's state as others may read it: the CLI, metrics and the simulator's checkers.
#pragma once

#include <compare>
#include <deque>
#include <map>
#include <set>

#include "controller/core/decision.h"

namespace everstep::controller {

// A job's fork server on a node.
enum class Warmth : std::uint8_t {
  kAsked,  // it imports what the job needs
  kReady,
  kNever,  // the node has none for the job: workers start as fresh processes
};

struct NodeState {
  NodeRecord record;  // as persisted
  bool connected = false;
  Reason reason = Reason::kNone;  // of the present health
  std::string evidence;
  Timestamp since;        // of the present health; ns == 0: unknown (older than the journal)
  Timestamp drain_since;  // meaningful when draining; ns == 0: unknown
  Timestamp last_heard;
  Duration lease = {};                    // adaptive, of this node
  std::uint32_t reattached = 0;           // registrations that kept the keeper's workers
  std::uint64_t next_sequence = 1;        // of commands to this incarnation
  std::map<JobId, Warmth> warm;           // of jobs that it was told to get ready for
  std::deque<Timestamp> memory_findings;  // damaged copies, within suspect_window
  std::string memory_suspect;             // evidence; empty: it is not
};

struct WorkerState {
  NodeId node;
  WorkerOnNode worker;
  bool stopped = false;  // process state T
};

// A copy that failed its checksum and was not repaired yet.
struct DamageKey {
  NodeId node;
  Rank rank = 0;
  Generation generation = 0;
  Step step = kNoStep;
  bool replica = false;
  friend auto operator<=>(const DamageKey&, const DamageKey&) = default;
};

struct JobStateView {
  JobRecord record;                      // as persisted
  GenerationPlan plan;                   // newest; phase says how far
  std::map<Rank, WorkerState> workers;   // of the running generation
  std::set<NodeId> waiting_for;          // nodes that still owe Prepared, Activated or Stopped
  std::map<NodeId, JobOnNode> holdings;  // from Prepared and registration
  // RUNNING: nodes that it is going to take in, and since when. Until their fork servers are ready
  // they warm, and the job trains on without them.
  std::map<NodeId, Timestamp> newcomers;
  CommitRecord commits;
  Step step = kNoStep;            // newest reported by any rank
  Reason reason = Reason::kNone;  // why it is in its state
  std::string message;
  Timestamp deadline;  // of the present phase; ns == 0: none
  // FAILED: what it captured is kept until then; ns == 0: nothing is, or for ever.
  Timestamp memory_until;
  // Of the newest commit: the most bytes that one node sent, and how long after the first report of
  // the step every copy was there. 0: nothing was committed yet.
  std::uint64_t copied_bytes = 0;
  Duration copy_took = {};
  std::set<DamageKey> damaged;
  // Of the newest checkpoint that was sealed in its directory under this controller, one for each
  // rank.
  std::vector<HeldShard> files;
  LedgerRecord ledger;  // generation 0: nothing was told
  Layouts layouts;
  std::map<std::string, ToldRecord> told;  // by kind
};

struct ClusterState {
  std::map<NodeId, NodeState> nodes;
  std::map<JobId, JobStateView> jobs;
  std::map<JobId, JobRecord> forgotten;  // as written: their generations are never given out again
  std::deque<JournalRecord> journal;     // newest journal_limit
  std::uint64_t next_journal_sequence = 1;
  std::uint64_t stale_dropped = 0;  // messages that died at the door
};

}  // namespace everstep::controller
