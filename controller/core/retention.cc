// What stays of a job that has ended: its record, and what it captured in its nodes' memory.
#include <fmt/format.h>

#include <algorithm>

#include "controller/core/impl.h"

namespace everstep::controller {

bool Controller::Impl::KeepsMemory(const JobRecord& record) {
  return Outcome(record.end_reason) == JobState::kFailed && !record.memory_freed;
}

void Controller::Impl::DropCopies(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  job->holdings.clear();
  // Without commits, too: what was persisted may have been told after they were dropped.
  if (!job->commits.job.empty()) out_->deletions.push_back({Deletion::Table::kCommit, id});
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
  ForgetTold(id, job);
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

}  // namespace everstep::controller
