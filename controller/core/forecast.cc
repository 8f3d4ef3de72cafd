// What would become of a job if nodes were lost now: the controller's own code, run on a copy until
// the plan of the next generation stands, so that what is foretold and what is done cannot
// disagree.
#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

// What a node will see in the job's checkpoint directory beside what it saw when it last looked.
void AddFiles(const JobStateView& job, std::vector<HeldShard>* shards) {
  for (const HeldShard& file : job.files) {
    if (std::find(shards->begin(), shards->end(), file) == shards->end()) shards->push_back(file);
  }
}

}  // namespace

Forecast Controller::Impl::IfLost(Timestamp now, const JobId& id,
                                  const std::vector<NodeId>& lost) const {
  Impl copy = *this;
  Decisions unsent;
  copy.out_ = &unsent;
  copy.now_ = now;
  for (const NodeId& node : lost) {
    if (copy.state_.nodes.at(node).record.health != NodeHealth::kLost) {
      copy.LoseNode(node, Reason::kNodeLost, "what if");
    }
  }
  JobStateView* job = &copy.state_.jobs.at(id);
  std::map<Rank, NodeId> rebuilt;
  // Every node that is asked answers at once, with what it is known to hold.
  for (bool asked = true; asked && job->record.state == JobState::kPreparing;) {
    asked = false;
    const std::set<NodeId> waiting = job->waiting_for;
    for (const NodeId& node : waiting) {
      if (job->record.state != JobState::kPreparing || job->waiting_for.count(node) == 0) continue;
      Prepared answer;
      answer.node = node;
      answer.incarnation = copy.state_.nodes.at(node).record.incarnation;
      if (const auto held = job->holdings.find(node); held != job->holdings.end()) {
        answer.holds.shards = held->second.shards;
      }
      AddFiles(*job, &answer.holds.shards);
      answer.holds.job = id;
      answer.holds.generation = job->record.generation;
      copy.On(answer);
      asked = true;
    }
    if (!asked) asked = copy.PretendRebuilt(job, &rebuilt);
  }
  if (job->record.state == JobState::kWaiting) {
    job->plan = state_.jobs.at(id).plan;
    for (const NodePlan& member : job->plan.nodes) {
      AddFiles(*job, &job->holdings[member.node].shards);
    }
    copy.PlanRestore(job);
    if (copy.PretendAtHand(job, &rebuilt)) copy.PlanRestore(job);
  }
  Forecast forecast{job->record.state, job->message, std::move(job->plan), lost,
                    std::move(rebuilt)};
  if (IsTerminal(job->record.state) || job->record.state == JobState::kStopping) {
    forecast.message = job->record.end_message;
  }
  return forecast;
}

Forecast Controller::IfLost(Timestamp now, const JobId& job,
                            const std::vector<NodeId>& lost) const {
  return impl_->IfLost(now, job, lost);
}

}  // namespace everstep::controller
