#include "worker/keeper/workers.h"

#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "proto/base/kill_point.h"
#include "proto/base/log.h"
#include "worker/keeper/process.h"
#include "worker/keeper/python_files.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kStartLimitNs = 30'000 * kMs;
constexpr std::int64_t kForkLimitNs = 20'000 * kMs;    // then a fresh process
constexpr std::int64_t kAnswerLimitNs = 10'000 * kMs;  // of a fork server that has its imports
constexpr std::uint64_t kKeepGenerations = 2;          // ended workers of older ones are dropped

std::uint64_t Number(const v1::KeeperSpawn& spec, const char* key) {
  const auto it = spec.env().find(key);
  std::uint64_t value = 0;
  if (it != spec.env().end()) {
    std::from_chars(it->second.data(), it->second.data() + it->second.size(), value);
  }
  return value;
}

std::string Name(const WorkerKey& key) {
  return fmt::format("job {} generation {} rank {}", key.job, key.generation, key.rank);
}

}  // namespace

void Workers::Spawn(const v1::KeeperSpawn& request, Done done) {
  const WorkerKey key{request.job(), request.generation(), request.rank()};
  const auto fence = fences_.find(key.job);
  if (fence != fences_.end() && key.generation <= fence->second) {
    done(Refusal(ESTALE, fmt::format("{} is not started: generations up to {} of this job are over",
                                     Name(key), fence->second)));
    return;
  }
  if (const auto it = workers_.find(key); it != workers_.end()) {
    done(Refusal(EEXIST, fmt::format("{} is there already (pid {})", Name(key), it->second->pid)));
    return;
  }
  PruneBefore(key.job, key.generation < kKeepGenerations ? 0 : key.generation - kKeepGenerations);
  if (workers_.size() >= kMaxWorkers) {
    done(Refusal(EAGAIN,
                 fmt::format("the keeper of node {} knows {} workers, its limit; forget ended "
                             "jobs first",
                             context_->node, kMaxWorkers)));
    return;
  }
  if (request.job().empty() || (request.target().empty()) ||
      (IsPython(request.command_kind()) && request.python().empty())) {
    done(Refusal(EINVAL,
                 fmt::format("{} is not started: the request names no job, target or interpreter",
                             Name(key))));
    return;
  }
  if (Resume(request, done)) return;
  auto made = std::make_unique<Worker>(context_);
  Worker* worker = made.get();
  Take(worker, request);
  worker->done = std::move(done);
  worker->asked_ns = MonotonicNanos();
  worker->start_limit_ns = worker->asked_ns + (request.preload() ? kForkLimitNs : kStartLimitNs);
  workers_.emplace(key, std::move(made));
  KillPoint("keeper.spawning");
  if (memory_kills_ < 0) memory_kills_ = MemoryKills();

  if (request.preload() && !request.numa_binding().empty()) {
    worker->fresh_reason = "--numa-binding binds a process before it starts";
    StartFresh(worker);
  } else if (request.preload()) {
    StartForked(worker);
  } else {
    StartFresh(worker);
  }
}

// What a worker of any origin is to be.
void Workers::Take(Worker* worker, const v1::KeeperSpawn& request) {
  worker->spec = request;
  worker->world_size = static_cast<std::uint32_t>(Number(request, "WORLD_SIZE"));
  const auto lazy = request.env().find("TORCH_GLOO_LAZY_INIT");
  if (lazy != request.env().end() && lazy->second != "0" && !lazy->second.empty()) {
    worker->spec.set_watch_start(false);  // its ranks connect when they first need each other
  }
  worker->store_port = static_cast<std::uint16_t>(Number(request, "MASTER_PORT"));
  const auto error_file = request.env().find("TORCHELASTIC_ERROR_FILE");
  if (error_file != request.env().end()) worker->error_file = error_file->second;
}

void Workers::StartForked(Worker* worker) {
  const WorkerKey key{worker->spec.job(), worker->spec.generation(), worker->spec.rank()};
  OwnedFd status = worker->status.Open(
      [this, key](const std::string& line, bool last) { OnLine(key, line, last); });
  const auto answer = status
                          ? fork_servers_->Fork(worker->spec, status.get(), &worker->fresh_reason)
                          : ForkServers::Answer::kNever;
  worker->waiting = answer == ForkServers::Answer::kLater;
  worker->forked = answer == ForkServers::Answer::kAsked;
  if (worker->forked) {
    worker->fresh_reason.clear();
    // The wait for its imports is over; this one is for the fork alone.
    const std::int64_t limit = MonotonicNanos() + kAnswerLimitNs;
    worker->start_limit_ns = std::max(worker->start_limit_ns, limit);
  }
  if (worker->waiting) worker->status.Close();
  if (answer == ForkServers::Answer::kNever) StartFresh(worker);
}

void Workers::OnForkServer(const std::string& job) {
  std::vector<WorkerKey> waiting;
  for (const auto& [key, worker] : workers_) {
    if (key.job == job && worker->phase == Phase::kStarting && worker->waiting)
      waiting.push_back(key);
  }
  for (const WorkerKey& key : waiting) {
    const auto it = workers_.find(key);
    if (it != workers_.end() && it->second->waiting) StartForked(it->second.get());
  }
}

void Workers::StartFresh(Worker* worker) {
  const v1::KeeperSpawn& spec = worker->spec;
  const WorkerKey key{spec.job(), spec.generation(), spec.rank()};
  worker->forked = worker->waiting = false;
  worker->start_limit_ns = MonotonicNanos() + kStartLimitNs;
  if (worker->signal_on_start != 0) {
    Failed(key, ESTALE, "it was stopped before it began");
    return;
  }
  LaunchSpec launch;
  launch.argv = WorkerArgv(spec.command_kind(), spec.python(), spec.target(),
                           std::vector<std::string>(spec.args().begin(), spec.args().end()));
  if (!spec.numa_binding().empty()) {
    const std::vector<std::string> bind = {
        spec.python().empty() ? "python3" : spec.python(), NumaProgram(context_->folder),
        spec.numa_binding(), std::to_string(spec.local_rank()), PythonFolder(context_->folder)};
    launch.argv.insert(launch.argv.begin(), bind.begin(), bind.end());
  }
  for (const auto& [name, value] : spec.env())
    launch.env.push_back(fmt::format("{}={}", name, value));
  launch.cwd = spec.cwd();
  launch.umask = static_cast<mode_t>(spec.umask());
  launch.stdout_path = spec.stdout_path();
  launch.stderr_path = spec.stderr_path();
  OwnedFd status = worker->status.Open(
      [this, key](const std::string& line, bool last) { OnLine(key, line, last); });
  if (!status) {
    Failed(key, errno, fmt::format("no pipe: {}", ErrnoText(errno)));
    return;
  }
  launch.status_fd = status.get();
  std::string error;
  const pid_t pid = Launch(launch, &error);
  if (pid < 0) {
    Failed(key, EAGAIN, error);
    return;
  }
  worker->pid = pid;
}

void Workers::OnLine(const WorkerKey& key, const std::string& line, bool last) {
  const auto it = workers_.find(key);
  if (it == workers_.end() || it->second->phase != Phase::kStarting) return;
  Worker* worker = it->second.get();
  if (line.starts_with("E")) {
    Failed(key, ECHILD, line.substr(1));
  } else if (line.starts_with("R")) {
    worker->fresh_reason = line.substr(1);
    LogWarning("fork_refused",
               {{"job", key.job}, {"rank", key.rank}, {"why", worker->fresh_reason}});
    StartFresh(worker);
  } else if (line.starts_with("P")) {
    pid_t pid = 0;
    std::from_chars(line.data() + 1, line.data() + line.size(), pid);
    // Only a child of ours can be waited for, and so be a worker.
    siginfo_t info{};
    if (pid <= 0 ||
        ::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0) {
      Failed(key, ECHILD,
             fmt::format("the fork server named pid {}, which is no child of the keeper", pid));
      return;
    }
    worker->pid = pid;
    worker->fresh_reason.clear();
    Started(worker);
  } else if (last) {
    if (!worker->forked) {
      Started(worker);
    } else {
      if (worker->fresh_reason.empty()) {
        worker->fresh_reason = "the fork server's child ended before it began";
      }
      StartFresh(worker);
    }
  }
}

void Workers::Started(Worker* worker) {
  KillPoint("keeper.worker_started");
  worker->phase = Phase::kRunning;
  worker->start_limit_ns = 0;
  worker->started_ns = MonotonicNanos();
  worker->started_wall_ns = WallNanos();
  worker->status.Close();
  worker->spec.clear_env();
  worker->spec.clear_args();
  LogInfo("worker_started", {{"job", worker->spec.job()},
                             {"generation", worker->spec.generation()},
                             {"rank", worker->spec.rank()},
                             {"pid", worker->pid},
                             {"forked", worker->forked},
                             {"why_fresh", worker->fresh_reason}});
  if (worker->done) {
    v1::KeeperReply reply;
    reply.mutable_spawned()->set_pid(worker->pid);
    reply.mutable_spawned()->set_from_fork_server(worker->forked);
    reply.set_message(worker->fresh_reason);
    worker->done(reply);
    worker->done = nullptr;
  }
  if (worker->signal_on_start != 0) Signal(worker, worker->signal_on_start);
  LookAgain();
}

// A child may have ended while it was not known yet.
void Workers::LookAgain() {
  ::kill(::getpid(), SIGCHLD);
}

void Workers::Failed(const WorkerKey& key, int error, const std::string& why) {
  const auto it = workers_.find(key);
  if (it == workers_.end()) return;
  const std::unique_ptr<Worker> worker = std::move(it->second);
  workers_.erase(it);
  LogWarning("worker_start_failed", {{"job", key.job}, {"rank", key.rank}, {"why", why}});
  if (worker->pid > 0) ::kill(worker->pid, SIGKILL);
  LookAgain();
  if (worker->done) {
    worker->done(Refusal(
        error, fmt::format("node {}: {} did not start: {}", context_->node, Name(key), why)));
  }
}

// A worker leads its group; the group is signalled. Until it is reaped the number is its own.
void Workers::Signal(Worker* worker, int signal) {
  if (worker->phase == Phase::kStarting && (worker->forked || worker->waiting)) {
    if (worker->signal_on_start != SIGKILL) worker->signal_on_start = signal;
    return;
  }
  if (worker->pid <= 0 || worker->phase == Phase::kExited) return;
  if (::kill(-worker->pid, signal) != 0) ::kill(worker->pid, signal);
}

void Workers::Ask(Worker* worker, int signal, std::int64_t grace_ns) {
  if (worker->phase == Phase::kExited) return;
  worker->by_request = true;
  worker->parked = false;  // it will not be resumed
  worker->park_at_ns = 0;
  Signal(worker, signal);
  if (signal == SIGKILL) return;
  if (grace_ns == 0) {
    Signal(worker, SIGKILL);
    return;
  }
  // A stopped process acts on nothing but SIGKILL until it is continued.
  Signal(worker, SIGCONT);
  const std::int64_t at = MonotonicNanos() + grace_ns;
  worker->kill_at_ns = worker->kill_at_ns == 0 ? at : std::min(worker->kill_at_ns, at);
}

void Workers::Kill(const v1::KeeperKill& request, const Done& done) {
  const int signal = request.signal() == 0 ? SIGTERM : request.signal();
  if (signal < 0 || signal >= NSIG) {
    done(Refusal(EINVAL, fmt::format("{} is no signal", request.signal())));
    return;
  }
  const std::int64_t grace_ns = static_cast<std::int64_t>(request.grace_ms()) * kMs;
  if (request.rank() >= 0) {
    const auto it = workers_.find({request.job(), request.generation(), request.rank()});
    if (it == workers_.end() || it->second->phase == Phase::kExited) {
      done(Refusal(ESRCH, fmt::format("{} does not run on node {}",
                                      Name({request.job(), request.generation(), request.rank()}),
                                      context_->node)));
      return;
    }
    if (grace_ns == 0) {
      Signal(it->second.get(), signal);
    } else {
      Ask(it->second.get(), signal, grace_ns);
    }
    done({});
    return;
  }
  std::uint64_t& fence = fences_[request.job()];
  fence = std::max(fence, request.generation());
  int killed = 0;
  for (auto& [key, worker] : workers_) {
    if (key.job != request.job() || key.generation > request.generation()) continue;
    if (worker->phase == Phase::kExited) continue;
    if (request.park() && Park(key, worker.get(), request)) continue;
    Ask(worker.get(), signal, grace_ns);
    ++killed;
  }
  DropWaiting();
  if (killed > 0) {
    LogInfo("workers_stopped", {{"job", request.job()},
                                {"generation", request.generation()},
                                {"count", killed},
                                {"grace_ms", request.grace_ms()}});
  }
  done({});
  ReapOrphans();
}

void Workers::KillAll(std::uint32_t grace_ms) {
  for (auto& [key, worker] : workers_) {
    fences_[key.job] = std::numeric_limits<std::uint64_t>::max();
    Ask(worker.get(), SIGTERM, static_cast<std::int64_t>(grace_ms) * kMs);
  }
  DropWaiting();
}

// Workers that were asked to end before the fork server had heard of them.
void Workers::DropWaiting() {
  std::vector<WorkerKey> dropped;
  for (const auto& [key, worker] : workers_) {
    if (worker->waiting && worker->signal_on_start != 0) dropped.push_back(key);
  }
  for (const WorkerKey& key : dropped) Failed(key, ESTALE, "it was stopped before it began");
}

bool Workers::AnyRunning() const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [](const auto& item) { return item.second->phase != Phase::kExited; });
}

void Workers::Forget(const std::string& job) {
  for (auto it = workers_.begin(); it != workers_.end();) {
    if (it->first.job == job) {
      Worker* worker = it->second.get();
      if (worker->phase != Phase::kExited && worker->pid > 0) {
        ::kill(-worker->pid, SIGKILL);
        ::kill(worker->pid, SIGKILL);
      }
      if (worker->done) {
        worker->done(
            Refusal(ECANCELED, fmt::format("{} was forgotten while it started", Name(it->first))));
      }
      it = workers_.erase(it);
    } else {
      ++it;
    }
  }
  fences_[job] = std::numeric_limits<std::uint64_t>::max();
  ReapOrphans();
  fences_.erase(job);
}

Workers::Worker* Workers::FindPid(pid_t pid) {
  for (auto& [key, worker] : workers_) {
    if (worker->pid == pid && worker->phase != Phase::kExited) return worker.get();
  }
  return nullptr;
}

std::vector<Workers::Peer> Workers::Watched(const std::string& job,
                                            std::uint64_t generation) const {
  std::vector<Peer> out;
  for (const auto& [key, worker] : workers_) {
    if (key.job != job || key.generation != generation || worker->phase != Phase::kRunning)
      continue;
    if (!worker->spec.watch_start()) continue;
    out.push_back({key.rank, worker->pid, worker->world_size, worker->spec.start_timeout_ms(),
                   worker->store_port});
  }
  return out;
}

bool Workers::Stale(const std::string& job, std::uint64_t generation) const {
  const auto fence = fences_.find(job);
  return fence != fences_.end() && generation <= fence->second;
}

void Workers::PruneBefore(const std::string& job, std::uint64_t generation) {
  std::erase_if(workers_, [&](const auto& item) {
    return item.first.job == job && item.first.generation < generation &&
           item.second->phase == Phase::kExited;
  });
}

void Workers::Describe(v1::KeeperState* state) const {
  for (const auto& [key, worker] : workers_) {
    if (worker->phase == Phase::kStarting) continue;
    v1::KeeperProcess* p = state->add_processes();
    p->set_job(key.job);
    p->set_generation(key.generation);
    p->set_rank(key.rank);
    p->set_local_rank(worker->spec.local_rank());
    p->set_pid(worker->pid);
    p->set_running(worker->phase == Phase::kRunning);
    p->set_parked(worker->parked);
    if (worker->phase == Phase::kExited) *p->mutable_exit() = worker->exit;
    p->set_error_file(worker->error_file);
    p->set_stdout_path(worker->spec.stdout_path());
    p->set_stderr_path(worker->spec.stderr_path());
    p->set_started_ns(worker->started_wall_ns);
  }
}

}  // namespace everstep::keeper
