// A job's life, and who pays for a restart. The table: docs/internals/lifecycle.md, "Restarts: who
// pays".
#include <fmt/format.h>

#include <algorithm>

#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

JobState Outcome(Reason end) {
  if (end == Reason::kCompleted) return JobState::kSucceeded;
  return end == Reason::kCancelled ? JobState::kCancelled : JobState::kFailed;
}

// A signal that a program raises itself by a fault of its own (as opposed to one sent from
// outside).
bool OwnSignal(std::int32_t code) {
  switch (-code) {
    case 4:
    case 6:
    case 7:
    case 8:
    case 11: return true;  // ILL ABRT BUS FPE SEGV
    default: return false;
  }
}

}  // namespace

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
  job.record = std::move(record);
  if (job.plan.generation != 0) Forget(job.plan);  // of the job that had the id before
  job.plan = {};
  job.commits.persisted_generation = 0;
  job.commits.persisted_step = kNoStep;
  job.commits.persisted = {};
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
  for (const auto& [id, node] : state_.nodes) {
    if (Eligible(job, node)) Send(id, WarmCommand{spec.job, spec.command, spec.nproc_per_node});
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
    const std::size_t have = ChooseNodes(*job).size();
    if (have < spec.min_nodes) {
      run.last_call = {};
    } else if (have >= spec.max_nodes) {
      Prepare(job, Reason::kCapacityReached, fmt::format("nodes={}", have), false);
    } else if (run.last_call.ns == 0) {
      run.last_call = now_ + (job->record.generation == 0 ? spec.last_call : options_.grow_delay);
    }
  } else if (job->record.state == JobState::kRunning) {
    Reason reason;
    std::string evidence;
    if (!Better(*job, &reason, &evidence)) {
      run.grow_at = {};
    } else if (run.grow_at.ns == 0) {
      run.grow_at = now_ + options_.grow_delay;
    }
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

bool Controller::Impl::KeepsMemory(const JobRecord& record) {
  return Outcome(record.end_reason) == JobState::kFailed && !record.memory_freed;
}

void Controller::Impl::DropCopies(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  job->holdings.clear();
  if (!job->commits.commits.empty()) out_->deletions.push_back({Deletion::Table::kCommit, id});
  job->commits = {};
  dirty_commits_.erase(id);
}

void Controller::Impl::SendStop(const JobStateView& job, const NodeId& node) {
  const JobRecord& r = job.record;
  const bool failed = Outcome(r.end_reason) == JobState::kFailed;  // one is dead: the short grace
  Send(node, StopJobCommand{r.spec.job, r.generation, !KeepsMemory(r), failed, r.end_reason});
}

// Who is away is told when it registers: the job is none of those that it may keep.
void Controller::Impl::FreeMemory(JobStateView* job, Reason reason) {
  job->record.memory_freed = true;
  job->memory_until = {};
  dirty_jobs_.insert(job->record.spec.job);
  for (const auto& [id, node] : state_.nodes) {
    Send(id, StopJobCommand{job->record.spec.job, job->record.generation, true, true, reason});
  }
  DropCopies(job);
}

void Controller::Impl::ForgetJob(JobStateView* job, const std::string& why) {
  const JobId id = job->record.spec.job;
  FreeMemory(job, Reason::kCancelled);
  Journal({.type = "job_forgotten",
           .reason = Reason::kCancelled,
           .job = id,
           .generation = job->record.generation,
           .message = fmt::format("job {} is forgotten: its record and what it had in memory", id),
           .evidence = fmt::format("was={} {}", JobStateName(job->record.state),
                                   why.empty() ? "by request" : why)});
  // Its number stays: whoever was away may come back with bytes of this run when the id is used
  // again.
  JobRecord stub;
  stub.spec.job = id;
  stub.state = job->record.state;
  stub.generation = job->record.generation;
  stub.memory_freed = true;
  stub.ended = now_;
  stub.forgotten = true;
  out_->records.emplace_back(stub);
  state_.forgotten.insert_or_assign(id, std::move(stub));
  if (job->plan.generation != 0) Forget(job->plan);
  dirty_jobs_.erase(id);
  dirty_plans_.erase(id);
  dirty_commits_.erase(id);
  runtime_.erase(id);
  state_.jobs.erase(id);
  if (state_.forgotten.size() <= options_.max_jobs) return;
  const auto oldest = std::min_element(
      state_.forgotten.begin(), state_.forgotten.end(),
      [](const auto& a, const auto& b) { return a.second.ended < b.second.ended; });
  out_->deletions.push_back({Deletion::Table::kJob, oldest->first});
  state_.forgotten.erase(oldest);
}

Timestamp Controller::Impl::MemoryEnd(const JobStateView& job) const {
  const bool kept = job.record.state == JobState::kFailed && KeepsMemory(job.record);
  return kept && options_.failed_retention.count() > 0
             ? job.record.ended + options_.failed_retention
             : Timestamp{};
}

void Controller::Impl::AddFault(JobStateView* job, Reason reason, std::string subject,
                                std::string evidence) {
  auto& faults = job->record.faults;
  Fault fault;
  fault.id = faults.empty() ? 1 : faults.back().id + 1;
  fault.reason = reason;
  fault.subject = std::move(subject);
  fault.evidence = std::move(evidence);
  fault.detected = now_;
  fault.generation_before = job->record.generation;
  fault.step_before = job->step;
  Journal({.type = "fault",
           .severity = Severity::kWarning,
           .reason = reason,
           .job = job->record.spec.job,
           .generation = job->record.generation,
           .message = fmt::format("{}: {}", fault.subject, ReasonName(reason)),
           .evidence = fault.evidence});
  faults.push_back(std::move(fault));
  if (faults.size() > options_.fault_limit) faults.erase(faults.begin());
  dirty_jobs_.insert(job->record.spec.job);
}

void Controller::Impl::LoseCapacity(JobStateView* job, Reason reason, std::string subject,
                                    std::string evidence) {
  AddFault(job, reason, std::move(subject), std::move(evidence));
  ++job->record.lost_capacity;
}

bool Controller::Impl::Hosts(const JobStateView& job, const NodeId& node, Rank rank) {
  if (Bug(kBugMissingFence)) return true;
  const JobId& id = job.record.spec.job;
  const std::size_t place = rank < 0
                                ? job.plan.nodes.size()
                                : static_cast<std::size_t>(rank) / job.record.spec.nproc_per_node;
  const bool known = place < job.plan.nodes.size();
  if (known && job.plan.nodes[place].node == node) return true;
  ++state_.stale_dropped;
  // Once a node and generation: an agent in error must not fill the journal.
  if (!runtime_[id].misreported.insert(node).second) return false;
  Journal({.type = "report_refused",
           .severity = Severity::kWarning,
           .reason = Reason::kStale,
           .job = id,
           .node = node,
           .rank = rank,
           .generation = job.record.generation,
           .message = fmt::format("node {} reports on rank {} of job {}, which is not its own",
                                  node, rank, id),
           .evidence = fmt::format("rank_is_on={}", known ? job.plan.nodes[place].node : "-")});
  return false;
}

bool Controller::Impl::EndOfGeneration(JobStateView* job, bool lost_capacity) {
  Runtime& run = runtime_[job->record.spec.job];
  if (!run.ran) return true;  // superseded before it ran: counts for nobody
  run.ran = false;
  dirty_jobs_.insert(job->record.spec.job);
  const bool steps_reported = job->record.best_step != kNoStep;
  const bool progressed = steps_reported ? job->record.best_step > run.step_at_start
                                         : now_ - run.running_since >= options_.progress_age;
  if (progressed) {
    job->record.no_progress = 0;
    return true;
  }
  ++job->record.no_progress;
  const std::uint32_t limit = job->record.spec.max_no_progress;
  if (lost_capacity && limit > 0 && job->record.no_progress >= limit) {
    Finish(job, JobState::kFailed, Reason::kNoProgress,
           fmt::format("{} generations in a row ended without a new step (limit {})",
                       job->record.no_progress, limit),
           93);
    return false;
  }
  return true;
}

void Controller::Impl::On(const WorkerExited& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || (e.generation != job->record.generation && !Bug(kBugMissingFence))) {
    ++state_.stale_dropped;
    return;
  }
  if (!Hosts(*job, e.node, e.rank)) return;
  const WorkerOnNode worker{e.rank, e.local_rank, e.pid, false, e.exit};
  if (job->record.state == JobState::kStopping) {
    // Other ranks of the generation that failed: the report shows who was first.
    if (e.exit.code != 0 && !e.exit.by_everstep && job->record.end_reason != Reason::kCompleted) {
      job->record.failures.push_back(worker);
      dirty_jobs_.insert(e.job);
    }
    return;
  }
  if (job->record.state != JobState::kRunning && job->record.state != JobState::kActivating) return;
  const auto known = job->workers.find(e.rank);
  const bool news = known == job->workers.end() || known->second.worker.running;
  job->workers[e.rank] = {e.node, worker};
  if (e.exit.code != 0) {
    if (!e.exit.by_everstep) WorkerFailed(job, e);
    return;
  }
  const std::size_t world = job->plan.nodes.size() * job->record.spec.nproc_per_node;
  const bool all = job->workers.size() == world &&
                   std::all_of(job->workers.begin(), job->workers.end(), [](const auto& w) {
                     return !w.second.worker.running && w.second.worker.exit.code == 0;
                   });
  if (all) {
    Finish(job, JobState::kSucceeded, Reason::kCompleted, "every worker exited 0", 0);
  } else if (news) {
    runtime_[e.job].linger_at = now_ + options_.linger_notice;
    runtime_[e.job].linger_step = job->step;
  }
}

// Rank 0 may write a last checkpoint for minutes after the others have left, or evaluate alone; a
// process may also hang in its end. Nothing here can tell which, so it is said and left alone.
void Controller::Impl::TellLingerers(JobStateView* job) {
  Runtime& run = runtime_[job->record.spec.job];
  if (job->record.state != JobState::kRunning || run.linger_at.ns == 0 || now_ < run.linger_at) {
    return;
  }
  if (job->step > run.linger_step) {  // they train on, with unequal shares of the data
    run.linger_step = job->step;
    run.linger_at = now_ + options_.linger_notice;
    return;
  }
  run.linger_at = {};
  const WorkerState* first = nullptr;
  std::size_t left = 0;
  for (const auto& [rank, worker] : job->workers) {
    if (!worker.worker.running) continue;
    ++left;
    if (first == nullptr) first = &worker;
  }
  if (first == nullptr) return;
  job->reason = Reason::kWorkersLinger;
  job->message = fmt::format(
      "rank {} on {}{} still run{}, without a step for {:.0f} s; the other {} exited 0",
      first->worker.rank, first->node, left > 1 ? fmt::format(" and {} more", left - 1) : "",
      left > 1 ? "" : "s", ToSeconds(options_.linger_notice), job->workers.size() - left);
  Journal({.type = "workers_linger",
           .severity = Severity::kWarning,
           .reason = Reason::kWorkersLinger,
           .job = job->record.spec.job,
           .node = first->node,
           .rank = first->worker.rank,
           .generation = job->record.generation,
           .message = fmt::format("job {}: {}", job->record.spec.job, job->message),
           .evidence = fmt::format("pid={} running={} exited={} step={}", first->worker.pid, left,
                                   job->workers.size() - left, job->step)});
}

bool Controller::Impl::Stepped(const JobStateView& job) {
  const Runtime& run = runtime_[job.record.spec.job];
  const auto& commits = job.commits.commits;
  return (run.ran && job.record.best_step > run.step_at_start) || !run.copies.empty() ||
         (!commits.empty() && commits.front().generation == job.record.generation);
}

void Controller::Impl::WorkerFailed(JobStateView* job, const WorkerExited& e) {
  const std::int32_t code = e.exit.code;
  const bool own = !e.exit.oom_killed && (code > 0 || OwnSignal(code));
  const Reason reason = e.exit.oom_killed ? Reason::kWorkerOutOfMemory
                        : own             ? Reason::kWorkerExited
                                          : Reason::kWorkerKilled;
  const std::string evidence =
      fmt::format("{}={} pid={} ran_ms={}", code < 0 ? "signal" : "exit_code", std::abs(code),
                  e.pid, ToMilliseconds(e.exit.ran));
  AddFault(job, reason, fmt::format("rank {} on {}", e.rank, e.node), evidence);
  job->record.faults.back().occurred = e.exit.occurred;
  const bool charged = own || job->record.spec.strict_restarts;
  if (charged) {
    if (job->record.restarts >= static_cast<std::uint32_t>(job->record.spec.max_restarts)) {
      const bool ever = job->record.best_step != kNoStep ||
                        now_ - runtime_[e.job].running_since >= options_.progress_age;
      job->record.failures = {job->workers.at(e.rank).worker};
      Finish(job, JobState::kFailed,
             ever || own == false ? Reason::kRestartsExhausted : Reason::kCrashAtStart,
             fmt::format("rank {} on {} failed ({}) after {} of {} restarts", e.rank, e.node,
                         evidence, job->record.restarts, job->record.spec.max_restarts),
             1);
      return;
    }
    ++job->record.restarts;
  } else {
    ++job->record.lost_capacity;
  }
  dirty_jobs_.insert(e.job);
  if (EndOfGeneration(job, !charged)) Prepare(job, reason, evidence, true, true);
}

void Controller::Impl::On(const WorkerStalled& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || e.generation != job->record.generation) {
    ++state_.stale_dropped;
    return;
  }
  if (job->record.state != JobState::kRunning && job->record.state != JobState::kActivating) return;
  if (!Hosts(*job, e.node, e.rank)) return;
  const std::string subject = fmt::format("rank {} on {}", e.rank, e.node);
  if (e.kind == StallKind::kStopped) {
    LoseCapacity(job, Reason::kWorkerStopped, subject, e.evidence);
    if (EndOfGeneration(job, true)) Prepare(job, Reason::kWorkerStopped, e.evidence, true, true);
    return;
  }
  if (Stepped(*job)) {  // its connections are few since it is leaving its group, not forming it
    ++state_.stale_dropped;
    return;
  }
  AddFault(job, Reason::kGroupNotFormed, subject, e.evidence);
  if (++job->record.start_failures > job->record.spec.max_start_failures) {
    Finish(job, JobState::kFailed, Reason::kStartFailures,
           fmt::format("the process group did not form {} times in a row (limit {})",
                       job->record.start_failures, job->record.spec.max_start_failures),
           1);
    return;
  }
  Prepare(job, Reason::kGroupNotFormed, e.evidence, true);
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
      // A broken stream may have swallowed copies, and the word of what is committed.
      for (const HeldShard& copy : holds.shards) CountCopy(&job, e.node, copy);
      if (s != JobState::kPreparing) TellCommits(&job, e.node);
    }
    if (!IsTerminal(s) && s != JobState::kStopping && Eligible(job, *node)) {
      Send(e.node, WarmCommand{id, job.record.spec.command, job.record.spec.nproc_per_node});
    }
  }
  for (const JobOnNode& reported : e.jobs) {
    if (FindJob(reported.job) == nullptr) {
      Send(e.node, StopJobCommand{reported.job, reported.generation, true, true, Reason::kStale});
    }
  }
}

}  // namespace everstep::controller
