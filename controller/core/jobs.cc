// A job's life: handed in, waiting, started, cancelled, ended; and what it finds when its nodes
// come back.
#include <fmt/format.h>

#include <algorithm>

#include "controller/core/copies.h"
#include "controller/core/impl.h"

namespace everstep::controller {

JobState Controller::Impl::Outcome(Reason end) {
  if (end == Reason::kCompleted) return JobState::kSucceeded;
  return end == Reason::kCancelled ? JobState::kCancelled : JobState::kFailed;
}

void Controller::Impl::On(const SubmitJob& e) {
  const JobSpec& spec = e.spec;
  if (spec.job.empty() || spec.min_nodes == 0 || spec.max_nodes < spec.min_nodes ||
      spec.nproc_per_node == 0 || spec.max_restarts < 0) {
    Answer(e.request, ReplyCode::kInvalid,
           fmt::format("job '{}' asks for {} to {} nodes with {} workers each and {} restarts",
                       spec.job, spec.min_nodes, spec.max_nodes, spec.nproc_per_node,
                       spec.max_restarts),
           "1 <= MIN <= MAX nodes, at least 1 worker a node, restarts from 0 on");
    return;
  }
  if (const std::string wrong = RedundancyTrouble(spec); !wrong.empty()) {
    Answer(e.request, ReplyCode::kInvalid, fmt::format("job '{}': {}", spec.job, wrong),
           "fewer states under a parity, fewer parities, or more nodes");
    return;
  }
  if (spec.copies > spec.max_nodes) {
    Answer(e.request, ReplyCode::kInvalid,
           fmt::format("job '{}' asks for {} copies of its state on at most {} nodes", spec.job,
                       spec.copies, spec.max_nodes),
           "each copy lies on a node of its own: fewer copies, or more nodes");
    return;
  }
  JobStateView* old = FindJob(spec.job);
  if (old != nullptr && !IsTerminal(old->record.state)) {
    Answer(e.request, ReplyCode::kAlreadyExists,
           fmt::format("a job '{}' is {} here", spec.job, JobStateName(old->record.state)),
           "choose another id, or everstep job cancel " + spec.job);
    return;
  }
  if (old == nullptr && state_.jobs.size() >= options_.max_jobs) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("this controller remembers {} jobs, its limit", options_.max_jobs),
           "everstep job cancel --forget JOB makes room where JOB has ended");
    return;
  }
  JobStateView& job = state_.jobs[spec.job];
  if (const auto before = state_.forgotten.find(spec.job); before != state_.forgotten.end()) {
    job.record = std::move(before->second);
    state_.forgotten.erase(before);
  }
  JobRecord record;
  record.spec = spec;
  record.generation =
      job.record.generation;  // generations only grow, also when an id is used again
  record.started = now_;
  record.data_key = e.data_key;
  // A run that succeeded or was cancelled leaves nothing, also where a node was away when it ended;
  // one that failed may be handed in again to go on, for a while.
  const bool left_nothing = IsTerminal(job.record.state) && !KeepsMemory(job.record);
  record.earlier_runs = left_nothing ? job.record.generation : job.record.earlier_runs;
  record.given_up = std::move(job.record.given_up);  // for ever
  if (left_nothing) ForgetTold(spec.job, &job);
  job.record = std::move(record);
  if (job.plan.generation != 0) Forget(job.plan);  // of the job that had the id before
  job.plan = {};
  job.commits.persisted_generation = 0;
  job.commits.persisted_step = kNoStep;
  job.commits.persisted = {};
  job.commits.files.clear();
  job.commits.verified = {};
  job.commits.verified_at = {};
  job.commits.anomalies = 0;
  job.files.clear();
  job.damaged.clear();
  job.step = kNoStep;
  job.reason = Reason::kSubmitted;
  job.message.clear();
  job.deadline = {};
  job.memory_until = {};
  Runtime& run = runtime_[spec.job];
  run = Runtime{};
  run.waiting_since = now_;
  dirty_jobs_.insert(spec.job);
  Journal({.type = "job_submitted",
           .reason = Reason::kSubmitted,
           .job = spec.job,
           .message = fmt::format("job {} submitted: {} to {} nodes, {} workers each", spec.job,
                                  spec.min_nodes, spec.max_nodes, spec.nproc_per_node),
           .evidence = fmt::format("spares={} max_restarts={}", spec.spares, spec.max_restarts)});
  Answer(e.request, ReplyCode::kOk, fmt::format("job '{}' submitted", spec.job));
  for (auto& [id, node] : state_.nodes) {
    node.warm.erase(spec.job);  // for an earlier job of this name
    if (Eligible(job, node)) Warm(job, id);
  }
  Consider(&job);
}

void Controller::Impl::Exclude(JobStateView* job, const NodeId& node) {
  Runtime::Exclusion& refused = runtime_[job->record.spec.job].excluded[node];
  refused.retry = refused.retry == Duration{}
                      ? options_.refused_retry
                      : std::min(2 * refused.retry, options_.max_refused_retry);
  refused.until = now_ + refused.retry;
  refused.over = false;
}

void Controller::Impl::Consider(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  const JobSpec& spec = job->record.spec;
  if (job->record.state == JobState::kWaiting) {
    const std::size_t have = ChooseNodes(*job, Cold::kAll).size();
    if (have < spec.min_nodes) {
      run.last_call = {};
    } else if (have >= spec.max_nodes) {
      Prepare(job, Reason::kCapacityReached, fmt::format("nodes={}", have), false);
    } else if (run.last_call.ns == 0) {
      run.last_call = now_ + (job->record.generation == 0 ? spec.last_call : options_.grow_delay);
    }
  } else if (job->record.state == JobState::kRunning) {
    WatchNewcomers(job);
  }
}

void Controller::Impl::On(const CancelJob& e) {
  JobStateView* job = FindJob(e.job);
  if (job == nullptr) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no job is called '{}'", e.job),
           "everstep job list");
    return;
  }
  if (e.forget) {
    if (!IsTerminal(job->record.state)) {
      Answer(e.request, ReplyCode::kFailedPrecondition,
             fmt::format("job '{}' is {}: only what has ended can be forgotten", e.job,
                         JobStateName(job->record.state)),
             fmt::format("everstep job cancel --wait {} first", e.job));
      return;
    }
    Answer(e.request, ReplyCode::kOk, fmt::format("job '{}' is forgotten", e.job));
    ForgetJob(job, e.reason);
    return;
  }
  if (IsTerminal(job->record.state) || job->record.state == JobState::kStopping) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' is {} already", e.job, JobStateName(job->record.state)),
           IsTerminal(job->record.state)
               ? fmt::format("everstep job cancel --forget {} gives up what is left of it", e.job)
               : "");
    return;
  }
  Answer(e.request, ReplyCode::kOk, fmt::format("job '{}' is being cancelled", e.job));
  Finish(job, JobState::kCancelled, Reason::kCancelled,
         e.reason.empty() ? "cancelled by request" : e.reason, 1);
}

void Controller::Impl::Finish(JobStateView* job, JobState outcome, Reason reason,
                              const std::string& message, std::int32_t exit_code) {
  const JobId& id = job->record.spec.job;
  JobRecord& record = job->record;
  record.state = JobState::kStopping;
  record.end_reason = reason;
  record.end_message = message;
  record.exit_code = exit_code;
  job->reason = reason;
  job->message = message;
  job->deadline = now_ + options_.stop_timeout;
  job->waiting_for.clear();
  job->newcomers.clear();
  runtime_[id].grow_at = {};
  runtime_[id].last_call = {};
  for (Fault& fault : record.faults) {
    if (fault.recovered.ns == 0 && fault.generation_after == 0) fault.action = "the job ends";
  }
  dirty_jobs_.insert(id);
  // What a failed job captured stays for a while: it may be handed in again. Where nothing was, or
  // can have been unheard, there is nothing to go on from.
  const bool captured =
      record.best_step != kNoStep || !job->commits.commits.empty() ||
      std::any_of(job->holdings.begin(), job->holdings.end(),
                  [](const auto& h) { return !h.second.shards.empty(); }) ||
      std::any_of(job->plan.nodes.begin(), job->plan.nodes.end(),
                  [this](const NodePlan& n) { return !state_.nodes.at(n.node).connected; });
  record.memory_freed = outcome != JobState::kFailed || !captured;
  const bool forget = record.memory_freed;
  Journal({.type = "job_stopping",
           .severity = outcome == JobState::kFailed ? Severity::kError : Severity::kInfo,
           .reason = reason,
           .job = id,
           .generation = record.generation,
           .message = fmt::format("job {} ends: {}", id, message),
           .evidence = fmt::format("restarts={} lost_capacity={} no_progress={} best_step={}",
                                   record.restarts, record.lost_capacity, record.no_progress,
                                   record.best_step)});
  // Before the stops: a node answers a stop when what it was to write is on the disk.
  if (StartPersist(job, Reason::kLastBreath) && runtime_[id].persist) {
    job->deadline = job->deadline + options_.persist_timeout;
  }
  for (const NodePlan& member : job->plan.nodes) {
    if (state_.nodes.at(member.node).record.health == NodeHealth::kLost) continue;
    job->waiting_for.insert(member.node);
    SendStop(*job, member.node);
  }
  std::vector<std::string_view> members;
  for (const NodePlan& member : job->plan.nodes) members.emplace_back(member.node);
  std::sort(members.begin(), members.end());
  for (const auto& [node_id, node] : state_.nodes) {  // spares: fork servers and stores
    if (!std::binary_search(members.begin(), members.end(), node_id)) SendStop(*job, node_id);
  }
  if (forget) DropCopies(job);
  if (job->waiting_for.empty()) FinishStop(job);
}

void Controller::Impl::On(const Stopped& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || job->record.state != JobState::kStopping ||
      e.generation != job->record.generation) {
    return;
  }
  if (job->waiting_for.erase(e.node) > 0 && job->waiting_for.empty()) FinishStop(job);
}

void Controller::Impl::FinishStop(JobStateView* job) {
  JobRecord& record = job->record;
  const JobId& id = record.spec.job;
  if (runtime_[id].persist) {
    runtime_[id].persist->trouble = "the job ended first";
    EndPersist(job);
  }
  record.state = Outcome(record.end_reason);
  record.ended = now_;
  std::sort(record.failures.begin(), record.failures.end(),
            [](const WorkerOnNode& a, const WorkerOnNode& b) {
              const auto at = [](const WorkerOnNode& w) {
                return w.exit.error_time.ns != 0 ? w.exit.error_time : w.exit.occurred;
              };
              return std::pair(at(a), a.rank) < std::pair(at(b), b.rank);
            });
  job->deadline = {};
  job->memory_until = MemoryEnd(*job);
  job->workers.clear();
  for (auto& [node_id, node] : state_.nodes) node.warm.erase(id);
  if (job->plan.generation != 0) {
    job->plan.phase = Phase::kEnded;
    dirty_plans_.insert(id);
  }
  dirty_jobs_.insert(id);
  Journal({.type = "job_ended",
           .severity = record.state == JobState::kFailed ? Severity::kError : Severity::kInfo,
           .reason = record.end_reason,
           .job = id,
           .generation = record.generation,
           .message = fmt::format("job {} is {}", id, JobStateName(record.state)),
           .evidence = fmt::format("exit_code={}", record.exit_code)});
  for (auto& [other, view] : state_.jobs) {
    if (other != id) Consider(&view);
  }
}

JobOnNode Controller::Impl::ReportedOrEmpty(const NodeRegistered& e, const JobId& job) const {
  for (const JobOnNode& reported : e.jobs) {
    if (reported.job == job) return reported;
  }
  JobOnNode none;
  none.job = job;
  return none;
}

// A node knows a generation that this store does not: the store is an older copy, or another
// controller went on meanwhile. Numbers only grow, so the next one must be beyond both.
void Controller::Impl::Overtaken(JobStateView* job, const NodeId& node, const JobOnNode& holds) {
  const JobId& id = job->record.spec.job;
  const std::string evidence = fmt::format("node={} has_generation={} store_had={}", node,
                                           holds.generation, job->record.generation);
  Journal({.type = "store_behind",
           .severity = Severity::kWarning,
           .reason = Reason::kControllerRestarted,
           .job = id,
           .node = node,
           .generation = holds.generation,
           .message = fmt::format("job {}: the store is behind what node {} runs", id, node),
           .evidence = evidence});
  job->record.generation = holds.generation;
  dirty_jobs_.insert(id);
  if (Switches(job->record.state)) {
    AddFault(job, Reason::kControllerRestarted, fmt::format("node {}", node), evidence);
    Prepare(job, Reason::kControllerRestarted, evidence, false);
  } else if (job->record.state == JobState::kStopping) {
    for (const NodeId& member : job->waiting_for) SendStop(*job, member);
  }
}

void Controller::Impl::Reattach(NodeState* node, const NodeRegistered& e) {
  for (auto& [id, job] : state_.jobs) {
    const JobOnNode holds = ReportedOrEmpty(e, id);
    if (!holds.shards.empty()) job.holdings[e.node] = holds;
    const bool overtaken = holds.generation > job.record.generation;
    if (overtaken) Overtaken(&job, e.node, holds);
    const JobState s = job.record.state;
    const Generation generation = job.record.generation;
    const bool current = holds.generation == generation && holds.activated;
    if (overtaken && Switches(s)) {
      // Prepare told the node already.
    } else if (s == JobState::kStopping && IsMember(job, e.node)) {
      job.waiting_for.insert(e.node);
      SendStop(job, e.node);
    } else if (s == JobState::kPreparing &&
               (IsMember(job, e.node) || job.waiting_for.count(e.node) > 0)) {
      // Also when it had answered: a restarted agent knows nothing of that.
      job.waiting_for.insert(e.node);
      SendPrepare(&job, e.node, true);
    } else if (s == JobState::kActivating && IsMember(job, e.node) && !current) {
      SendActivate(&job, e.node, std::make_shared<const GenerationPlan>(job.plan));
    } else if ((s == JobState::kActivating || s == JobState::kRunning) && IsMember(job, e.node) &&
               current) {
      for (const WorkerOnNode& worker : holds.workers) {
        if (worker.running) job.workers[worker.rank] = {e.node, worker};
      }
      if (s == JobState::kActivating && job.waiting_for.erase(e.node) > 0 &&
          job.waiting_for.empty()) {
        Running(&job);
      }
      for (const WorkerOnNode& worker : holds.workers) {  // exits nobody heard of
        if (worker.running || job.record.generation != generation) continue;
        On(WorkerExited{e.node, node->record.incarnation, id, generation, worker.rank,
                        worker.local_rank, worker.pid, worker.exit});
      }
    } else if (s == JobState::kRunning && IsMember(job, e.node)) {
      const std::string why =
          fmt::format("reports generation {} of {}", holds.generation, generation);
      LoseCapacity(&job, Reason::kNodeReturned, fmt::format("node {}", e.node), why);
      if (EndOfGeneration(&job, true)) Prepare(&job, Reason::kNodeReturned, why, true);
    } else if (holds.generation != 0) {
      // Not in this generation: what it still runs is over; what it holds may serve a restore.
      const bool forget = IsTerminal(s) && !KeepsMemory(job.record);  // a failed one may go on
      Send(e.node, StopJobCommand{id, holds.generation, forget, true, Reason::kStale});
    }
    if (job.record.generation == generation && IsMember(job, e.node)) {
      // A broken stream may have swallowed copies, orders of parities, and the word of what is
      // committed.
      runtime_[id].base_ordered = false;
      for (auto& [step, copies] : runtime_[id].copies) copies.ordered = false;
      for (const HeldShard& copy : holds.shards) CountCopy(&job, e.node, copy);
      if (s != JobState::kPreparing) TellCommits(&job, e.node);
    }
    if (!IsTerminal(s) && s != JobState::kStopping && Eligible(job, *node)) {
      Warm(job, e.node);
    }
  }
  for (const JobOnNode& reported : e.jobs) {
    if (FindJob(reported.job) == nullptr) {
      Send(e.node, StopJobCommand{reported.job, reported.generation, true, true, Reason::kStale});
    }
  }
}

}  // namespace everstep::controller
