// The half of Workers that keeps processes alive from one generation to the next: sessions,
// parking, resuming, and what they tell. A worker that is parked holds nothing of its old
// generation (attach_protocol.h), so it is as good as gone for whoever waits for the end of that
// generation.
#include <signal.h>

#include <cerrno>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "worker/keeper/attach_protocol.h"
#include "worker/keeper/workers.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

constexpr std::int64_t kMs = 1'000'000;
// Of a worker that is parked, for the next generation: the controller may be away.
constexpr std::int64_t kParkedLimitNs = 600'000'000'000;

std::string Word(SessionWordKind kind, std::uint64_t generation, const std::string& texts) {
  const SessionWord word{
      .kind = kind, .generation = generation, .bytes = static_cast<std::uint32_t>(texts.size())};
  std::string out(reinterpret_cast<const char*>(&word), sizeof(word));
  out += texts;
  return out;
}

// As kResume carries it.
std::string Texts(const v1::KeeperSpawn& request) {
  std::string out = request.stdout_path();
  out.append(1, '\0').append(request.stderr_path()).append(1, '\0');
  for (const auto& [name, value] : request.env()) {
    out.append(name).append(1, '=').append(value).append(1, '\0');
  }
  return out;
}

}  // namespace

int Workers::OpenSession(const WorkerKey& key, pid_t pid, std::uint64_t token, Send send,
                         std::string* error) {
  const auto it = workers_.find(key);
  // One that starts is known by its process id only once it has said so.
  if (it == workers_.end() || it->second->phase != Phase::kRunning || it->second->pid != pid) {
    *error = fmt::format(
        "node {}: pid {} is not the process that was started as rank {} of job {} generation {}; a "
        "session is opened by the worker itself, not by a child of it",
        context_->node, pid, key.rank, key.job, key.generation);
    return Stale(key.job, key.generation) ? ESTALE : EPERM;
  }
  Worker* worker = it->second.get();
  if (worker->by_request) {
    *error = fmt::format("generation {} of job {} is over on node {}", key.generation, key.job,
                         context_->node);
    return ESTALE;
  }
  worker->session = token;
  worker->send = std::move(send);
  LogInfo("session_opened",
          {{"job", key.job}, {"generation", key.generation}, {"rank", key.rank}, {"pid", pid}});
  return 0;
}

// False: it is none that parks, and is to be killed.
bool Workers::Park(const WorkerKey& key, Worker* worker, const v1::KeeperKill& request) {
  if (worker->phase != Phase::kRunning || worker->session == 0 || worker->by_request) return false;
  if (worker->stopped_ns != 0) return false;  // it would hear of nothing
  if (worker->parked) {
    TellParked(key, *worker);
    return true;
  }
  const std::int64_t at = MonotonicNanos() + request.park_ms() * kMs;
  if (worker->park_at_ns != 0 && worker->park_at_ns <= at) return true;  // it is asked already
  worker->park_at_ns = at;
  worker->park_grace_ns = request.grace_ms() * kMs;
  worker->send(Word(SessionWordKind::kPark, key.generation,
                    request.planned() ? std::to_string(request.park_ms()) : std::string()));
  return true;
}

void Workers::OnParked(std::uint64_t token, std::uint64_t generation) {
  for (auto& [key, worker] : workers_) {
    if (worker->session != token || worker->phase != Phase::kRunning) continue;
    if (key.generation != generation || worker->park_at_ns == 0 || worker->parked) return;
    worker->parked = true;
    worker->park_at_ns = MonotonicNanos() + kParkedLimitNs;
    LogInfo("worker_parked", {{"job", key.job},
                              {"generation", key.generation},
                              {"rank", key.rank},
                              {"pid", worker->pid}});
    return TellParked(key, *worker);
  }
}

void Workers::TellParked(const WorkerKey& key, const Worker& worker) {
  v1::KeeperReply event;
  v1::KeeperParked* parked = event.mutable_parked();
  parked->set_job(key.job);
  parked->set_generation(key.generation);
  parked->set_rank(key.rank);
  parked->set_pid(worker.pid);
  context_->tell_owner(event);
}

void Workers::OnTold(std::uint64_t token, std::uint64_t generation, std::string_view words) {
  for (const auto& [key, worker] : workers_) {
    if (worker->session != token || worker->phase != Phase::kRunning) continue;
    if (key.generation != generation || worker->parked || Stale(key.job, generation)) return;
    v1::KeeperReply event;
    v1::KeeperTold* told = event.mutable_told();
    told->set_job(key.job);
    told->set_generation(generation);
    told->set_rank(key.rank);
    told->set_words(std::string(words));
    return context_->tell_owner(event);
  }
}

void Workers::OnToldAck(const v1::KeeperToldAck& request, const Done& done) {
  const auto it = workers_.find({request.job(), request.generation(), request.rank()});
  if (it != workers_.end() && it->second->session != 0 && !it->second->parked) {
    const std::uint64_t sequence = request.sequence();
    it->second->send(Word(SessionWordKind::kToldAck, request.generation(),
                          std::string(reinterpret_cast<const char*>(&sequence), sizeof(sequence))));
  }
  done({});
}

void Workers::OnSessionLost(std::uint64_t token) {
  for (auto& [key, worker] : workers_) {
    if (worker->session != token) continue;
    worker->session = 0;
    worker->send = nullptr;
    if (worker->phase != Phase::kRunning) return;
    if (worker->parked) return Ask(worker.get(), SIGKILL, 0);  // nothing reaches it any more
    if (worker->park_at_ns != 0) Ask(worker.get(), SIGTERM, worker->park_grace_ns);
    return;
  }
}

// False: nobody who is parked here can be this rank; a new process is.
bool Workers::Resume(const v1::KeeperSpawn& request, const Done& done) {
  for (auto it = workers_.begin(); it != workers_.end(); ++it) {
    Worker* worker = it->second.get();
    if (it->first.job != request.job() || !worker->parked ||
        worker->spec.local_rank() != request.local_rank()) {
      continue;
    }
    if (worker->stopped_ns != 0 || worker->spec.target() != request.target()) {
      Ask(worker, SIGKILL, 0);
      return false;
    }
    const std::uint64_t before = it->first.generation;
    auto node = workers_.extract(it);
    node.key() = {request.job(), request.generation(), request.rank()};
    workers_.insert(std::move(node));
    Take(worker, request);
    worker->parked = false;
    worker->park_at_ns = worker->kill_at_ns = 0;
    worker->started_ns = MonotonicNanos();
    worker->started_wall_ns = WallNanos();
    worker->stop.Reset();
    LogInfo("worker_resumed", {{"job", request.job()},
                               {"generation", request.generation()},
                               {"from", before},
                               {"rank", request.rank()},
                               {"pid", worker->pid}});
    worker->send(Word(SessionWordKind::kResume, request.generation(), Texts(request)));
    worker->spec.clear_env();
    worker->spec.clear_args();
    v1::KeeperReply reply;
    reply.mutable_spawned()->set_pid(worker->pid);
    reply.mutable_spawned()->set_resumed(true);
    done(reply);
    return true;
  }
  return false;
}

}  // namespace everstep::keeper
