// What the controller commands: a generation's life on this node, from Prepare to Stopped.
#include "worker/agent/core/agent_core.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>

namespace everstep::agent {

void AgentCore::On(Timestamp, const Warm& e, Effects* out) {
  if (!Current(e.header, "warm", out)) return;
  if (!Find(e.job) && jobs_.size() >= options_.max_jobs) {
    Say(SendNodeWarm{e.job, false, fmt::format("this node holds {} jobs, the limit", jobs_.size())},
        out);
    return;
  }
  JobView& job = jobs_[e.job];
  if (job.fork_server_asked) {
    if (job.fork_server_ready) Say(SendNodeWarm{e.job, true, ""}, out);
    return;
  }
  job.fork_server_asked = true;
  if (job.generation == 0) job.command = e.command;
  out->push_back(StartForkServer{e.job, e.command});
}

void AgentCore::On(Timestamp now, const Prepare& e, Effects* out) {
  if (!Current(e.header, "prepare", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    if (jobs_.size() >= options_.max_jobs) {
      SendPrepared refusal{{e.job, e.generation, false, {}, {}}, 0, true, ""};
      refusal.message =
          fmt::format("this node holds {} jobs, the limit; end one first", jobs_.size());
      Say(std::move(refusal), out);
      return;
    }
    job = &jobs_[e.job];
  }
  if (e.generation < job->generation) {
    out->push_back(Dropped{"prepare", fmt::format("job {} is at generation {}, this is {}", e.job,
                                                  job->generation, e.generation)});
    return;
  }
  // One that was told to end this generation, since it has no part in it, may yet be asked what it
  // holds.
  const bool ends = job->phase == JobView::Phase::kStopping;
  if (e.generation == job->generation && job->phase != JobView::Phase::kIdle && !ends) {
    if (job->phase == JobView::Phase::kPrepared) AnswerPrepare(e.job, *job, out);
    return;  // under way, or activated already
  }
  RetireWorkers(job);
  if (!e.park) RetireParked(job);
  const Duration limit = e.planned ? options_.boundary_limit
                         : e.park  ? options_.park_limit
                                   : Duration{};
  // On a node that leaves a worker that can park does so at the end of its step, and then ends.
  job->end_parked.reset();
  if (e.planned && !e.park) job->end_parked = e.grace;
  if (!job->old_workers.empty() || job->generation > 0) {
    out->push_back(
        KillWorkers{e.job, e.generation - 1, e.grace, /*stores=*/true, limit, e.planned});
  }
  job->phase = JobView::Phase::kDraining;
  job->generation = e.generation;
  job->command = e.command;
  job->step = kNoStep;
  job->host_store = e.host_store;
  job->given_up = e.given_up;
  job->store_port = 0;
  job->trouble.clear();
  job->survey_done = false;
  job->forget = false;
  job->deadline = now + std::max(e.grace + options_.reap_slack + limit,
                                 e.host_store ? options_.store_timeout : Duration{});
  out->push_back(RememberPrepared{e.job, e.generation, e.command, e.data_key});
  if (e.host_store) out->push_back(StartStore{e.job, e.generation, e.command});
  Advance(e.job, out);
}

void AgentCore::AdvancePrepare(const JobId& id, JobView* job, Effects* out) {
  if (job->phase == JobView::Phase::kDraining && job->old_workers.empty()) {
    job->phase = JobView::Phase::kSurveying;
    out->push_back(Survey{id, job->generation, job->command, job->given_up});
  }
  if (job->phase == JobView::Phase::kSurveying && job->survey_done &&
      (!job->host_store || job->store_port != 0)) {
    job->phase = JobView::Phase::kPrepared;
    job->deadline.reset();
    AnswerPrepare(id, *job, out);
  }
}

void AgentCore::AnswerPrepare(const JobId& id, const JobView& job, Effects* out) {
  SendPrepared answer{Holds(id, job), job.store_port, !job.trouble.empty(), job.trouble};
  answer.holds.shards = job.surveyed;
  Say(std::move(answer), out);
}

void AgentCore::RefusePrepare(const JobId& id, JobView* job, std::string message, Effects* out) {
  job->phase = JobView::Phase::kIdle;
  job->deadline.reset();
  job->trouble = std::move(message);
  job->trouble_in_activate = false;
  AnswerPrepare(id, *job, out);
}

void AgentCore::On(Timestamp now, const Activate& e, Effects* out) {
  if (!Current(e.header, "activate", out)) return;
  JobView* job = Find(e.job);
  if (job != nullptr && e.generation < job->generation) {
    out->push_back(Dropped{"activate", fmt::format("job {} is at generation {}, this is {}", e.job,
                                                   job->generation, e.generation)});
    return;
  }
  const bool same = job != nullptr && e.generation == job->generation;
  if (same && job->phase == JobView::Phase::kRunning) return AnswerActivate(e.job, *job, out);
  if (same && job->phase == JobView::Phase::kStarting) return;
  // After a broken stream the node surveys again; it is prepared all the same.
  const bool prepared =
      same &&
      (job->phase == JobView::Phase::kPrepared ||
       (job->phase == JobView::Phase::kSurveying && (!job->host_store || job->store_port != 0)));
  if (!prepared) {
    Say(SendActivated{e.job,
                      e.generation,
                      {},
                      true,
                      fmt::format(
                          "generation {} is not prepared here (this node is {} at generation "
                          "{}); prepare it first",
                          e.generation, job ? PhaseName(job->phase) : "without the job",
                          job ? job->generation : 0)},
        out);
    return;
  }
  job->phase = JobView::Phase::kStarting;
  job->command = e.command;
  job->group_rank = e.plan.group_rank;
  job->deadline = now + options_.start_timeout + FileRestoreTime(FileRestoreBytes(e.plan));
  job->workers.clear();
  for (const WorkerPlan& w : e.plan.workers) {
    WorkerOnNode worker;
    worker.rank = w.rank;
    worker.local_rank = w.local_rank;
    job->workers.push_back(worker);
  }
  out->push_back(RememberActivated{e});
  out->push_back(StartWorkers{e});
  if (job->workers.empty()) {
    job->phase = JobView::Phase::kRunning;
    job->deadline.reset();
    AnswerActivate(e.job, *job, out);
  }
}

void AgentCore::AnswerActivate(const JobId& id, const JobView& job, Effects* out) {
  Say(SendActivated{id, job.generation, Forked(job.workers), !job.trouble.empty(), job.trouble},
      out);
}

void AgentCore::FailActivate(const JobId& id, JobView* job, std::string message, Effects* out) {
  // Those that run wait for their peers; the controller's next prepare ends them.
  job->phase = JobView::Phase::kRunning;
  job->deadline.reset();
  job->trouble = std::move(message);
  job->trouble_in_activate = true;
  AnswerActivate(id, *job, out);
}

void AgentCore::On(Timestamp now, const StopJob& e, Effects* out) {
  if (!Current(e.header, "stop_job", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    Say(SendStopped{e.job, e.generation}, out);
    if (e.forget) out->push_back(ForgetJob{e.job});
    return;
  }
  BeginStop(now, e.job, job, e.generation, e.forget, e.grace, out);
}

void AgentCore::BeginStop(Timestamp now, const JobId& id, JobView* job, Generation generation,
                          bool forget, Duration grace, Effects* out) {
  job->stop_answer = generation;
  if (generation >= job->generation) {
    RetireWorkers(job);
    RetireParked(job);
    job->generation = generation;  // nothing older may start any more
    job->phase = JobView::Phase::kStopping;
    job->forget = forget;
    job->host_store = false;
    job->store_port = 0;
    job->trouble.clear();
    job->deadline = now + grace + options_.reap_slack;
  }
  out->push_back(KillWorkers{id, generation, grace, /*stores=*/true});
  Advance(id, out);
}

void AgentCore::Advance(const JobId& id, Effects* out) {
  JobView* job = Find(id);
  if (job == nullptr) return;
  AdvancePrepare(id, job, out);
  if (!job->stop_answer) return;
  for (const auto& [generation, w] : job->old_workers) {
    if (generation <= *job->stop_answer) return;
  }
  if (job->persisting > 0) return;  // its last breath
  SendStopped answer{id, *job->stop_answer};
  job->stop_answer.reset();
  if (job->phase == JobView::Phase::kStopping) {
    job->phase = JobView::Phase::kIdle;
    job->deadline.reset();
    if (job->forget) {
      // Before the answer: after it the controller forgets the job, and nobody would ask again.
      jobs_.erase(answer.job);
      out->push_back(ForgetJob{answer.job});
    }
  }
  Say(std::move(answer), out);
}

void AgentCore::On(Timestamp, const Committed& e, Effects* out) {
  if (!Current(e.header, "committed", out)) return;
  if (Find(e.job) == nullptr) {
    out->push_back(Dropped{"committed", fmt::format("job {} is not here", e.job)});
    return;
  }
  out->push_back(MarkCommitted{e.job, e.generation, e.step, e.released});
}

void AgentCore::On(Timestamp, const Persist& e, Effects* out) {
  if (!Current(e.header, "persist", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    Say(SendPersisted{{.job = e.job,
                       .generation = e.generation,
                       .step = e.step,
                       .error = "this node does not have the job"}},
        out);
    return;
  }
  ++job->persisting;
  out->push_back(PersistStep{e.job, job->command, e.generation, e.step, e.ranks, e.verified});
}

void AgentCore::On(Timestamp, const RepairShard& e, Effects* out) {
  if (!Current(e.header, "repair_shard", out)) return;
  if (Find(e.job) == nullptr) {
    out->push_back(Dropped{"repair_shard", fmt::format("job {} is not here", e.job)});
    return;
  }
  out->push_back(MendShard{e.job, e.shard, e.source_node, e.source_address});
}

void AgentCore::On(Timestamp, const BuildShard& e, Effects* out) {
  if (!Current(e.header, "build_shard", out)) return;
  const JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation) {
    out->push_back(
        Dropped{"build_shard", fmt::format("job {} is at generation {} here, this is {}", e.job,
                                           job == nullptr ? 0 : job->generation, e.generation)});
    return;
  }
  out->push_back(MakeShard{e.job, e.generation, e.build});
}

void AgentCore::On(Timestamp, const TailLogs& e, Effects* out) {
  if (!Current(e.header, "tail_logs", out)) return;
  Tail tail{e, 0, {}};
  if (const JobView* job = Find(e.job)) {
    tail.generation = job->generation;
    for (const WorkerOnNode& w : Forked(job->workers)) {
      if (e.rank < 0 || e.rank == w.rank) tail.workers.push_back(w);
    }
  }
  out->push_back(std::move(tail));
}

void AgentCore::On(Timestamp, const ToldAck& e, Effects* out) {
  if (Current(e.header, "told_ack", out)) out->push_back(TellWorker{e});
}

void AgentCore::On(Timestamp, const KillForDrill& e, Effects* out) {
  if (!Current(e.header, "kill_for_drill", out)) return;
  JobView* job = Find(e.job);
  const WorkerOnNode* w = job ? FindRank(&job->workers, e.rank) : nullptr;
  if (w == nullptr || !w->running) {
    out->push_back(Dropped{"kill_for_drill",
                           fmt::format("rank {} of job {} does not run here", e.rank, e.job)});
    return;
  }
  out->push_back(KillRank{e.job, job->generation, e.rank, e.signal});
}

}  // namespace everstep::agent
