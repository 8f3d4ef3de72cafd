// The controller's brain: pure, deterministic, single-threaded. Events and time in, decisions out;
// no IO, no clock, no threads, no randomness, no unordered iteration. The server
// (controller/server) and the simulator (tests/sim) run this same class.
//
// It decides: which nodes are alive, which generation of each job runs where, from which step and
// bytes a generation starts, when a checkpoint step is committed, when a job is over. It does not
// know sockets, processes or files.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "controller/core/decision.h"
#include "controller/core/event.h"
#include "controller/core/state.h"

namespace everstep::controller {

// Knobs, with defaults and why. docs/reference/knobs.md is made from this table.
struct Options {
  Duration heartbeat_interval = Milliseconds(250);
  Duration lease = Milliseconds(1500);       // silence after which a node is lost; the floor
  Duration max_lease = Seconds(15);          // the adaptive lease's ceiling
  Duration prepare_timeout = Seconds(30);    // a node must stop its workers and report within
  Duration activate_timeout = Seconds(120);  // ... and fork the new ones (a cold import included)
  Duration stop_timeout = Seconds(60);       // ... and clean up at the job's end
  Duration progress_age = Seconds(10);   // a generation that ran this long made progress, unless
                                         // steps are reported and none was new
  Duration rejoin_grace = Seconds(2);    // after a controller restart: lease of recovered nodes
  Duration refused_retry = Seconds(10);  // a node that refused a generation is asked again after;
  Duration max_refused_retry = Seconds(600);  // doubled each time, up to this
  Duration grow_delay = Milliseconds(500);    // joins within this window are one switch
  Duration grow_settle = Seconds(1);          // a generation that just began forms its group first
  // A running job waits this long for a newcomer's fork server before it takes it in as it is.
  Duration warm_patience = Seconds(30);
  Duration commit_patience = Seconds(60);  // a step short of copies for this long is given up
  Duration linger_notice = Seconds(30);  // workers that go on this long after their peers' good end
                                         // and make no step are told of
  std::size_t max_nodes = 20000;
  std::size_t max_jobs = 1000;
  std::size_t journal_limit = 10000;    // records kept
  std::size_t fault_limit = 256;        // per job
  Duration notice_margin = Seconds(5);  // a node with a notice is left this long before its end
  // What a failed job captured stays on its nodes this long; 0: until it is forgotten.
  Duration failed_retention = Seconds(3600);
  Duration persist_timeout = Seconds(600);  // a step must be in the checkpoint directory within
  Duration persist_retry = Seconds(10);     // after a failure; doubled up to persist_timeout
  // Damaged copies on one node within the window: its memory is called suspect.
  std::size_t suspect_findings = 3;
  Duration suspect_window = Seconds(3600);
  // Seeded bugs for the simulator's own test (tests/sim/seeded_bugs_test.cc); never set elsewhere.
  std::uint32_t bugs = 0;
};

// How a job would go on.
struct Forecast {
  JobState state = JobState::kWaiting;  // kActivating: on the nodes of `plan`; kWaiting: it waits
                                        // for nodes; a terminal state: it ends
  std::string message;                  // why it waits or ends
  // kActivating: the plan with its restore. kWaiting: the plan before the loss with the restore
  // that the memory left would allow. restore_step kNoStep: nothing is left.
  GenerationPlan plan;
  std::vector<NodeId> lost;
  std::map<Rank, NodeId> rebuilt;  // shards that are made anew out of parities first, and where
};

class Controller {
 public:
  explicit Controller(Options options);
  ~Controller();

  // Rebuilds the state from what a store held, any order. Call once, first.
  void Recover(Timestamp now, std::span<const Record> records, Decisions* out);

  // Total: never fails, never blocks. Appends to *out.
  void Step(Timestamp now, const Event& event, Decisions* out);

  // When Step(Tick) must come at the latest; none: nothing is pending.
  std::optional<Timestamp> NextWakeup() const;

  const ClusterState& state() const;

  // What would become of the job if these nodes were lost now: the same code, run on a copy until
  // its plan stands, with what nodes last reported to hold. Copies the state; for people, not for
  // loops. REQUIRES: the job and the nodes are known.
  Forecast IfLost(Timestamp now, const JobId& job, const std::vector<NodeId>& lost) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace everstep::controller
