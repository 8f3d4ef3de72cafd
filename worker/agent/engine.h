// The shell around the agent's core: one thread owns the core, everything else (the stream to the
// controller, the keeper's link, the checkpoint plane, signals, timers) posts into its mailbox.
//
//   gRPC --ControllerMessage--+
//   keeper --KeeperReply------+--> mailbox --> Feed(event) --> core --> effects --> Carry
//   transfer, signals, disk---+                                (one thread: Run's caller)
//
// What may block (files, a keeper that starts, memory to verify) runs on the serial workers and
// posts its outcome. The engine decides nothing about jobs; it keeps only what effects need (ids,
// paths).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "agent.pb.h"
#include "checkpoint/transfer/transfer_service.h"
#include "proto/base/clock.h"
#include "proto/base/mailbox.h"
#include "worker/agent/core/agent_core.h"
#include "worker/agent/dial_backoff.h"
#include "worker/agent/file_plane.h"
#include "worker/agent/held_shards.h"
#include "worker/agent/keeper_convert.h"
#include "worker/agent/keeper_door.h"
#include "worker/agent/local_command.h"
#include "worker/agent/log_index.h"
#include "worker/agent/log_tail.h"
#include "worker/agent/options.h"
#include "worker/agent/serial_worker.h"
#include "worker/agent/session.h"

namespace everstep::agent {

// Starts the checkpoint plane (checkpoint::TransferService::Start); null: this node has none.
using TransferFactory =
    std::function<checkpoint::Result<std::unique_ptr<checkpoint::TransferService>>(
        const checkpoint::TransferOptions&, checkpoint::ArenaHost*, checkpoint::Listener*,
        checkpoint::ShardFiles*)>;

class Engine final : private checkpoint::Listener {
 public:
  // `clock` must outlive the engine.
  Engine(AgentOptions options, const Clock* clock, TransferFactory transfer);
  ~Engine() override;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const AgentOptions& options() const { return options_; }

  // The engine's loop; returns the process's exit code. Once.
  int Run();

  // Thread-safe, all three.
  // The node leaves: the controller is told and may move workers away within leave_timeout; then
  // workers and keeper end, and Run returns 0. A second call does not wait for the controller.
  void Leave(const std::string& source);
  // The agent ends alone: keeper and workers run on.
  void Quit();
  // Whoever brought this node is gone: workers and keeper end now.
  void LifelineCut();

  static constexpr std::size_t kMailbox = 65536;
  static constexpr std::size_t kMaxInbound = 1024;  // controller's messages not yet looked at
  static constexpr std::size_t kKeepAttempts = 20;  // log directories of one job on this node
  static constexpr std::size_t kKeepJobs = 100;     // ... and of jobs that are over
  static constexpr std::size_t kMaxNewestLogs = 256;
  static constexpr Duration kFileSurvey = Seconds(5);
  static constexpr std::chrono::milliseconds kReadEnds{10'000};  // one read of a MiB, at most

 private:
  // --- engine.cc: the loop, the session, the node's end ---
  void Post(std::function<void()> task);
  void Feed(Event event);
  void HandleOverflow();
  void CheckTimers(Timestamp now);
  std::optional<Timestamp> NextTimer() const;
  void StartTransfer();
  void Dial();
  void OnMessage(std::uint64_t stream, const everstep::v1::ControllerMessage& message);
  void OnStreamLost(std::uint64_t stream, const std::string& why);
  void Send(everstep::v1::AgentMessage message);
  void CheckLeave(Timestamp now);
  void BeginShutdown();
  void AskShutdown();
  void CheckKeeper(Timestamp now);
  void Finish(int exit_code);

  // --- engine_keeper.cc: the keeper's link ---
  void Attach();
  void OnKeeperAttached(std::uint64_t link, const everstep::v1::KeeperState& state, bool started,
                        Adopted adopted);
  void OnKeeperEvent(std::uint64_t link, const everstep::v1::KeeperReply& event);
  void OnKeeperLost(std::uint64_t link, const std::string& why);
  void OnKeeperFailed(const std::string& why, bool hopeless);
  void OnWorkerExit(const everstep::v1::KeeperExited& exited);
  void TellLateExits(Timestamp now);
  void ResumeCheckpoints(const Adopted& adopted);
  void Ask(everstep::v1::KeeperRequest request,
           std::function<void(everstep::v1::KeeperReply)> done);
  // `park` 0: nobody is parked; `planned`: after their step.
  void AskKill(const JobId& job, Generation generation, Rank rank, int signal, Duration grace,
               bool stores, Duration park = {}, bool planned = false);

  // --- engine_effects.cc: one method for each effect ---
  void Carry(const Effect& effect);
  void On(const SendRegister& e);
  void On(const SendHeartbeat& e);
  void On(const SendPrepared& e);
  void On(const SendActivated& e);
  void On(const SendWorkerExited& e);
  void On(const SendWorkerStalled& e);
  void On(const SendShardCopied& e);
  void On(const SendShardDamaged& e);
  void On(const SendPersisted& e);
  void On(const SendTold& e);
  void On(const SendNotice& e);
  void On(const SendNodeWarm& e);
  void On(const SendKeeperLost& e);
  void On(const SendStopped& e);
  void On(const CloseSession& e);
  void On(const StartForkServer& e);
  void On(const StartStore& e);
  void On(const StartWorkers& e);
  void On(const KillWorkers& e);
  void On(const TellWorker& e);
  void On(const KillRank& e);
  void On(const ForgetJob& e);
  void On(const RememberIncarnation& e);
  void On(const RememberPrepared& e);
  void On(const RememberActivated& e);
  void On(const Survey& e);
  void On(const MendShard& e);
  void On(const MakeShard& e);
  void On(const MarkCommitted& e);
  void On(const PersistStep& e);
  void On(const ControllerAway& e);
  void On(const Tail& e);
  void On(const Dropped& e);
  void Spawn(const JobId& job, Generation generation, std::vector<WorkerSpawn> spawns,
             const std::string& error);
  void FailStart(const JobId& job, Generation generation, const std::vector<WorkerSpawn>& spawns,
                 const std::string& error);
  static CheckpointDir DirOf(const CommandSpec& command);
  // Files in the job's directory; empty when it does not answer within kFileSurvey.
  std::vector<HeldShard> SurveyFiles(const CheckpointDir& dir, const JobId& job,
                                     const std::vector<Cut>& given_up);
  std::string LogRoot(const JobId& job, const CommandSpec& command) const;
  std::vector<TailFile> TailFiles(const TailLogs& request, Generation generation,
                                  const std::vector<WorkerOnNode>& workers) const;

  // checkpoint::Listener, on the service's threads.
  void OnCaptured(const JobId& job, Generation generation, Rank rank, Step step) override;
  void OnCopied(const JobId& job, const HeldShard& shard) override;
  void OnDamaged(const JobId& job, const HeldShard& shard, std::int64_t chunk,
                 const char* by) override;
  void OnTrouble(const JobId& job, const std::string& what) override;

  const AgentOptions options_;
  LocalCommand local_command_;
  const Clock* const clock_;
  const TransferFactory transfer_factory_;
  NodeIdentity identity_;
  std::string address_;
  std::string boot_id_;
  std::uint64_t pid_namespace_ = 0;

  AgentCore core_;
  std::deque<Event> events_;  // fed while another was being carried out
  bool stepping_ = false;
  bool done_ = false;
  int exit_code_ = 0;

  // the session
  DialBackoff backoff_;
  DialBackoff::Dial next_dial_;   // or the one that is under way
  std::size_t addresses_ = 1;     // at the last dial
  std::string dialling_, stood_;  // that dial's address; the one that last had a registration
  std::uint64_t stream_ = 0;      // of the newest dial
  bool stream_open_ = false;
  std::optional<Timestamp> dial_at_;
  Timestamp look_at_;                     // while dial_at_ is set: next look for other addresses
  std::vector<std::string> dialled_;      // the addresses at the last dial
  std::optional<Timestamp> register_by_;  // no Registered by then: dial anew
  std::string last_loss_;                 // logged already
  std::atomic<std::uint64_t> incarnation_{0};  // of the registration that stands, for the tailer
  std::atomic<std::size_t> inbound_{0};
  std::map<std::uint64_t, TailLogs> follows_;
  // The files of each job's newest generation that this agent started, known before its workers are
  // and after it is forgotten. At most kMaxNewestLogs.
  std::map<JobId, LogIndex> newest_logs_;

  // the keeper
  std::uint64_t link_ = 0;  // that is attached; 0: none
  std::int32_t keeper_pid_ = 0;
  std::uint64_t keeper_start_time_ = 0;
  bool ever_attached_ = false;
  bool attaching_ = false;
  std::uint32_t attach_failures_ = 0;
  std::optional<Timestamp> attach_at_;
  std::optional<Timestamp> keeper_away_since_;
  std::optional<Timestamp> keeper_look_at_;  // when its process state is looked at next
  std::optional<Timestamp> keeper_stopped_since_;
  std::map<std::uint64_t, std::vector<everstep::v1::KeeperReply>> early_events_;
  std::string last_trouble_;

  // Exits whose details are being read, in the order they came. Told without them at tell_by.
  struct DetailedExit {
    WorkerExited exit;
    Timestamp tell_by;
  };
  std::map<std::uint64_t, DetailedExit> exits_;
  std::uint64_t exits_seen_ = 0;

  // Workers a node by job, from its Warm: a fork server needs its workers' environment ahead of
  // them.
  std::map<JobId, std::uint32_t> local_world_;

  // Generations whose store host did not start (an interpreter without torch, say): rank 0 serves
  // then.
  std::map<JobId, Generation> storeless_;

  HeldShards held_;

  // Word of newer commits waits while a step is copied out of its slot: a trainer overwrites what
  // it does not know to be the newest. Steps being copied, and what came meanwhile.
  struct Copying {
    std::uint32_t steps = 0;
    std::vector<MarkCommitted> later;
  };
  std::map<JobId, Copying> copying_;

  // the end
  bool leaving_ = false;
  std::optional<Timestamp> leave_by_;
  std::optional<Timestamp> shutdown_by_;

  std::atomic<bool> overflow_{false};
  Mailbox<std::function<void()>> mailbox_;

  // What has threads, in the order of construction; destroyed in reverse, callbacks first.
  SerialWorker files_;      // log directories, error files, arenas of a start
  SerialWorker memory_;     // surveys
  SerialWorker disk_;       // writes to checkpoint directories
  SerialWorker disk_load_;  // reads from them, before workers start
  SerialWorker disk_look_;  // lists them: a disk that hangs holds up nothing else
  std::unique_ptr<KeeperDoor> keeper_;
  std::unique_ptr<FilePlane> file_plane_;
  std::unique_ptr<checkpoint::TransferService> transfer_;
  std::unique_ptr<SessionClient> session_;
  std::unique_ptr<LogTailer> tailer_;
};

}  // namespace everstep::agent
