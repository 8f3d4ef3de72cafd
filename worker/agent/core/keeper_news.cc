// What the keeper and the checkpoint plane report: workers' lives, the store host, slots.
#include "worker/agent/core/agent_core.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>

namespace everstep::agent {

// --- the keeper ---

void AgentCore::On(Timestamp, const KeeperAttached& e, Effects* out) {
  keeper_attached_ = true;
  incarnation_ = std::max(incarnation_, registered_ ? incarnation_ : e.remembered);
  for (const AdoptedJob& adopted : e.jobs) {
    JobView& job = jobs_[adopted.holds.job];
    if (job.generation > adopted.holds.generation) continue;
    job.generation = adopted.holds.generation;
    job.command = adopted.command;
    job.group_rank = adopted.group_rank;
    job.workers = adopted.holds.workers;
    job.old_workers = adopted.old_workers;  // those that are parked say so at the next Prepare
    job.parked.clear();
    job.step = adopted.step;
    job.fork_server_asked = job.fork_server_ready = adopted.fork_server_ready;
    // A prepare that was under way begins again when the controller repeats it.
    job.phase = adopted.holds.activated ? JobView::Phase::kRunning : JobView::Phase::kIdle;
    const auto missing = std::count_if(job.workers.begin(), job.workers.end(), Starting);
    if (missing > 0) {
      std::erase_if(job.workers, Starting);
      job.trouble = fmt::format("the agent ended while it started workers: {} never ran", missing);
      job.trouble_in_activate = true;
    }
  }
  if (e.fresh) {
    for (auto& [id, job] : jobs_) {
      if (job.fork_server_asked) out->push_back(StartForkServer{id, job.command});
    }
  }
  if (registered_ && e.fresh) {
    Say(SendKeeperLost{keeper_loss_.empty() ? "the keeper was replaced" : keeper_loss_}, out);
    keeper_loss_.clear();
  } else if (register_sent_ && !registered_ && e.fresh) {
    out->push_back(CloseSession{"the keeper was replaced while the node registered"});
  }
  SendRegistration(out);
}

void AgentCore::On(Timestamp, const KeeperGone& e, Effects*) {
  keeper_attached_ = false;
  keeper_loss_ = e.message;
  for (auto& [id, job] : jobs_) {
    // Generations stay as a fence; all that stood on them is gone.
    job.phase = JobView::Phase::kIdle;
    job.workers.clear();
    job.old_workers.clear();
    job.parked.clear();
    job.surveyed.clear();
    job.survey_done = false;
    job.store_port = 0;
    job.fork_server_ready = false;
    job.trouble.clear();
    job.deadline.reset();
    job.stop_answer.reset();
  }
}

void AgentCore::On(Timestamp, const WorkerStarted& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  // Resumed, also by a generation that is over meanwhile: its end will be told under its new rank.
  const auto before = [&](const auto& w) {
    return w.second.pid == e.pid && (w.first != e.generation || w.second.rank != e.rank);
  };
  std::erase_if(job->parked, before);
  const bool awaited = std::erase_if(job->old_workers, before) > 0;
  if (e.generation != job->generation || job->phase == JobView::Phase::kStopping) {
    for (auto& [generation, w] : job->old_workers) {
      if (generation != e.generation || w.rank != e.rank) continue;
      w.pid = e.pid;
      w.running = true;
    }
    return;
  }
  WorkerOnNode* w = FindRank(&job->workers, e.rank);
  if (w == nullptr || !Starting(*w)) return;
  w->pid = e.pid;
  w->running = true;
  const bool all = std::none_of(job->workers.begin(), job->workers.end(), Starting);
  if (job->phase == JobView::Phase::kStarting && all) {
    job->phase = JobView::Phase::kRunning;
    job->deadline.reset();
    AnswerActivate(e.job, *job, out);
  }
  if (awaited) Advance(e.job, out);
}

void AgentCore::On(Timestamp, const WorkerStartFailed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  std::erase_if(job->old_workers, [&](const auto& old) {
    return old.first == e.generation && old.second.rank == e.rank && Starting(old.second);
  });
  if (e.generation == job->generation) {
    std::erase_if(job->workers,
                  [&](const WorkerOnNode& w) { return w.rank == e.rank && Starting(w); });
  }
  // Of several only the first is told; those after it must not be waited for either.
  if (e.generation == job->generation && job->phase == JobView::Phase::kStarting) {
    FailActivate(e.job, job, fmt::format("rank {} did not start: {}", e.rank, e.message), out);
  }
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const WorkerExited& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  const auto same = [&](const auto& old) {
    return old.first == e.generation && old.second.rank == e.rank;
  };
  if (std::erase_if(job->parked, same) > 0) return;
  if (std::erase_if(job->old_workers, same) > 0) return Advance(e.job, out);
  if (e.generation != job->generation) return;
  WorkerOnNode* w = FindRank(&job->workers, e.rank);
  if (w == nullptr || !w->running || w->pid != e.pid) return;
  w->running = false;
  w->exit = e.exit;
  Say(SendWorkerExited{e.job, e.generation, *w}, out);
}

// As good as gone for the prepare that waits for the end of its generation. If it dies before it is
// resumed, nobody else needs to know: the keeper forks a new process for its local rank.
void AgentCore::On(Timestamp, const WorkerParked& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->phase == JobView::Phase::kStopping) return;
  const auto it =
      std::find_if(job->old_workers.begin(), job->old_workers.end(), [&](const auto& old) {
        return old.first == e.generation && old.second.rank == e.rank && old.second.pid == e.pid;
      });
  if (it == job->old_workers.end()) return;
  if (job->end_parked) {
    out->push_back(KillWorkers{e.job, e.generation, *job->end_parked});
    return;
  }
  job->parked.push_back(*it);
  job->old_workers.erase(it);
  Advance(e.job, out);
}

// Not kept for later: the worker says it again until it is acknowledged.
void AgentCore::On(Timestamp, const WorkerTold& e, Effects* out) {
  const JobView* job = Find(e.job);
  if (registered_ && job != nullptr && job->generation == e.generation) out->push_back(SendTold{e});
}

void AgentCore::On(Timestamp, const WorkerStalled& e, Effects* out) {
  const JobView* job = Find(e.job);
  if (job != nullptr && job->generation == e.generation) Say(SendWorkerStalled{e}, out);
}

void AgentCore::On(Timestamp, const ForkServerState& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  job->fork_server_ready = e.ready;
  if (!e.ready) job->fork_server_asked = false;  // the next Warm tries again
  Say(SendNodeWarm{e.job, e.ready, e.message}, out);
}

void AgentCore::On(Timestamp, const StoreReady& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation || !job->host_store) return;
  job->store_port = e.port;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const StoreFailed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation) return;
  if (job->phase != JobView::Phase::kDraining && job->phase != JobView::Phase::kSurveying) return;
  RefusePrepare(e.job, job, fmt::format("the store host did not start: {}", e.message), out);
}

// --- the checkpoint plane ---

void AgentCore::On(Timestamp, const Surveyed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation) return;
  if (job->phase != JobView::Phase::kSurveying) return;
  job->surveyed = e.shards;
  job->survey_done = true;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const ShardCopied& e, Effects* out) {
  if (Find(e.job) != nullptr) Say(SendShardCopied{e.job, e.shard}, out);
}

void AgentCore::On(Timestamp, const ShardDamaged& e, Effects* out) {
  if (Find(e.job) != nullptr) Say(SendShardDamaged{e}, out);
}

void AgentCore::On(Timestamp, const Persisted& e, Effects* out) {
  Say(SendPersisted{e}, out);
  JobView* job = Find(e.job);
  if (job == nullptr || job->persisting == 0) return;
  --job->persisting;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const StepCaptured& e, Effects*) {
  JobView* job = Find(e.job);
  if (job != nullptr && job->generation == e.generation) job->step = std::max(job->step, e.step);
}

}  // namespace everstep::agent
