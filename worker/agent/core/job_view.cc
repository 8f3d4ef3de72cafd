#include "worker/agent/core/job_view.h"

#include <fmt/format.h>

namespace everstep::agent {

const char* PhaseName(JobView::Phase phase) {
  switch (phase) {
    case JobView::Phase::kIdle: return "idle";
    case JobView::Phase::kDraining: return "draining";
    case JobView::Phase::kSurveying: return "surveying";
    case JobView::Phase::kPrepared: return "prepared";
    case JobView::Phase::kStarting: return "starting";
    case JobView::Phase::kRunning: return "running";
    case JobView::Phase::kStopping: return "stopping";
  }
  return "unknown";
}

bool Starting(const WorkerOnNode& w) {
  return w.pid == 0;
}
bool AliveOrStarting(const WorkerOnNode& w) {
  return w.running || Starting(w);
}

std::vector<WorkerOnNode> Forked(const std::vector<WorkerOnNode>& workers) {
  std::vector<WorkerOnNode> out;
  for (const WorkerOnNode& w : workers) {
    if (!Starting(w)) out.push_back(w);
  }
  return out;
}

WorkerOnNode* FindRank(std::vector<WorkerOnNode>* workers, Rank rank) {
  for (WorkerOnNode& w : *workers) {
    if (w.rank == rank) return &w;
  }
  return nullptr;
}

std::string Lingering(const JobView& job) {
  std::string out;
  for (const auto& [generation, w] : job.old_workers) {
    out += fmt::format("{}rank {} pid {} of generation {}", out.empty() ? "" : ", ", w.rank, w.pid,
                       generation);
  }
  return out;
}

void RetireWorkers(JobView* job) {
  for (const WorkerOnNode& w : job->workers) {
    if (AliveOrStarting(w)) job->old_workers.emplace_back(job->generation, w);
  }
  job->workers.clear();
}

void RetireParked(JobView* job) {
  job->old_workers.insert(job->old_workers.end(), job->parked.begin(), job->parked.end());
  job->parked.clear();
}

JobOnNode Holds(const JobId& id, const JobView& job) {
  JobOnNode holds;
  holds.job = id;
  holds.generation = job.generation;
  holds.activated = job.phase == JobView::Phase::kRunning && job.trouble.empty();
  holds.workers = Forked(job.workers);
  return holds;
}

}  // namespace everstep::agent
