// The truths a simulated cluster must keep, checked at every decision against what really happened.
// Rules, by the name a violation carries:
//
// - stale_obeyed: a message of an old incarnation or generation changes nothing
// - grows: generations and incarnations given out only grow, over restarts too
// - one_active: no worker of an older generation lives where a generation is activated
// - one_plan: a plan names each rank once, on nodes that may run it
// - one_state: every rank of a generation starts from one state of one step
// - shares_together: no rank starts from one share alone; no commit has shares beside whole states
// - commit_has_copies: each rank's shard of a committed step was verified on min(m, nodes) nodes
// - commit_kept: a generation starts from the newest committed step or a later one, unless every
// copy
//   of some shard it needs is dead or out of reach
// - files_kept: ... nor behind a checkpoint that has been in the job's directory for a while
// - given_up: nothing is restored from what a roll-back went behind
// - runs_apart: a run starts from nothing of an earlier run under its name that succeeded or was
// cancelled
// - commits_live: while a job steps in peace, its steps are committed
// - stored: the store rebuilds the state; nothing was said that was not stored first
// - reason: every loss, fault, plan and end says why, and a loss had a cause in the world
// - warm_first: a job that runs takes a newcomer in when its fork server is ready or cannot be had,
//   or has been waited for long enough
// - deadline: no switch outlives its deadline
// - told_once: a job's ledger has no finding, forgets nothing that was acknowledged, and names in
// the end the generation that made each step of the model, once
// - live: once faults stop every job runs on, to its end
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "controller/core/controller.h"
#include "tests/sim/world/files.h"
#include "tests/sim/world/options.h"
#include "tests/sim/world/sim_store.h"
#include "tests/sim/world/training.h"
#include "tests/sim/world/truth.h"

namespace everstep::sim {

class SimNode;

class Checkers {
 public:
  struct Env {
    Truth* truth = nullptr;
    const WorldOptions* options = nullptr;
    const std::map<NodeId, std::unique_ptr<SimNode>>* nodes = nullptr;
    const Files* files = nullptr;
    const Training* training = nullptr;
    std::function<bool()> disturbed;  // some fault could still cost a node its lease
  };
  explicit Checkers(Env env) : env_(std::move(env)) {}

  // Around each Controller::Step.
  void BeforeStep(const controller::ClusterState& state, const controller::Event& event);
  void AfterStep(Timestamp now, const controller::ClusterState& state,
                 const controller::Event& event, const controller::Decisions& decisions);
  // Every decision, recovery's too, before anything of it is carried out.
  void OnDecisions(Timestamp now, const controller::Decisions& decisions);
  // A command leaves the controller's process.
  void OnCommand(Timestamp now, const controller::Command& command);
  // A new controller process has read its store.
  void OnRecovered(Timestamp now, const controller::ClusterState& state);
  // The running state is what its store would rebuild. REQUIRES: nothing is unsynced.
  void CompareStore(Timestamp now, const controller::ClusterState& state, const SimStore& store);
  // Regularly, while the controller runs undisturbed.
  void CheckDeadlines(Timestamp now, const controller::ClusterState& state);

  // A job that tells its ledger has succeeded.
  void CheckLedgerEnd(Timestamp now, const controller::JobStateView& job);

  // Who holds what, into the story.
  void TellMemory(Timestamp now, const controller::ClusterState& state, const JobId& job) const;
  void Acknowledged(const JobId& job) { acknowledged_.insert(job); }
  // The operator was told that the job goes back: from now on that holds, whoever dies.
  void RolledBack(const JobId& job) { cuts_[job].push_back(rolling_back_); }

 private:
  void CheckNewcomers(Timestamp now, const controller::GenerationPlan& plan);
  void CheckPlan(Timestamp now, const controller::ClusterState& state,
                 const controller::GenerationPlan& plan);
  void CheckRestore(Timestamp now, const controller::ClusterState& state,
                    const controller::GenerationPlan& plan);
  void CheckFiles(Timestamp now, const controller::ClusterState& state,
                  const controller::GenerationPlan& plan, Lineage start);
  void CheckSources(Timestamp now, const controller::GenerationPlan& plan);
  void CheckLedger(Timestamp now, const controller::JobStateView& job);
  void CheckAcknowledged(Timestamp now, const controller::JobStateView& job);
  void CheckCommit(Timestamp now, const controller::ClusterState& state,
                   const controller::CommitRecord& record);
  void CheckParities(Timestamp now, const controller::JobStateView& job,
                     const controller::Commit& commit, const std::string& name);
  bool AtHand(const JobId& job, const controller::Commit& commit,
              const std::function<bool(const Truth::Holder&)>& counts) const;
  bool Reachable(const controller::ClusterState& state, const NodeId& node,
                 std::uint64_t keeper) const;
  void Violate(Timestamp now, const std::string& rule, const std::string& what) {
    env_.truth->Violate(now, rule, what);
  }

  const Env env_;
  // of the event in hand
  std::string stale_;  // why it is stale; empty: it is not
  std::optional<Timestamp> heard_before_;
  Cut rolling_back_;          // of the job that an operator sends back
  Generation ended_run_ = 0;  // of the job that is submitted once more, when it leaves nothing
  // over the whole run
  std::map<NodeId, Incarnation> incarnations_;                // newest said to a node
  std::map<JobId, Generation> generations_;                   // newest said to any node
  std::map<JobId, std::pair<Generation, Step>> commits_;      // newest said to any node
  std::map<JobId, Generation> rebuild_timeouts_;              // newest whose rebuild took too long
  std::map<JobId, Generation> planned_;                       // newest decided
  std::map<JobId, controller::Commit> checked_;               // newest of each job
  std::map<JobId, std::set<NodeId>> members_;                 // of the newest plan
  std::map<std::pair<JobId, NodeId>, Timestamp> warming_;     // told of, newest
  std::map<std::pair<JobId, NodeId>, Incarnation> answered_;  // of what its fork server is
  std::set<JobId> acknowledged_;
  std::map<JobId, std::vector<Cut>> cuts_;
  std::map<JobId, Generation> forgotten_;  // runs up to this generation ended and left nothing
};

}  // namespace everstep::sim
