// What goes wrong in a generation, and who pays for a restart. The table:
// docs/internals/lifecycle.md, "Restarts: who pays".
#include <fmt/format.h>

#include <algorithm>

#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

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

// Every restart would find the same input. But where the job got on before this node came, it is
// the node that has another script, other data or another release: the job goes on without it.
void Controller::Impl::InputRefused(JobStateView* job, const WorkerExited& e) {
  Runtime& run = runtime_[e.job];
  const std::string subject = fmt::format("rank {} on {}", e.rank, e.node);
  AddFault(job, Reason::kInputRefused, subject, e.exit.refused);
  job->record.faults.back().occurred = e.exit.occurred;
  if (run.joined.contains(e.node) && run.joined.size() < job->plan.nodes.size()) {
    Exclude(job, e.node);
    Prepare(job, Reason::kInputRefused, fmt::format("node {}: {}", e.node, e.exit.refused), true);
    return;
  }
  job->record.failures = {job->workers.at(e.rank).worker};
  Finish(job, JobState::kFailed, Reason::kInputRefused,
         fmt::format("{} refused its input: {}", subject, e.exit.refused), 1);
}

void Controller::Impl::WorkerFailed(JobStateView* job, const WorkerExited& e) {
  if (!e.exit.refused.empty()) return InputRefused(job, e);
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
  if (own) NoteAnomaly(job, fmt::format("rank {} failed: {}", e.rank, evidence));
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
    // Before its generation ran nothing else counts: memory that is too small for what a script
    // imports must not keep it starting for ever.
    if (!runtime_[e.job].ran &&
        ++job->record.start_failures > job->record.spec.max_start_failures) {
      Finish(job, JobState::kFailed, Reason::kStartFailures,
             fmt::format("rank {} on {} was killed ({}), and {} generations in a row ended before "
                         "they ran (limit {})",
                         e.rank, e.node, evidence, job->record.start_failures,
                         job->record.spec.max_start_failures),
             1);
      return;
    }
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

}  // namespace everstep::controller
