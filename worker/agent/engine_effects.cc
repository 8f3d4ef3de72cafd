// How each effect of the core is carried out. Order matters only within one destination, and each
// destination (the stream, the keeper's link, a serial worker) keeps it.
#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <memory>
#include <system_error>

#include "proto/base/kill_point.h"
#include "proto/base/log.h"
#include "proto/base/version.h"
#include "proto/wire/convert.h"
#include "worker/agent/convert.h"
#include "worker/agent/engine.h"
#include "worker/agent/node_dir.h"
#include "worker/agent/part.h"
#include "worker/agent/traffic_report.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;
}  // namespace

void Engine::Carry(const Effect& effect) {
  std::visit([this](const auto& e) { On(e); }, effect);
}

// --- to the controller ---

void Engine::On(const SendRegister& e) {
  v1::AgentMessage m;
  v1::Register* r = m.mutable_register_();
  r->set_protocol_version(kProtocolVersion);
  r->set_version(kVersion);
  r->set_node(options_.node);
  r->set_address(address_);
  r->set_data_port(transfer_ == nullptr ? 0 : transfer_->port());
  r->set_slots(options_.slots);
  r->set_boot_id(boot_id_);
  r->set_pid_namespace(pid_namespace_);
  r->set_keeper_pid(keeper_pid_);
  r->set_keeper_start_time(keeper_start_time_);
  r->set_previous_incarnation(e.previous);
  for (const auto& [key, value] : options_.labels) (*r->mutable_labels())[key] = value;
  for (JobOnNode job : e.jobs) {
    job.shards = held_.Of(job.job);
    wire::ToProto(job, r->add_jobs());
  }
  Send(std::move(m));
}

void Engine::On(const SendHeartbeat& e) {
  v1::AgentMessage m = ToWire(e);
  if (transfer_ != nullptr) {
    ToWire(transfer_->traffic()->Report(), m.mutable_heartbeat()->mutable_traffic());
    ToWire(transfer_->scrubbed(), m.mutable_heartbeat()->mutable_scrub());
  }
  Send(std::move(m));
}
void Engine::On(const SendPrepared& e) {
  KillPoint("switch.prepared");
  LogInfo("prepared", {{"job", e.holds.job},
                       {"generation", e.holds.generation},
                       {"store_port", e.store_port},
                       {"shards", static_cast<std::uint64_t>(e.holds.shards.size())},
                       {"refused", e.refused ? e.message : "no"}});
  Send(ToWire(e));
}
void Engine::On(const SendActivated& e) {
  KillPoint("switch.activated");
  LogInfo("activated", {{"job", e.job},
                        {"generation", e.generation},
                        {"workers", static_cast<std::uint64_t>(e.workers.size())},
                        {"failed", e.failed ? e.message : "no"}});
  Send(ToWire(e));
}
void Engine::On(const SendWorkerExited& e) {
  Send(ToWire(e));
}
void Engine::On(const SendWorkerStalled& e) {
  Send(ToWire(e));
}
void Engine::On(const SendShardCopied& e) {
  KillPoint("commit.reporting");
  Send(ToWire(e));
  KillPoint("commit.reported");
}
void Engine::On(const SendShardDamaged& e) {
  Send(ToWire(e));
}
void Engine::On(const SendPersisted& e) {
  KillPoint("persist.reporting");
  Send(ToWire(e));
}
void Engine::On(const SendTold& e) {
  Send(ToWire(e));
}
void Engine::On(const SendNotice& e) {
  Send(ToWire(e));
}
void Engine::On(const SendNodeWarm& e) {
  Send(ToWire(e));
}
void Engine::On(const SendStopped& e) {
  LogInfo("stopped", {{"job", e.job}, {"generation", e.generation}});
  Send(ToWire(e));
}
void Engine::On(const SendKeeperLost& e) {
  v1::AgentMessage m;
  m.mutable_keeper_lost()->set_message(e.message);
  m.mutable_keeper_lost()->set_new_keeper_pid(keeper_pid_);
  m.mutable_keeper_lost()->set_new_keeper_start_time(keeper_start_time_);
  Send(std::move(m));
}
void Engine::On(const CloseSession& e) {
  LogError("session_refused", {{"node", options_.node}, {"why", e.why}});
  session_->Close(e.why);
}

// --- to the keeper ---

void Engine::On(const StartForkServer& e) {
  v1::Command command;
  if (!wire::ToProto(e.command, &command)) {
    return Feed(ForkServerState{e.job, false, "the job's command is damaged"});
  }
  if (!command.preload() || command.kind() == v1::Command::PROGRAM) {
    return Feed(ForkServerState{e.job, false, "the job runs without a fork server"});
  }
  v1::KeeperRequest request;
  *request.mutable_fork_server() = BuildForkServer(e.job, command, local_world_[e.job]);
  Ask(std::move(request), [this, job = e.job](const v1::KeeperReply& reply) {
    if (reply.error() != 0) Feed(ForkServerState{job, false, reply.message()});
  });
}

void Engine::On(const StartStore& e) {
  v1::Command command;
  if (!wire::ToProto(e.command, &command)) {
    return Feed(StoreFailed{e.job, e.generation, "the job's command is damaged"});
  }
  v1::KeeperRequest request;
  *request.mutable_store_host() = BuildStoreHost(e.job, e.generation, address_, command);
  Ask(std::move(request), [this, job = e.job,
                           generation = e.generation](const v1::KeeperReply& reply) {
    if (reply.error() == ENOTCONN || reply.error() == ESTALE) {
      return Feed(StoreFailed{job, generation, reply.message()});
    }
    if (reply.error() != 0) {
      // A script need not know torch at all; one that does opens the store on rank 0 by itself.
      const std::uint32_t port = FreePort(address_);
      if (port == 0) return Feed(StoreFailed{job, generation, reply.message()});
      LogInfo("store_left_to_rank_0",
              {{"job", job}, {"generation", generation}, {"port", port}, {"why", reply.message()}});
      storeless_[job] = generation;
      return Feed(StoreReady{job, generation, port});
    }
    Feed(StoreReady{job, generation, reply.store_ready().port()});
  });
}

std::string Engine::LogRoot(const JobId& job, const CommandSpec& spec) const {
  v1::Command command;
  wire::ToProto(spec, &command);
  return JobLogRoot(options_.node_dir,
                    command.log_dir().empty() ? options_.log_dir : command.log_dir(), job,
                    options_.node);
}

void Engine::On(const StartWorkers& e) {
  const Activate& a = e.activate;
  v1::Command command;
  std::string error;
  std::vector<WorkerSpawn> spawns;
  if (wire::ToProto(a.command, &command)) {
    if (command.log_dir().empty()) command.set_log_dir(options_.log_dir);
    const auto job = core_.jobs().find(a.job);
    const auto storeless = storeless_.find(a.job);
    const bool hosted = storeless == storeless_.end() || storeless->second != a.generation;
    const std::uint32_t store = job == core_.jobs().end() || !hosted ? 0 : job->second.store_port;
    spawns = BuildSpawns(a, command, identity_, store, &error);
  } else {
    error = "the job's command is damaged; submit the job again";
  }
  if (!error.empty()) {
    for (const WorkerPlan& w : a.plan.workers) {
      Feed(WorkerStartFailed{a.job, a.generation, w.rank, error});
    }
    return;
  }
  for (const auto& [request, tail] : follows_) {
    if (tail.job != a.job) continue;
    std::vector<TailFile> files;
    for (const WorkerSpawn& s : spawns) {
      if (tail.rank >= 0 && tail.rank != s.request.rank()) continue;
      files.push_back({a.job, a.generation, s.request.rank(), false, s.paths.stdout_log});
      files.push_back({a.job, a.generation, s.request.rank(), true, s.paths.stderr_log});
    }
    tailer_->Add(request, std::move(files));
  }
  const std::string root = LogRoot(a.job, a.command);
  LogIndex index{root, a.generation, {}};
  for (const WorkerSpawn& s : spawns)
    index.workers.emplace_back(s.request.local_rank(), s.request.rank());
  std::vector<JobId> here;
  for (const auto& [job, view] : core_.jobs()) here.push_back(job);
  if (newest_logs_.size() >= kMaxNewestLogs) {
    std::erase_if(newest_logs_,
                  [this](const auto& entry) { return !core_.jobs().contains(entry.first); });
  }
  newest_logs_[a.job] = index;
  auto shared = std::make_shared<std::vector<WorkerSpawn>>(std::move(spawns));
  // What lies in files is read before the workers start, so that a damaged one is told as a start
  // that failed: an older checkpoint is taken then.
  const bool from_files = FileRestoreBytes(a.plan) > 0;
  SerialWorker& worker = from_files ? disk_load_ : files_;
  const bool posted = worker.Post(
      [this, root, shared, index, here, from_files, a, part = PartOf(a, DirOf(a.command).path)] {
        std::string why;
        for (const WorkerSpawn& s : *shared) {
          if (why.empty()) MakeLogDirectory(s.paths, &why);
        }
        if (why.empty()) file_plane_->AwaitEarlier(a.job, a.generation, kReadEnds, &why);
        if (why.empty() && from_files) file_plane_->Load(DirOf(a.command), a, &why);
        if (why.empty() && transfer_ != nullptr) transfer_->Activate(part, &why);
        Post([this, shared, why, job = part.job, generation = part.generation] {
          Spawn(job, generation, std::move(*shared), why);
        });
        // While the workers start.
        WriteLogIndex(options_.node_dir, part.job, index);
        PruneAttempts(root, kKeepAttempts);
        PruneJobs(options_.node_dir, here, kKeepJobs);
      });
  if (!posted) FailStart(a.job, a.generation, *shared, "the agent's queue for files is full");
}

void Engine::FailStart(const JobId& job, Generation generation,
                       const std::vector<WorkerSpawn>& spawns, const std::string& error) {
  for (const WorkerSpawn& s : spawns) {
    Feed(WorkerStartFailed{job, generation, s.request.rank(), error});
  }
}

void Engine::Spawn(const JobId& job, Generation generation, std::vector<WorkerSpawn> spawns,
                   const std::string& error) {
  const auto view = core_.jobs().find(job);
  if (!error.empty()) return FailStart(job, generation, spawns, error);
  if (view == core_.jobs().end() || view->second.generation != generation ||
      view->second.phase != JobView::Phase::kStarting) {
    return FailStart(job, generation, spawns, "the generation is over");
  }
  for (WorkerSpawn& s : spawns) {
    const Rank rank = s.request.rank();
    const std::int32_t local_rank = s.request.local_rank();
    v1::KeeperRequest request;
    *request.mutable_spawn() = std::move(s.request);
    Ask(std::move(request),
        [this, job, generation, rank, local_rank](const v1::KeeperReply& reply) {
          if (reply.error() == ENOTCONN) return;  // the next attachment tells what became of it
          if (reply.error() != 0) {
            return Feed(WorkerStartFailed{job, generation, rank, reply.message()});
          }
          LogInfo("worker_started", {{"job", job},
                                     {"generation", generation},
                                     {"rank", rank},
                                     {"pid", reply.spawned().pid()},
                                     {"forked", reply.spawned().from_fork_server()},
                                     {"resumed", reply.spawned().resumed()}});
          KillPoint("switch.worker_started");
          Feed(WorkerStarted{job, generation, rank, local_rank, reply.spawned().pid()});
          // A kill may have passed the spawn on its way.
          const auto now = core_.jobs().find(job);
          if (now == core_.jobs().end() || now->second.generation != generation ||
              now->second.phase == JobView::Phase::kStopping) {
            AskKill(job, generation, -1, SIGKILL, Duration{}, false);
          }
        });
  }
}

void Engine::On(const KillWorkers& e) {
  AskKill(e.job, e.generation, -1, e.grace > Duration{} ? SIGTERM : SIGKILL, e.grace, e.stores,
          e.park, e.planned);
}

// A drill is a real fault: the signal does not go through the keeper, which would take the death
// for one that Everstep asked for.
void Engine::On(const TellWorker& e) {
  v1::KeeperRequest request;
  v1::KeeperToldAck* ack = request.mutable_told_ack();
  ack->set_job(e.ack.job);
  ack->set_generation(e.ack.generation);
  ack->set_rank(e.ack.rank);
  ack->set_sequence(e.ack.sequence);
  Ask(std::move(request), nullptr);
}

void Engine::On(const KillRank& e) {
  const auto job = core_.jobs().find(e.job);
  if (job == core_.jobs().end()) return;
  for (const WorkerOnNode& w : job->second.workers) {
    if (w.rank != e.rank || !w.running || w.pid <= 1) continue;
    const int failed = kill(w.pid, e.signal) == 0 ? 0 : errno;
    LogInfo("drill", {{"job", e.job},
                      {"rank", e.rank},
                      {"pid", w.pid},
                      {"signal", e.signal},
                      {"result", failed == 0 ? "sent" : std::generic_category().message(failed)}});
  }
}

void Engine::On(const ForgetJob& e) {
  if (file_plane_ != nullptr) file_plane_->Forget(e.job);
  if (transfer_ != nullptr) transfer_->Forget(e.job);
  held_.Forget(e.job);
  local_world_.erase(e.job);
  storeless_.erase(e.job);
  for (const std::string& key : {PreparedKey(e.job), ActivatedKey(e.job)}) {
    v1::KeeperRequest request;
    request.mutable_remember()->set_key(key);
    Ask(std::move(request), nullptr);
  }
  v1::KeeperRequest request;
  request.mutable_forget()->set_job(e.job);
  Ask(std::move(request), nullptr);
  LogInfo("job_forgotten", {{"job", e.job}});
}

void Engine::On(const RememberIncarnation& e) {
  v1::KeeperRequest request;
  *request.mutable_remember() = Remember(e);
  Ask(std::move(request), nullptr);
}
void Engine::On(const RememberPrepared& e) {
  KillPoint("switch.begun");
  if (file_plane_ != nullptr) file_plane_->Begin(e.job, e.generation);
  if (transfer_ != nullptr) transfer_->Begin(e.job, e.generation, e.data_key);
  v1::KeeperRequest request;
  *request.mutable_remember() = Remember(e);
  Ask(std::move(request), nullptr);
}
void Engine::On(const RememberActivated& e) {
  KillPoint("switch.activating");
  v1::KeeperRequest request;
  *request.mutable_remember() = Remember(e);
  Ask(std::move(request), nullptr);
}

// --- to the checkpoint plane and the logs ---

void Engine::On(const Survey& e) {
  if (transfer_ == nullptr) return Feed(Surveyed{e.job, e.generation, {}});
  const bool posted = memory_.Post([this, e] {
    const std::vector<HeldShard> files = SurveyFiles(DirOf(e.command), e.job, e.given_up);
    Post([this, e, files, shards = transfer_->Survey(e.job)]() mutable {
      held_.Set(e.job, shards);
      shards.insert(shards.end(), files.begin(), files.end());
      Feed(Surveyed{e.job, e.generation, std::move(shards)});
    });
  });
  if (!posted) LogWarning("survey_dropped", {{"job", e.job}, {"generation", e.generation}});
}

void Engine::On(const MendShard& e) {
  if (transfer_ != nullptr) transfer_->Mend(e.job, e.shard, e.source_address);
}

void Engine::On(const MakeShard& e) {
  if (e.build.shard.built != 0) KillPoint("parity.ordered");
  if (e.build.shard.built == 0) KillPoint("rebuild.ordered");
  if (transfer_ != nullptr) transfer_->Make(e.job, e.generation, e.build);
}

CheckpointDir Engine::DirOf(const CommandSpec& spec) {
  v1::Command command;
  if (!wire::ToProto(spec, &command)) return {};
  return {command.checkpoint_dir(), command.checkpoint_keep()};
}

std::vector<HeldShard> Engine::SurveyFiles(const CheckpointDir& dir, const JobId& job,
                                           const std::vector<Cut>& given_up) {
  if (dir.path.empty()) return {};
  auto answer = std::make_shared<std::promise<std::vector<HeldShard>>>();
  std::future<std::vector<HeldShard>> found = answer->get_future();
  const bool posted = disk_look_.Post([this, dir, job, given_up, answer] {
    answer->set_value(file_plane_->Survey(dir, job, given_up));
  });
  if (posted && found.wait_for(kFileSurvey) == std::future_status::ready) return found.get();
  LogWarning("checkpoint_dir_silent",
             {{"job", job},
              {"directory", dir.path},
              {"why", fmt::format("it does not answer within {} ms; the restore does without it",
                                  ToMilliseconds(kFileSurvey))}});
  return {};
}

void Engine::On(const PersistStep& e) {
  KillPoint("persist.asked");
  const Timestamp began = clock_->Now();
  const auto failed = [&](const std::string& why) {
    Feed(Persisted{.job = e.job, .generation = e.generation, .step = e.step, .error = why});
  };
  const CheckpointDir dir = DirOf(e.command);
  if (dir.path.empty()) return failed("the job's command names no checkpoint directory");
  ++copying_[e.job].steps;
  const bool posted = memory_.Post([this, e, dir, began] {
    auto slots = std::make_shared<std::vector<SlotCopy>>();
    std::string why;
    const bool copied = file_plane_->Copy(e.job, e.generation, e.step, e.ranks, slots.get(), &why);
    const auto tell = [this, began, job = e.job](Persisted done) {
      Post([this, began, done = std::move(done)]() mutable {
        done.took = clock_->Now() - began;
        LogInfo(done.error.empty() ? "persisted" : "persist_failed",
                {{"job", done.job},
                 {"step", done.step},
                 {"generation", done.generation},
                 {"sealed", done.sealed},
                 {"bytes", done.bytes},
                 {"ms", static_cast<std::uint64_t>(ToMilliseconds(done.took))},
                 {"why", done.error}});
        Feed(std::move(done));
      });
    };
    Post([this, job = e.job] {
      const auto copying = copying_.find(job);
      if (copying == copying_.end() || --copying->second.steps > 0) return;
      const std::vector<MarkCommitted> later = std::move(copying->second.later);
      copying_.erase(copying);
      for (const MarkCommitted& mark : later) On(mark);
    });
    Persisted done{.job = e.job, .generation = e.generation, .step = e.step, .error = why};
    if (!copied) return tell(std::move(done));
    const bool queued = disk_.Post([this, e, dir, slots, tell] {
      tell(file_plane_->Write(dir, e.job, e.generation, e.step, std::move(*slots), e.verified));
    });
    if (queued) return;
    done.error = "the agent's queue for its disk is full";
    tell(std::move(done));
  });
  if (!posted) {
    if (--copying_[e.job].steps == 0) copying_.erase(e.job);
    failed("the agent's queue for its memory is full");
  }
}

void Engine::On(const MarkCommitted& e) {
  if (transfer_ == nullptr) return;
  if (const auto copying = copying_.find(e.job); copying != copying_.end()) {
    copying->second.later.push_back(e);
    return;
  }
  KillPoint("commit.heard");
  if (e.step != kNoStep) transfer_->MarkCommitted(e.job, e.generation, e.step);
  if (e.released != kNoStep) transfer_->MarkReleased(e.job, e.generation, e.released);
}
void Engine::On(const ControllerAway& e) {
  if (transfer_ != nullptr) transfer_->SetControllerAway(e.away);
}

std::vector<TailFile> Engine::TailFiles(const TailLogs& request, Generation generation,
                                        const std::vector<WorkerOnNode>& workers) const {
  std::vector<TailFile> files;
  const auto add = [&](const std::string& root, Generation g, std::int32_t local_rank, Rank rank) {
    const LogPaths paths = WorkerLogPaths(root, g, local_rank);
    files.push_back({request.job, g, rank, false, paths.stdout_log});
    files.push_back({request.job, g, rank, true, paths.stderr_log});
  };
  // A request may come while the workers are being started, or just after a short job's end.
  const auto newest = newest_logs_.find(request.job);
  if (newest != newest_logs_.end() &&
      (generation == 0 || generation == newest->second.generation)) {
    for (const auto& [local_rank, rank] : newest->second.workers) {
      if (request.rank < 0 || request.rank == rank) {
        add(newest->second.root, newest->second.generation, local_rank, rank);
      }
    }
    return files;
  }
  const auto view = core_.jobs().find(request.job);
  if (view != core_.jobs().end() && !workers.empty()) {
    const std::string root = LogRoot(request.job, view->second.command);
    for (const WorkerOnNode& w : workers) add(root, generation, w.local_rank, w.rank);
    return files;
  }
  // Who follows gets each generation's files as it starts; what an earlier life of this node said
  // was sent by that one.
  if (request.follow) return files;
  // Between two generations, or after the job's end: what it said last.
  const LogIndex index = ReadLogIndex(options_.node_dir, request.job);
  for (const auto& [local_rank, rank] : index.workers) {
    if (request.rank < 0 || request.rank == rank)
      add(index.root, index.generation, local_rank, rank);
  }
  return files;
}

void Engine::On(const Tail& e) {
  const TailLogs& t = e.request;
  if (t.cancel) {
    follows_.erase(t.request);
    return tailer_->Cancel(t.request);
  }
  if (t.follow) follows_[t.request] = t;
  if (tailer_->Start(t.request, TailFiles(t, e.generation, e.workers), t.follow, t.tail_lines)) {
    return;
  }
  follows_.erase(t.request);
  v1::AgentMessage m;
  m.mutable_log_lines()->set_request(t.request);
  m.mutable_log_lines()->set_job(t.job);
  m.mutable_log_lines()->set_end(true);
  Send(std::move(m));
}

void Engine::On(const Dropped& e) {
  LogInfo("message_dropped", {{"what", e.what}, {"why", e.why}});
}

}  // namespace everstep::agent
