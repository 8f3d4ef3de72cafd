// The engine's side of the keeper's link: who owns whom, what a keeper's events become.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>

#include "proto/base/log.h"
#include "worker/agent/convert.h"
#include "worker/agent/engine.h"
#include "worker/agent/error_file.h"
#include "worker/agent/node_dir.h"
#include "worker/agent/part.h"
#include "worker/agent/start_trouble.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

constexpr Duration kAttachFirst = Milliseconds(100);
constexpr Duration kAttachMax = Seconds(2);
constexpr Duration kKeeperLook = Milliseconds(500);
constexpr Duration kKeeperStopLimit = Milliseconds(1500);
// For a worker's error file and the end of its stderr.
constexpr Duration kExitDetails = Seconds(5);
constexpr std::uint32_t kGiveUpAfter = 3;  // hopeless failures before a keeper was ever attached

}  // namespace

void Engine::Attach() {
  attaching_ = true;
  keeper_->Attach();
}

void Engine::OnKeeperAttached(std::uint64_t link, const v1::KeeperState& state, bool started,
                              Adopted adopted) {
  attaching_ = false;
  const bool same =
      state.keeper_pid() == keeper_pid_ && state.keeper_start_time() == keeper_start_time_;
  if (ever_attached_ && !same && link_ == 0 && keeper_pid_ != 0) {
    Feed(KeeperGone{fmt::format("keeper pid {} is gone", keeper_pid_)});
  }
  link_ = link;
  keeper_pid_ = state.keeper_pid();
  keeper_start_time_ = state.keeper_start_time();
  WriteKeeperPid(options_.node_dir, keeper_pid_);
  keeper_look_at_ = clock_->Now() + kKeeperLook;
  keeper_stopped_since_.reset();
  attach_failures_ = 0;
  keeper_away_since_.reset();
  last_trouble_.clear();
  LogInfo("keeper_attached", {{"node", options_.node},
                              {"pid", keeper_pid_},
                              {"started", started},
                              {"jobs", static_cast<std::uint64_t>(adopted.attached.jobs.size())},
                              {"processes", static_cast<std::int32_t>(state.processes_size())}});
  if (shutdown_by_) return AskShutdown();

  adopted.attached.fresh = started || (ever_attached_ && !same);
  ever_attached_ = true;
  for (const AdoptedJob& job : adopted.attached.jobs) {
    const auto running = std::count_if(job.holds.workers.begin(), job.holds.workers.end(),
                                       [](const WorkerOnNode& w) { return w.running; });
    const auto activate = adopted.activates.find(job.holds.job);
    if (activate != adopted.activates.end()) {
      local_world_[job.holds.job] = activate->second.nproc_per_node;
    }
    LogInfo("job_adopted", {{"job", job.holds.job},
                            {"generation", job.holds.generation},
                            {"activated", job.holds.activated},
                            {"running", static_cast<std::int64_t>(running)},
                            {"old", static_cast<std::uint64_t>(job.old_workers.size())}});
  }
  Feed(adopted.attached);
  // Events that came after the hello's answer, before this ran.
  const auto early = early_events_.find(link);
  if (early != early_events_.end()) {
    for (const v1::KeeperReply& event : early->second) OnKeeperEvent(link, event);
  }
  early_events_.clear();
  ResumeCheckpoints(adopted);
}

// The checkpoint plane keeps no state: it is told again what stands, and asked what lies in memory;
// then the node registers with it.
void Engine::ResumeCheckpoints(const Adopted& adopted) {
  if (transfer_ == nullptr || adopted.attached.jobs.empty()) {
    if (!stream_open_ && !dial_at_) Dial();
    return;
  }
  const auto shared = std::make_shared<const Adopted>(adopted);
  const bool posted = memory_.Post([this, shared] {
    std::map<JobId, std::vector<HeldShard>> found;
    for (const auto& [job, begun] : shared->begun) transfer_->Begin(job, begun.first, begun.second);
    for (const auto& [job, activate] : shared->activates) {
      const auto begun = shared->begun.find(job);
      if (begun != shared->begun.end() && begun->second.first > activate.generation) continue;
      std::string error;
      const std::string dir = DirOf(activate.command).path;
      if (!transfer_->Activate(PartOf(activate, dir), &error)) OnTrouble(job, error);
    }
    for (const AdoptedJob& job : shared->attached.jobs) {
      found[job.holds.job] = transfer_->Survey(job.holds.job);
    }
    Post([this, shared, found = std::move(found)] {
      for (const auto& [job, shards] : found) {
        held_.Set(job, shards);
        const auto activate = shared->activates.find(job);
        if (activate == shared->activates.end()) continue;
        for (const HeldShard& s : shards) {
          if (!s.replica && s.generation == activate->second.generation) {
            Feed(StepCaptured{job, s.generation, s.step});
          }
        }
      }
      if (!stream_open_ && !dial_at_) Dial();
    });
  });
  if (!posted && !stream_open_ && !dial_at_) Dial();
}

void Engine::OnKeeperFailed(const std::string& why, bool hopeless) {
  attaching_ = false;
  if (!keeper_away_since_) keeper_away_since_ = clock_->Now();
  if (why != last_trouble_) LogError("keeper_unreachable", {{"node", options_.node}, {"why", why}});
  last_trouble_ = why;
  if (shutdown_by_) {
    if (ProcessStartTime(keeper_pid_) == 0) Finish(0);
  } else if (hopeless && !ever_attached_ && ++attach_failures_ >= kGiveUpAfter) {
    fmt::print(stderr, "everstep-agent: {}\n", why);
    return Finish(1);
  }
  attach_at_ =
      clock_->Now() +
      std::min(kAttachMax, kAttachFirst * (1 << std::min<std::uint32_t>(attach_failures_, 5)));
  if (ever_attached_) ++attach_failures_;
}

void Engine::OnKeeperLost(std::uint64_t link, const std::string& why) {
  if (link != link_) return;
  link_ = 0;
  keeper_look_at_.reset();
  if (shutdown_by_) {
    // It answers no more once it began to end; its process goes a moment later.
    WriteKeeperPid(options_.node_dir, 0);
    return Finish(0);
  }
  const bool dead = ProcessStartTime(keeper_pid_) != keeper_start_time_;
  LogError("keeper_lost",
           {{"node", options_.node}, {"pid", keeper_pid_}, {"dead", dead}, {"why", why}});
  keeper_away_since_ = clock_->Now();
  if (dead) {
    if (transfer_ != nullptr) transfer_->KeeperGone();
    held_.Clear();
    Feed(KeeperGone{
        fmt::format("keeper pid {} died, and its workers with it: {}", keeper_pid_, why)});
    keeper_pid_ = 0;
  }
  Attach();
}

// A keeper that somebody stopped reaps nobody: a worker's death would stay unseen. It is woken, and
// the log says so. One under a debugger (state t) is left alone.
void Engine::CheckKeeper(Timestamp now) {
  keeper_look_at_ = now + kKeeperLook;
  if (ProcessState(keeper_pid_) != 'T') {
    keeper_stopped_since_.reset();
    return;
  }
  if (!keeper_stopped_since_) keeper_stopped_since_ = now;
  if (now - *keeper_stopped_since_ < kKeeperStopLimit) return;
  LogWarning("keeper_stopped", {{"node", options_.node},
                                {"pid", keeper_pid_},
                                {"stopped_ms", ToMilliseconds(now - *keeper_stopped_since_)},
                                {"action", "SIGCONT"}});
  kill(keeper_pid_, SIGCONT);
  keeper_stopped_since_.reset();
}

void Engine::OnKeeperEvent(std::uint64_t link, const v1::KeeperReply& event) {
  if (link > link_) {
    if (!event.has_told()) early_events_[link].push_back(event);  // words are said again
    return;
  }
  if (link != link_) return;
  switch (event.body_case()) {
    case v1::KeeperReply::kExited: return OnWorkerExit(event.exited());
    case v1::KeeperReply::kForkServer: {
      const v1::KeeperForkServerState& f = event.fork_server();
      if (!f.ready() && !f.failed()) return;
      LogInfo("fork_server", {{"job", f.job()},
                              {"ready", f.ready()},
                              {"pid", f.pid()},
                              {"preload_ms", f.preload_ms()},
                              {"why", f.message().empty() ? "-" : f.message()}});
      return Feed(ForkServerState{f.job(), f.ready(), f.message()});
    }
    case v1::KeeperReply::kParked: {
      const v1::KeeperParked& p = event.parked();
      LogInfo(
          "worker_parked",
          {{"job", p.job()}, {"generation", p.generation()}, {"rank", p.rank()}, {"pid", p.pid()}});
      return Feed(WorkerParked{p.job(), p.generation(), p.rank(), p.pid()});
    }
    case v1::KeeperReply::kTold: {
      const v1::KeeperTold& t = event.told();
      return Feed(WorkerTold{t.job(), t.generation(), t.rank(), t.words()});
    }
    case v1::KeeperReply::kStalled: {
      const v1::KeeperStalled& s = event.stalled();
      LogWarning("worker_stalled", {{"job", s.job()},
                                    {"generation", s.generation()},
                                    {"rank", s.rank()},
                                    {"kind", s.kind()},
                                    {"evidence", s.evidence()}});
      WorkerStalled e{s.job(),      s.generation(),
                      s.rank(),     static_cast<StallKind>(s.kind()),
                      s.evidence(), Milliseconds(s.stalled_ms())};
      return Feed(e);
    }
    default:
      LogWarning("keeper_event_unknown", {{"case", static_cast<std::int32_t>(event.body_case())}});
  }
}

void Engine::OnWorkerExit(const v1::KeeperExited& exited) {
  WorkerExited e{exited.job(), exited.generation(), exited.rank(), exited.pid(),
                 FromKeeper(exited)};
  LogInfo("worker_exited", {{"job", e.job},
                            {"generation", e.generation},
                            {"rank", e.rank},
                            {"pid", e.pid},
                            {"code", e.exit.code},
                            {"by_everstep", e.exit.by_everstep},
                            {"oom_killed", e.exit.oom_killed},
                            {"ran_ms", ToMilliseconds(e.exit.ran)}});
  if (e.exit.code == 0 || e.exit.by_everstep) return Feed(std::move(e));
  // No fault of the script: its generation did not come about, and the next one starts elsewhere.
  if (e.exit.code > 0 && transfer_ != nullptr &&
      transfer_->RestoreFailed(e.job, e.generation, e.rank)) {
    LogWarning("restore_failed",
               {{"job", e.job}, {"generation", e.generation}, {"rank", e.rank}, {"pid", e.pid}});
    Feed(WorkerStalled{e.job, e.generation, e.rank, StallKind::kGroupNotFormed,
                       "what it was to start from is damaged or could not be had", e.exit.ran});
  }
  // Its error file and the end of its stderr, off this thread: they may lie on a slow disk.
  const auto job = core_.jobs().find(e.job);
  LogPaths paths;
  if (job != core_.jobs().end()) {
    paths = WorkerLogPaths(LogRoot(e.job, job->second.command), e.generation, exited.local_rank());
  }
  const std::uint64_t told = ++exits_seen_;
  exits_[told] = {e, clock_->Now() + kExitDetails};
  const bool posted = files_.Post([this, told, e, paths]() mutable {
    FillError(paths.error_json, &e.exit);
    const std::string trouble = StartTrouble(e.exit, paths.stderr_log);
    Post([this, told, e = std::move(e), trouble] {
      if (exits_.erase(told) == 0) return;  // it took too long, the exit is told
      if (!trouble.empty()) {
        LogWarning("group_not_formed", {{"job", e.job},
                                        {"generation", e.generation},
                                        {"rank", e.rank},
                                        {"evidence", trouble}});
        Feed(WorkerStalled{e.job, e.generation, e.rank, StallKind::kGroupNotFormed, trouble,
                           e.exit.ran});
      }
      Feed(e);
    });
  });
  if (!posted) {
    exits_.erase(told);
    Feed(std::move(e));
  }
}

// A log directory that hangs must not keep a death from the controller.
void Engine::TellLateExits(Timestamp now) {
  while (!exits_.empty() && exits_.begin()->second.tell_by <= now) {
    const WorkerExited e = exits_.begin()->second.exit;
    exits_.erase(exits_.begin());
    LogWarning("exit_without_details",
               {{"job", e.job},
                {"generation", e.generation},
                {"rank", e.rank},
                {"why", fmt::format("its log directory does not answer within {} ms",
                                    ToMilliseconds(kExitDetails))}});
    Feed(e);
  }
}

void Engine::Ask(v1::KeeperRequest request, std::function<void(v1::KeeperReply)> done) {
  const auto body = request.body_case();
  keeper_->Send(std::move(request), [this, body, done = std::move(done)](keeper::Reply reply) {
    Post([body, done, message = std::move(reply.message)] {
      if (message.error() != 0 && message.error() != ENOTCONN) {
        LogWarning("keeper_refused", {{"request", static_cast<std::int32_t>(body)},
                                      {"error", message.error()},
                                      {"why", message.message()}});
      }
      if (done) done(message);
    });
  });
}

void Engine::AskKill(const JobId& job, Generation generation, Rank rank, int signal, Duration grace,
                     bool stores, Duration park, bool planned) {
  v1::KeeperRequest request;
  v1::KeeperKill* kill = request.mutable_kill();
  kill->set_job(job);
  kill->set_generation(generation);
  kill->set_rank(rank);
  kill->set_signal(signal);
  kill->set_grace_ms(static_cast<std::uint32_t>(ToMilliseconds(grace)));
  kill->set_stores(stores);
  kill->set_park(park > Duration{});
  kill->set_park_ms(static_cast<std::uint32_t>(ToMilliseconds(park)));
  kill->set_planned(planned);
  Ask(std::move(request), nullptr);
}

}  // namespace everstep::agent
