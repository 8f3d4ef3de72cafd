// The half of Workers that watches: ends, stops, orphans, deadlines.
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "proto/base/process_stat.h"
#include "worker/keeper/process.h"
#include "worker/keeper/workers.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kStopToldNs = 300 * kMs;       // stopped for this long: told
constexpr std::int64_t kLearnAfterNs = 10'000 * kMs;  // by then a script trains
constexpr std::int64_t kScanNs = 500 * kMs;           // process states are read this often
// On a starved machine imports take long, and those of a fresh process, from the beginning, longer.
constexpr std::int64_t kWaitOnNs = 5'000 * kMs;     // for a fork server that advances, at a time
constexpr std::int64_t kWaitMostNs = 45'000 * kMs;  // the agent gives the start up after 60 s

}  // namespace

Workers::ExitAnswer Workers::OnExit(pid_t pid, int code) {
  Worker* worker = FindPid(pid);
  if (worker == nullptr) {
    const bool starting = std::any_of(workers_.begin(), workers_.end(), [](const auto& item) {
      return item.second->phase == Phase::kStarting && item.second->forked;
    });
    return starting ? ExitAnswer::kLater : ExitAnswer::kUnknown;
  }
  // Its status pipe says first whether it began.
  if (worker->phase == Phase::kStarting) return ExitAnswer::kLater;
  // What it left behind in its group goes with it, unless it ended well and by itself: then it is
  // kept until its generation is over (a helper that still uploads).
  if (code != 0 || worker->by_request) ::kill(-pid, SIGKILL);
  worker->phase = Phase::kExited;
  worker->kill_at_ns = 0;
  worker->park_at_ns = 0;
  worker->parked = false;
  v1::KeeperExited& exit = worker->exit;
  exit.set_job(worker->spec.job());
  exit.set_generation(worker->spec.generation());
  exit.set_rank(worker->spec.rank());
  exit.set_local_rank(worker->spec.local_rank());
  exit.set_pid(pid);
  exit.set_code(code);
  exit.set_by_request(worker->by_request);
  exit.set_exit_ns(WallNanos());
  exit.set_ran_ms((MonotonicNanos() - worker->started_ns) / kMs);
  exit.set_error_file(worker->error_file);
  const std::int64_t kills = MemoryKills();
  exit.set_oom_killed(code == -SIGKILL && !worker->by_request && kills > memory_kills_);
  memory_kills_ = kills;
  LogInfo("worker_exited", {{"job", exit.job()},
                            {"generation", exit.generation()},
                            {"rank", exit.rank()},
                            {"pid", pid},
                            {"code", code},
                            {"by_request", exit.by_request()},
                            {"oom_killed", exit.oom_killed()}});
  v1::KeeperReply event;
  *event.mutable_exited() = exit;
  context_->tell_owner(event);
  return ExitAnswer::kReap;
}

void Workers::OnStopped(pid_t pid, bool stopped) {
  Worker* worker = FindPid(pid);
  if (worker == nullptr) return;
  if (!stopped) {
    worker->stopped_ns = 0;
    worker->stop.Reset();
  } else if (worker->stopped_ns == 0) {
    worker->stopped_ns = MonotonicNanos();
  }
}

void Workers::ReapOrphans() {
  const std::vector<pid_t> servers = fork_servers_->Pids();
  for (const pid_t pid : ListChildren()) {
    if (FindPid(pid) != nullptr) continue;
    if (std::find(servers.begin(), servers.end(), pid) != servers.end()) continue;
    if (Fenced(pid)) ::kill(pid, SIGKILL);
  }
}

// By its session (a worker leads one), or, where it made its own, by the environment it began with.
bool Workers::Fenced(pid_t pid) const {
  const auto stat = ReadProcessStat(pid);
  if (!stat) return false;
  for (const auto& [key, worker] : workers_) {
    if (worker->pid == stat->session) return Stale(key.job, key.generation);
  }
  const auto job = ReadProcEnvironment(pid, "EVERSTEP_JOB");
  const auto generation = ReadProcEnvironment(pid, "EVERSTEP_GENERATION");
  if (!job || !generation) return false;
  std::uint64_t number = 0;
  std::from_chars(generation->data(), generation->data() + generation->size(), number);
  return Stale(*job, number);
}

std::optional<std::int64_t> Workers::NextDeadline() const {
  std::optional<std::int64_t> next;
  const auto consider = [&next](std::int64_t at) {
    if (at != 0 && (!next || at < *next)) next = at;
  };
  for (const auto& [key, worker] : workers_) {
    if (worker->phase == Phase::kExited) continue;
    consider(worker->kill_at_ns);
    consider(worker->park_at_ns);
    consider(worker->start_limit_ns);
    if (worker->stopped_ns != 0 && !worker->by_request) {
      consider(worker->stop.told() ? worker->stop.again_ns() : worker->stopped_ns + kStopToldNs);
    }
    if (worker->phase == Phase::kRunning) consider(next_scan_ns_ == 0 ? 1 : next_scan_ns_);
  }
  return next;
}

void Workers::Tick(std::int64_t now) {
  const bool scan = now >= next_scan_ns_;
  if (scan) next_scan_ns_ = now + kScanNs;
  std::vector<WorkerKey> late;
  for (auto& [key, worker] : workers_) {
    if (worker->phase == Phase::kExited) continue;
    if (worker->start_limit_ns != 0 && now >= worker->start_limit_ns) late.push_back(key);
    if (worker->kill_at_ns != 0 && now >= worker->kill_at_ns) {
      worker->kill_at_ns = 0;
      LogInfo("worker_killed", {{"job", key.job},
                                {"rank", key.rank},
                                {"pid", worker->pid},
                                {"why", "still there after the grace"}});
      Signal(worker.get(), SIGKILL);
    }
    if (worker->park_at_ns != 0 && now >= worker->park_at_ns) {
      LogWarning("worker_killed",
                 {{"job", key.job},
                  {"rank", key.rank},
                  {"pid", worker->pid},
                  {"why", worker->parked ? "nobody resumed it" : "it did not park in time"}});
      Ask(worker.get(), SIGKILL, 0);
    }
    if (worker->phase != Phase::kRunning) continue;
    if (scan && worker->forked && !worker->learnt_from &&
        now >= worker->started_ns + kLearnAfterNs) {
      worker->learnt_from = true;
      fork_servers_->Learn(key.job, worker->pid);
    }
    if (scan) {
      const auto stat = ReadProcessStat(worker->pid);
      // 't' (traced) is a debugger's own business, told all the same: the job stands still.
      if (stat) OnStopped(worker->pid, stat->state == 'T' || stat->state == 't');
    }
    if (worker->stopped_ns == 0 || now < worker->stopped_ns + kStopToldNs) continue;
    if (worker->by_request || !worker->stop.Due(now)) continue;
    const bool news = !worker->stop.told();
    worker->stop.Told(now);
    v1::KeeperReply event;
    v1::KeeperStalled* stalled = event.mutable_stalled();
    stalled->set_job(key.job);
    stalled->set_generation(key.generation);
    stalled->set_rank(key.rank);
    stalled->set_kind(1);
    stalled->set_stalled_ms((now - worker->stopped_ns) / kMs);
    stalled->set_evidence(
        fmt::format("pid {} is in process state T (stopped by a signal) for {} ms", worker->pid,
                    stalled->stalled_ms()));
    if (news) {
      LogWarning("worker_stopped", {{"job", key.job}, {"rank", key.rank}, {"pid", worker->pid}});
    }
    context_->tell_owner(event);
  }
  for (const WorkerKey& key : late) {
    const auto it = workers_.find(key);
    if (it == workers_.end()) continue;
    if (it->second->waiting && now < it->second->asked_ns + kWaitMostNs &&
        fork_servers_->Advances(key.job)) {
      it->second->start_limit_ns = now + kWaitOnNs;
    } else if (it->second->waiting) {
      it->second->fresh_reason = "the fork server's imports take too long";
      StartFresh(it->second.get());
    } else if (it->second->forked) {
      // It may be there this very moment: then it is the worker, and no other one starts.
      it->second->fresh_reason = "the fork server did not answer in time";
      it->second->status.Finish();
    } else {
      Failed(key, ETIMEDOUT,
             "it did not begin within the limit; is its folder or log on a hung disk?");
    }
  }
}

}  // namespace everstep::keeper
