// The controller's inside. Split along its seams: controller.cc (dispatch, records, recovery),
// nodes.cc (who is alive), jobs.cc (a job's life and who pays for a restart), generation.cc (the
// two-phase switch), commit.cc (which step is safe, where a generation starts from).
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>

#include "controller/core/bugs.h"
#include "controller/core/controller.h"

namespace everstep::controller {

class Controller::Impl {
 public:
  explicit Impl(const Options& options) : options_(options) {}

  void Recover(Timestamp now, std::span<const Record> records, Decisions* out);
  void Handle(Timestamp now, const Event& event, Decisions* out);
  std::optional<Timestamp> NextWakeup() const;
  const ClusterState& state() const { return state_; }

 private:
  // What the core remembers of a job beside its public state; rebuilt after a recovery.
  struct Runtime {
    Timestamp waiting_since;
    Timestamp last_call;  // first generation forms then; ns == 0: not enough nodes yet
    Timestamp grow_at;    // joined capacity is used then; ns == 0: none
    Timestamp running_since;
    everstep::Step step_at_start = kNoStep;
    bool ran = false;  // the newest generation reached RUNNING
    std::map<NodeId, std::uint32_t> store_ports;
    std::set<NodeId> surveyed;  // told in this generation what they hold
    struct Exclusion {
      Timestamp until;
      Duration retry = {};
      bool over = false;  // `until` has passed and the job was considered anew
    };
    std::map<NodeId, Exclusion> excluded;  // refused; forgotten when they prepare or register anew
    struct Copies {
      Timestamp since;
      std::map<Rank, std::map<NodeId, HeldShard>> by_rank;
    };
    std::map<everstep::Step, Copies> copies;  // of the newest generation, uncommitted steps
    std::map<Rank, std::map<NodeId, HeldShard>> base_copies;  // of the step it started from
    std::set<NodeId> emptied;  // members whose keeper died: no state, no fork server yet
    bool base_released = false;
    everstep::Step released = kNoStep;  // of the newest generation; see CommittedCommand
  };

  // nodes.cc
  void On(const NodeRegistered& e);
  void On(const SessionClosed& e);
  void On(const NodeProcessDead& e);
  void On(const Heartbeat& e);
  void On(const Notice& e);
  void On(const NodeWarm& e);
  void On(const KeeperLost& e);
  void On(const DrainNode& e);
  void On(const UndrainNode& e);
  void LoseNode(const NodeId& id, Reason reason, const std::string& evidence);
  void StartDrain(const NodeId& id, Reason reason, const std::string& why);
  // The node if the message is of its present incarnation; else null, counted as stale.
  NodeState* Fresh(const NodeId& id, Incarnation incarnation);
  void Heard(NodeState* node);

  // jobs.cc
  void On(const SubmitJob& e);
  void On(const CancelJob& e);
  void On(const WorkerExited& e);
  void On(const WorkerStalled& e);
  void On(const Stopped& e);
  void Exclude(JobStateView* job, const NodeId& node);
  void Consider(JobStateView* job);  // capacity changed: start or grow it?
  void WorkerFailed(JobStateView* job, const WorkerExited& e);
  // Counts a generation that ends; true when the job may go on.
  bool EndOfGeneration(JobStateView* job, bool lost_capacity);
  void Finish(JobStateView* job, JobState outcome, Reason reason, const std::string& message,
              std::int32_t exit_code);
  void FinishStop(JobStateView* job);
  void AddFault(JobStateView* job, Reason reason, std::string subject, std::string evidence);
  JobOnNode ReportedOrEmpty(const NodeRegistered& e, const JobId& job) const;
  void Reattach(NodeState* node, const NodeRegistered& e);

  // generation.cc
  void On(const Prepared& e);
  void On(const Activated& e);
  void On(const Tick&);
  void Prepare(JobStateView* job, Reason reason, const std::string& evidence, bool failed,
               bool worker_failure = false);
  void Activate(JobStateView* job);
  // Asks sources of the plan's restore that are no members what they hold now; false: all have
  // told.
  bool AskSources(JobStateView* job);
  void SendPrepare(JobStateView* job, const NodeId& node, bool failed);
  void SendActivate(JobStateView* job, const NodeId& node);
  void Running(JobStateView* job);
  std::vector<NodeId> ChooseNodes(const JobStateView& job) const;
  bool Eligible(const JobStateView& job, const NodeState& node) const;
  bool IsMember(const JobStateView& job, const NodeId& node) const;

  // commit.cc
  void On(const ShardCopied& e);
  // A copy of the running generation, newly made or named again by a registration: enough to
  // commit?
  void CountCopy(JobStateView* job, const NodeId& node, const HeldShard& copy);
  // The step that the newest generation started from, while neither it nor a newer one is
  // committed: fewer copies of it may exist than of the committed one before it.
  bool IsBase(const JobStateView& job, const HeldShard& shard) const;
  void CountBase(JobStateView* job, const NodeId& node, const HeldShard& copy);
  void CommitBase(JobStateView* job);
  void AddCommit(JobStateView* job, Commit commit);
  // What lacked copies for too long is given up, so that trainers may capture newer steps.
  void GiveUpCopies(JobStateView* job);
  // Gives up the uncommitted steps up to `step`.
  void Release(JobStateView* job, everstep::Step step);
  void TellCommits(JobStateView* job, const NodeId& node);
  void PlanRestore(JobStateView* job);
  void Progress(JobStateView* job, everstep::Step step);

  // controller.cc
  void Send(const NodeId& node, decltype(Command::body) body);
  void Answer(RequestId request, ReplyCode code, std::string message, std::string hint = "");
  void Journal(JournalRecord record);
  void Flush();
  bool Bug(SeededBug bug) const { return (options_.bugs & bug) != 0; }
  JobStateView* FindJob(const JobId& id);

  Options options_;
  ClusterState state_;
  std::map<JobId, Runtime> runtime_;
  Timestamp now_;
  Decisions* out_ = nullptr;
  std::set<NodeId> dirty_nodes_;
  std::set<JobId> dirty_jobs_, dirty_plans_, dirty_commits_;
};

}  // namespace everstep::controller
