// The controller's inside. Split along its seams: controller.cc (dispatch, records, recovery),
// nodes.cc (who is alive), jobs.cc (a job's life), faults.cc (who pays for a restart), retention.cc
// (what stays of an ended job), generation.cc (the two-phase switch), commit.cc (which step is
// safe, where a generation starts from), members.cc (who takes part, and newcomers that get ready
// first), sources.cc (from whom each rank takes it), ranges.cc (a world of another size), parity.cc
// (parities, and lost shards made out of them), repair.cc (copies that went bad), trust.cc
// (verified checkpoints, roll-backs), told.cc (what workers tell), forecast.cc (what if).
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "controller/core/bugs.h"
#include "controller/core/controller.h"

namespace everstep::controller {

bool GivenUp(const std::vector<Cut>& cuts, Generation generation, everstep::Step step);

class Controller::Impl {
 public:
  explicit Impl(const Options& options) : options_(options) {}

  void Recover(Timestamp now, std::span<const Record> records, Decisions* out);
  void Handle(Timestamp now, const Event& event, Decisions* out);
  std::optional<Timestamp> NextWakeup() const;
  const ClusterState& state() const { return state_; }
  // On a copy of this: forecast.cc.
  Forecast IfLost(Timestamp now, const JobId& id, const std::vector<NodeId>& lost) const;

 private:
  // What the core remembers of a job beside its public state; rebuilt after a recovery.
  struct Runtime {
    Timestamp waiting_since;
    Timestamp last_call;      // first generation forms then; ns == 0: not enough nodes yet
    Timestamp grow_at;        // joined capacity is used then; ns == 0: none
    bool formed = false;      // a generation came to run since the job last waited for nodes
    std::set<NodeId> joined;  // members that came to a formed job, until it makes a step with them
    Timestamp running_since;
    everstep::Step step_at_start = kNoStep;
    bool ran = false;  // the newest generation reached RUNNING
    // Workers' processes of the generation that ran last: those of them that are sessions live on.
    std::map<NodeId, std::set<std::int32_t>> pids;
    Timestamp
        linger_at;  // some of its workers exited 0, the others are told of then; ns == 0: none
    everstep::Step linger_step = kNoStep;  // of the job when linger_at was set
    std::map<NodeId, std::uint32_t> store_ports;
    std::set<NodeId> surveyed;  // told in this generation what they hold
    struct Exclusion {
      Timestamp until;
      Duration retry = {};
      bool over = false;  // `until` has passed and the job was considered anew
    };
    std::map<NodeId, Exclusion>
        excluded;  // refused; forgotten when they take part or register anew
    struct Copies {
      Timestamp since;
      std::map<Rank, std::map<NodeId, HeldShard>> by_rank;  // parities behind the ranks
      bool ordered = false;                                 // its parities are
    };
    std::map<everstep::Step, Copies> copies;  // of the newest generation, uncommitted steps
    std::map<Rank, std::map<NodeId, HeldShard>> base_copies;  // of the step it started from
    std::set<NodeId> emptied;  // members whose keeper died: no state, no fork server yet
    bool base_released = false;
    bool base_ordered = false;          // its parities are
    std::map<Rank, NodeId> rebuilding;  // lost shards of the newest commit, and who makes them
    bool rebuild_over = false;          // it took too long in this generation
    std::string unserved;  // evidence: shards of a cut of another world size that nobody holds
    std::set<NodeId> misreported;       // told of ranks of this generation that are not theirs
    everstep::Step released = kNoStep;  // of the newest generation; see CommittedCommand
    struct Persist {                    // a step on its way to the checkpoint directory
      Generation generation = 0;
      everstep::Step step = kNoStep;
      Reason reason = Reason::kNone;
      Timestamp began;
      std::set<NodeId> waiting_for;
      bool sealed = false;
      std::uint64_t bytes = 0;
      std::string trouble;
      std::vector<RequestId> requests;
      std::vector<HeldShard> shards;  // of the commit
    };
    std::optional<Persist> persist;
    Timestamp persist_again;  // not before, after a failure
    Duration persist_retry = {};
    Timestamp short_since;    // some shard of the newest commit lacks copies; ns == 0: none does
    Timestamp persist_since;  // when the interval began to run
    std::map<Rank, std::uint64_t> heard;  // newest word taken in of each rank of the generation
    Timestamp told_since;                 // the second in which bundles of words are counted
    std::uint32_t told_bundles = 0;       // in it
  };

  // nodes.cc
  void On(const NodeRegistered& e);
  void On(const SessionClosed& e);
  void On(const NodeProcessDead& e);
  void On(const Heartbeat& e);
  void On(const Notice& e);
  void On(const KeeperLost& e);
  void On(const DrainNode& e);
  void On(const UndrainNode& e);
  void LoseNode(const NodeId& id, Reason reason, const std::string& evidence);
  // `pause`: a job that cannot go on without the node waits; else it trains on with it.
  void StartDrain(const NodeId& id, Reason reason, const std::string& why, bool pause = false);
  void LeaveNodes();  // whose notice has run down
  void Suspect(const NodeId& id, Reason reason, const std::string& evidence);
  // When a node's silence (or its notice) next matters; ns == 0: never.
  Timestamp NodeDeadline(const NodeState& node) const;
  void Watch(const NodeState& node);  // takes its deadline into node_wakeup_
  // The node if the message is of its present incarnation; else null, counted as stale.
  NodeState* Fresh(const NodeId& id, Incarnation incarnation);
  void Heard(NodeState* node);

  // jobs.cc
  void On(const SubmitJob& e);
  void On(const CancelJob& e);
  void On(const Stopped& e);
  void Exclude(JobStateView* job, const NodeId& node);
  void Consider(JobStateView* job);  // capacity changed: start or grow it?
  void Finish(JobStateView* job, JobState outcome, Reason reason, const std::string& message,
              std::int32_t exit_code);
  void FinishStop(JobStateView* job);
  static JobState Outcome(Reason end);  // the state of a job that ended for this
  JobOnNode ReportedOrEmpty(const NodeRegistered& e, const JobId& job) const;
  void Reattach(NodeState* node, const NodeRegistered& e);
  void Overtaken(JobStateView* job, const NodeId& node, const JobOnNode& holds);

  // faults.cc
  void On(const WorkerExited& e);
  void On(const WorkerStalled& e);
  void WorkerFailed(JobStateView* job, const WorkerExited& e);
  void InputRefused(JobStateView* job, const WorkerExited& e);
  // A local rank made a step of the newest generation: its process group had formed.
  bool Stepped(const JobStateView& job);
  void TellLingerers(JobStateView* job);  // at linger_at
  // Counts a generation that ends; true when the job may go on.
  bool EndOfGeneration(JobStateView* job, bool lost_capacity);
  void AddFault(JobStateView* job, Reason reason, std::string subject, std::string evidence);
  // A fault that is not the script's: charged to the job's account of lost capacity.
  void LoseCapacity(JobStateView* job, Reason reason, std::string subject, std::string evidence);
  // The rank is the node's own in the job's plan; else what it reports is dropped as stale.
  bool Hosts(const JobStateView& job, const NodeId& node, Rank rank);

  // retention.cc
  // Of a job that ends or has ended: its nodes keep what it captured.
  static bool KeepsMemory(const JobRecord& record);
  Timestamp MemoryEnd(const JobStateView& job) const;  // ns == 0: nothing is kept, or no limit
  void DropCopies(JobStateView* job);
  void FreeMemory(JobStateView* job, Reason reason);
  void ForgetJob(JobStateView* job, const std::string& why);
  void SendStop(const JobStateView& job, const NodeId& node);

  // generation.cc
  void On(const Prepared& e);
  void On(const Activated& e);
  void On(const Tick&);
  void Prepare(JobStateView* job, Reason reason, const std::string& evidence, bool failed,
               bool worker_failure = false);
  void Activate(JobStateView* job);
  // Asks nodes outside the generation that the plan's restore needs what they hold now; false: all
  // have told.
  bool AskSources(JobStateView* job);
  void SendPrepare(JobStateView* job, const NodeId& node, bool failed);
  void SendActivate(JobStateView* job, const NodeId& node,
                    std::shared_ptr<const GenerationPlan> plan);
  void Running(JobStateView* job);

  // members.cc
  // Of newcomers whose fork server is not ready, to a job that has formed: taken none, as many as
  // min_nodes asks for, or all.
  enum class Cold { kNone, kToMinimum, kAll };
  std::vector<NodeId> ChooseNodes(const JobStateView& job, Cold cold) const;
  // Workers of other jobs, by node; empty when no node has a limit.
  using Taken = std::map<std::string_view, std::uint64_t>;
  Taken TakenByOthers(const JobStateView& job) const;
  // May take part, a drain left out of account.
  bool Fit(const JobStateView& job, const NodeState& node, bool member, const Taken& taken) const;
  bool Eligible(const JobStateView& job, const NodeState& node) const;
  // Its notice leaves it time, and nobody can take its place: it stays until leave_by.
  bool Lingers(const NodeState& node) const;
  // `chosen` are better than those that run now: more of them, or free of one that is leaving.
  bool Better(const JobStateView& job, const std::vector<NodeId>& chosen, Reason* reason,
              std::string* evidence) const;
  bool IsMember(const JobStateView& job, const NodeId& node) const;
  void On(const NodeWarm& e);
  // Tells the node to start the job's fork server, unless it was told already.
  void Warm(const JobStateView& job, const NodeId& node);
  bool IsCold(const JobStateView& job, const NodeState& node) const;
  void WatchNewcomers(JobStateView* job);  // of a running job: who comes, and when it grows
  void LeaveOut(const NodeId& node);       // of the newcomers of every job: something changed
  void Grow(JobStateView* job);            // at grow_at

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
  void JournalRestore(const JobStateView& job);
  void Progress(JobStateView* job, everstep::Step step);

  // sources.cc
  // One candidate of what to restore from: a consistent cut's shards and who holds them.
  struct Holder {
    NodeId node;
    HeldShard shard;
  };
  // Gives every rank its source among the holders of one cut; false: some rank has none.
  bool ServeFrom(JobStateView* job, const std::vector<Holder>& holders, bool replicated);
  std::string DataAddress(const NodeId& node) const;  // host:port of its data plane

  // parity.cc
  // Completes a commit that has all of its shards with their parities; false: some are not there
  // yet, and were ordered from their holders if they had not been (*ordered).
  bool AddParities(JobStateView* job, Commit* commit,
                   const std::map<Rank, std::map<NodeId, HeldShard>>& held, bool* ordered);
  void SealAnew(JobStateView* job);
  // The newest commit is out of reach but for its parities: has its lost shards made. True: the
  // switch waits for them.
  bool RebuildLost(JobStateView* job);
  bool Rebuilds(const JobStateView& job, const ShardCopied& e) const;
  void Rebuilt(JobStateView* job, const ShardCopied& e);
  void GiveUpRebuild(JobStateView* job);  // at the switch's deadline
  // Shards and parities of the commit that some node which is not lost has, by rank.
  std::map<Rank, CutShard> AtHand(const JobStateView& job, const Commit& commit) const;
  // How a shard or parity of the commit is made anew; none: what is at hand does not suffice.
  std::optional<ShardBuild> BuildOf(const Commit& commit, const HeldShard& shard,
                                    const std::map<Rank, CutShard>& at_hand) const;
  // What of the newest commit only its parities bring back; empty: the restore that is planned is
  // as new, or they do not suffice.
  std::vector<ShardBuild> LostShards(const JobStateView& job) const;
  // What puts a damaged shard right that no other node has; none: nothing does.
  using Remedy = std::variant<RepairShardCommand, BuildShardCommand>;
  std::optional<Remedy> RemedyOf(const JobStateView& job, const NodeId& node,
                                 const HeldShard& damaged) const;
  void SendRemedy(const NodeId& node, Remedy remedy);
  // Of a forecast: what is being made anew lies there; *rebuilt: where. False: nothing is.
  bool PretendRebuilt(JobStateView* job, std::map<Rank, NodeId>* rebuilt);
  // ... what would be, if the job had its nodes again.
  bool PretendAtHand(JobStateView* job, std::map<Rank, NodeId>* rebuilt);
  static void Pretend(JobStateView* job, const std::map<Rank, NodeId>& rebuilt);

  // ranges.cc
  // Makes `cut` the plan's, each worker to take its ranges of it. False: it is neither committed
  // nor in files, or a shard has no holder in any tier (Runtime::unserved says which).
  bool ServeRanges(JobStateView* job, RestoreCut cut, const std::vector<Holder>& holders);
  static std::string CutEvidence(const RestoreCut& cut, std::size_t ranks);

  // repair.cc
  void On(const ShardDamaged& e);
  // A shard of one of the two newest commits.
  bool IsCommitted(const JobStateView& job, const HeldShard& shard) const;
  NodeId RepairSource(const JobStateView& job, const NodeId& damaged, const HeldShard& shard) const;
  void NoteMemoryFinding(NodeState* node);
  void MendBeside(const JobStateView& job, const NodeId& node, const HeldShard& shard);
  bool Repaired(JobStateView* job, const NodeId& node, const HeldShard& shard);
  void ForgetDamage(JobStateView* job);
  void WatchCopies(JobStateView* job);

  // trust.cc
  void On(const RollBack& e);
  void On(const ReportAnomaly& e);
  void NoteAnomaly(JobStateView* job, const std::string& why);
  void VerifyOlder(JobStateView* job);
  void NoteFile(JobStateView* job, Generation generation, everstep::Step step);
  void TrimLineage(JobStateView* job);
  void GiveUpBeyond(JobStateView* job, const Cut& cut);
  // The plan would start from nothing: takes the newest roll-back back if that gives it a start.
  bool UndoRollBack(JobStateView* job);

  // persist.cc
  void On(const Persisted& e);
  void On(const SaveCheckpoint& e);
  void PersistIfDue(JobStateView* job);  // a step was committed
  // Orders the newest committed step into the checkpoint directory. False: there is nothing to
  // write, or nobody that holds all of it.
  bool StartPersist(JobStateView* job, Reason reason, RequestId request = 0);
  void PersistBreaks(const NodeId& node, const std::string& why);  // the node's part is lost
  void EndPersist(JobStateView* job);
  void GiveUpPersist(JobStateView* job);  // when its time is over
  bool FilesAreAhead(JobStateView* job);  // of the job's generations: it moves beyond them

  // told.cc
  void On(const Told& e);
  void TakeLedger(JobStateView* job, const Told& e, const ToldWord& word);
  void ForgetTold(const JobId& id, JobStateView* job);  // ledger, profile and plan
  std::vector<NodeId> NodesByRank(const JobStateView& job) const;

  // controller.cc
  void Send(const NodeId& node, decltype(Command::body) body);
  void Answer(RequestId request, ReplyCode code, std::string message, std::string hint = "");
  void Journal(JournalRecord record);
  void Forget(const GenerationPlan& plan);  // its record: recovery needs the newest one alone
  // Not in Recover itself, so that recovering the same records again yields the same state: with
  // the first registration or tick after it.
  void JournalRecovery();
  void RecallNodes();
  void Flush();
  bool Bug(SeededBug bug) const { return (options_.bugs & bug) != 0; }
  JobStateView* FindJob(const JobId& id);

  Options options_;
  ClusterState state_;
  std::map<JobId, Runtime> runtime_;
  Timestamp now_;
  // No node's deadline is earlier. Beats only move deadlines away, so it is exact after a tick and
  // a little early before it: an idle tick costs less than a search at each beat.
  Timestamp node_wakeup_;
  std::string recovered_;  // evidence of a recovery that the journal does not have yet
  Decisions* out_ = nullptr;
  std::set<NodeId> dirty_nodes_;
  std::set<JobId> dirty_jobs_, dirty_plans_, dirty_commits_, dirty_ledgers_;
};

}  // namespace everstep::controller
