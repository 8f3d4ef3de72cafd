// One machine of the simulated cluster: a keeper with its workers and memory, and an agent around
// the real AgentCore. Keeper, agent and machine crash apart from each other.
//
//   controller ══stream══ agent (AgentCore) ──inbox── keeper: workers, slots ──datagrams── other
//   nodes
//
// keeper.cc plays the keeper and the checkpoint plane, node.cc the machine and the agent's shell,
// node_files.cc what the agent does with the checkpoint directory, telling.cc what workers tell.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "controller/core/decision.h"
#include "tests/sim/kernel/network.h"
#include "tests/sim/world/files.h"
#include "tests/sim/world/memory.h"
#include "tests/sim/world/training.h"
#include "tests/sim/world/truth.h"
#include "worker/agent/core/agent_core.h"

namespace everstep::sim {

class SimController;
class SimNode;

// What a node reaches. All must outlive it.
struct NodeEnv {
  Timeline* timeline = nullptr;
  Network* network = nullptr;
  Truth* truth = nullptr;
  Training* training = nullptr;
  SimController* controller = nullptr;
  const WorldOptions* options = nullptr;
  Files* files = nullptr;
  std::function<SimNode*(const NodeId&)> peer;
};

inline constexpr const char* kControllerName = "controller";

class SimNode {
 public:
  SimNode(NodeId name, NodeEnv env);

  const NodeId& name() const { return name_; }
  bool booted() const { return booted_; }
  bool agent_up() const { return agent_ != nullptr; }
  bool keeper_up() const { return keeper_ != nullptr; }
  std::uint64_t keeper_id() const { return keeper_ ? keeper_->id : 0; }
  Incarnation keeper_remembers() const { return keeper_ ? keeper_->remembered : 0; }

  // --- faults ---
  void Boot();   // the machine starts; its agent follows
  void Crash();  // power loss: nothing says goodbye
  void CrashAgent();
  void StartAgent();
  void PauseAgent(Timestamp until);  // SIGSTOP
  void CrashKeeper();
  void PauseKeeper(Timestamp until) { keeper_paused_until_ = until; }  // SIGSTOP
  void Signal(std::int32_t local_rank, std::int32_t code);  // the worker ends with this code
  static constexpr std::int32_t kRefuses = 78;  // ... and says that it refuses its input
  void StopWorker(std::int32_t local_rank);     // SIGSTOP
  void MakeUnkillable(std::int32_t local_rank, Timestamp until);
  void FailForksUntil(Timestamp until) { forks_fail_until_ = until; }
  void FailStoresUntil(Timestamp until) { stores_fail_until_ = until; }
  // A fork server that starts meanwhile: is never ready, or cannot be had.
  void HangImportsUntil(Timestamp until) { imports_hang_until_ = until; }
  void FailImportsUntil(Timestamp until) { imports_fail_until_ = until; }
  void Corrupt(std::uint64_t n);
  void Notice(Duration deadline);
  // The stream is gone as far as this node can tell.
  void OnStreamLost(StreamId stream, const std::string& why);
  StreamId stream() const { return stream_; }

  // --- from the controller ---
  void OnCommand(StreamId stream, const controller::Command& command);

  // --- from other nodes' data planes ---
  // `generation`: whose ranks send; a slot may be older, when they restored it.
  // `kept`: the newest committed slot that the sender knows of.
  bool Receive(const JobId& job, Generation generation, HeldShard shard,
               const std::optional<HeldShard>& kept);  // a peer's slot; true: verified, kept
  std::optional<HeldShard> Offer(const JobId& job, const RestorePlan& wanted) const;

  // --- for checkers ---
  // Generations of the job with a live process or one about to be.
  std::set<Generation> LiveGenerations(const JobId& job) const;
  std::vector<HeldShard> Verified(const JobId& job) const;
  std::string DescribeMemory(const JobId& job) const;

 private:
  using ProcessKey = std::pair<Generation, Rank>;
  struct Process {
    std::int32_t pid = 0;
    std::int32_t local_rank = 0;
    std::int32_t world_size = 0;
    bool stopped = false;
    bool capturing = false;
    bool ending = false;     // asked to end: it does not park any more
    Duration patience = {};  // with a commit, until a capture is given up
    Timestamp unkillable_until;
    Timestamp started;
    std::set<Rank> gathered;     // shards of a cut that were read
    std::deque<ToldWord> words;  // for the controller, not acknowledged
    std::uint64_t told = 0;      // number of the newest
    std::uint64_t acknowledged = 0;
    bool saying = false;  // will say them again
  };
  struct KeeperJob {
    CommandSpec command;
    Generation generation = 0;  // newest prepared or activated
    std::optional<agent::Activate> activate;
    std::map<ProcessKey, Process> processes;
    std::map<std::int32_t, std::pair<ProcessKey, Process>> parked;  // by local rank
    std::set<ProcessKey> starting;
    std::map<ProcessKey, WorkerOnNode> exited;
    Generation killed = 0;  // processes of generations up to this die as soon as they are forked
    bool fork_server = false;
    Step step = kNoStep;
    Memory memory;
  };
  struct Keeper {
    std::uint64_t id = 0;
    Incarnation remembered = 0;
    bool controller_away = true;
    std::map<JobId, KeeperJob> jobs;
  };

  // node.cc
  void AttachKeeper();
  void Connect();
  void Tell(agent::Event event);  // into the agent's inbox, in order
  void Pump();
  void StepAgent(const agent::Event& event);
  bool Responsive() const;  // its data plane answers
  void CheckStep(const agent::Event& event, Incarnation before,
                 const agent::Effects& effects) const;
  void ScheduleTick();
  void CarryOut(const agent::Effect& effect);
  void Say(const std::string& what, controller::Event event);
  void AfterAgent(Duration delay, std::string label, std::function<void()> action);
  void AfterKeeper(Duration delay, std::string label, std::function<void()> action);
  Duration Draw(std::int64_t low_ms, std::int64_t high_ms);

  // keeper.cc
  void CarryOutInKeeper(const agent::Effect& effect);
  std::vector<agent::AdoptedJob> Adopted() const;
  KeeperJob* FindJob(const JobId& job);
  Process* FindProcess(const JobId& job, ProcessKey key);
  void StartWorkers(const agent::Activate& activate);
  void ForkAll(const agent::Activate& activate);
  void Fork(const agent::Activate& activate, const WorkerPlan& worker);
  void WatchStart(const JobId& job, ProcessKey key);
  void Restore(const JobId& job, ProcessKey key, const RestorePlan& plan, Timestamp give_up);
  void Restored(const JobId& job, ProcessKey key, const RestorePlan& plan, const HeldShard& shard);
  // A restore by ranges: asks for one shard of the cut that lacks still.
  void Gather(const JobId& job, ProcessKey key, const std::shared_ptr<const RestoreCut>& cut);
  void Assembled(const JobId& job, ProcessKey key, const RestoreCut& cut);
  void JoinGroup(const JobId& job, ProcessKey key, Lineage state, Step step);
  bool Checkpoints(const JobId& job) const;
  void Kill(const JobId& job, Generation generation, Duration grace, Duration park);
  void Park(const JobId& job, ProcessKey key, std::int32_t pid);
  void DieParked(const JobId& job, std::int32_t local_rank, std::int32_t pid, bool by_everstep);
  bool Sessions(const JobId& job) const;
  void Die(const JobId& job, ProcessKey key, std::int32_t pid, std::int32_t code, bool by_everstep);
  void ReportStopped(const JobId& job, ProcessKey key, std::int32_t pid);
  void Capture(const JobId& job, ProcessKey key, std::int32_t pid, Lineage state, Step step,
               Timestamp give_up);
  void Push(const JobId& job, Rank rank, Generation generation);
  void PushTo(const JobId& job, Rank rank, Generation generation, const NodeId& to);
  void PushAll();
  void Scrub();  // every so often, as long as this keeper lives
  void Mend(const agent::MendShard& mend);
  // Gathers what a shard is made of, until it is there or of no use.
  struct Building {
    JobId job;
    Generation generation = 0;
    ShardBuild build;
    std::set<Rank> gathered;
  };
  void Build(const std::shared_ptr<Building>& building);
  void Built(const Building& building);
  void DropKeeper();
  std::optional<std::pair<JobId, ProcessKey>> Pick(std::int32_t local_rank) const;

  // telling.cc
  std::uint64_t TellController(const JobId& job, ProcessKey key, const std::string& word);
  void SayWords(const JobId& job, ProcessKey key, std::int32_t pid);
  void HearWords(const agent::ToldAck& ack);

  // node_files.cc
  const controller::JobSpec* WithFiles(const JobId& job) const;  // nullptr: it has no directory
  std::vector<HeldShard> Found(const JobId& job, const std::vector<Cut>& given_up) const;
  void Persist(const agent::PersistStep& asked);
  void WriteNext(const std::shared_ptr<agent::Persisted>& done,
                 const std::shared_ptr<std::vector<HeldShard>>& copies, const Cut& verified);
  void LoadFiles(const agent::Activate& activate);

  const NodeId name_;
  const NodeEnv env_;
  bool booted_ = false;
  std::unique_ptr<Keeper> keeper_;
  std::uint64_t keeper_life_ = 0;
  std::unique_ptr<agent::AgentCore> agent_;
  std::uint64_t agent_life_ = 0;
  StreamId stream_ = 0;
  std::set<StreamId> streams_;  // of this agent process
  bool connecting_ = false;
  std::deque<agent::Event> inbox_;
  bool pumping_ = false;
  EventId tick_ = 0;
  Timestamp tick_at_;
  Timestamp agent_paused_until_;
  Timestamp agent_gone_since_;
  Timestamp keeper_paused_until_;
  bool controller_away_ = true;  // as the agent sees it
  const Duration clock_skew_;    // this machine's clock against true time
  std::int32_t next_pid_ = 1000;
  Timestamp forks_fail_until_;
  Timestamp stores_fail_until_;
  Timestamp imports_hang_until_;
  Timestamp imports_fail_until_;
};

}  // namespace everstep::sim
