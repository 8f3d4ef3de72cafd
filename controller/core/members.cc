// Which nodes a job runs on: who may take part, who is chosen, and newcomers, who get ready first.
// A job that runs must not stand while a newcomer's fork server imports PyTorch (seconds): until it
// is ready the job trains on without it. docs/internals/lifecycle.md, "Nodes that join".
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {

bool Controller::Impl::IsMember(const JobStateView& job, const NodeId& node) const {
  return std::any_of(job.plan.nodes.begin(), job.plan.nodes.end(),
                     [&node](const NodePlan& n) { return n.node == node; });
}

bool Controller::Impl::Eligible(const JobStateView& job, const NodeState& node) const {
  return !node.record.draining &&
         Fit(job, node, IsMember(job, node.record.node), TakenByOthers(job));
}

Controller::Impl::Taken Controller::Impl::TakenByOthers(const JobStateView& job) const {
  Taken taken;
  for (const auto& [other, view] : state_.jobs) {
    if (other == job.record.spec.job || IsTerminal(view.record.state) ||
        view.record.state == JobState::kWaiting) {
      continue;
    }
    for (const NodePlan& member : view.plan.nodes) {
      taken[member.node] += view.record.spec.nproc_per_node;
    }
  }
  return taken;
}

bool Controller::Impl::Fit(const JobStateView& job, const NodeState& node, bool member,
                           const Taken& taken) const {
  const JobSpec& spec = job.record.spec;
  const NodeId& id = node.record.node;
  if (node.record.health == NodeHealth::kLost) return false;
  const auto run = runtime_.find(spec.job);
  if (run != runtime_.end()) {
    const auto refused = run->second.excluded.find(id);
    if (refused != run->second.excluded.end() && now_ < refused->second.until) return false;
  }
  if (!spec.only_nodes.empty() &&
      std::find(spec.only_nodes.begin(), spec.only_nodes.end(), id) == spec.only_nodes.end()) {
    return false;
  }
  // A suspect member keeps its place until its lease ends; a suspect stranger is not taken in.
  if (node.record.health == NodeHealth::kSuspect && !member) return false;
  if (node.record.facts.slots == 0) return true;
  const auto others = taken.find(id);
  const std::uint64_t used = spec.nproc_per_node + (others == taken.end() ? 0 : others->second);
  return used <= node.record.facts.slots;
}

std::vector<NodeId> Controller::Impl::ChooseNodes(const JobStateView& job, Cold cold) const {
  const JobSpec& spec = job.record.spec;
  const Runtime& run = runtime_.at(spec.job);
  const Taken taken = TakenByOthers(job);
  std::vector<NodeId> stay;  // by group rank; empty: a place that its node leaves or has left
  std::vector<std::string_view> members;
  for (const NodePlan& member : job.plan.nodes) {
    members.emplace_back(member.node);
    const auto node = state_.nodes.find(member.node);
    const bool stays = node != state_.nodes.end() && !node->second.record.draining &&
                       Fit(job, node->second, true, taken);
    stay.push_back(stays ? member.node : NodeId());
  }
  std::sort(members.begin(), members.end());
  std::vector<const NodeId*> spares;  // warm ones first, then by name
  std::vector<const NodeId*> others;
  std::vector<const NodeId*> left_out;
  for (const auto& [id, node] : state_.nodes) {
    if (node.record.draining || std::binary_search(members.begin(), members.end(), id) ||
        !Fit(job, node, false, taken)) {
      continue;
    }
    const auto warm = node.warm.find(spec.job);
    if (warm != node.warm.end() && warm->second == Warmth::kReady) {
      spares.push_back(&id);
    } else if (cold != Cold::kAll && run.formed && IsCold(job, node)) {
      left_out.push_back(&id);
    } else {
      others.push_back(&id);
    }
  }
  const std::size_t ready = spares.size();
  spares.insert(spares.end(), others.begin(), others.end());
  const auto seat = [&] {
    std::vector<NodeId> chosen = stay;
    auto spare = spares.begin();
    // A member that lost its keeper has nothing that a warm spare lacks, and would take seconds to
    // import.
    std::size_t warm_spares = ready;
    for (NodeId& place : chosen) {
      if (warm_spares > 0 && run.emptied.contains(place)) place.clear();
      if (place.empty() && warm_spares > 0) --warm_spares;
    }
    for (NodeId& place : chosen) {
      if (place.empty() && spare != spares.end()) place = **(spare++);
    }
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      if (!chosen[i].empty()) continue;
      const auto node = state_.nodes.find(job.plan.nodes[i].node);
      if (node != state_.nodes.end() && Lingers(node->second) &&
          Fit(job, node->second, true, taken)) {
        chosen[i] = node->first;
      }
    }
    std::erase(chosen, NodeId());
    while (chosen.size() < spec.max_nodes && spare != spares.end()) chosen.push_back(**(spare++));
    if (chosen.size() > spec.max_nodes) chosen.resize(spec.max_nodes);
    return chosen;
  };
  std::vector<NodeId> chosen = seat();
  if (cold != Cold::kToMinimum) return chosen;
  for (const NodeId* id : left_out) {  // rather stand while it imports than wait
    if (chosen.size() >= spec.min_nodes) break;
    spares.push_back(id);
    chosen = seat();
  }
  return chosen;
}

bool Controller::Impl::Better(const JobStateView& job, const std::vector<NodeId>& chosen,
                              Reason* reason, std::string* evidence) const {
  if (chosen.size() < job.plan.nodes.size()) return false;
  for (const NodePlan& member : job.plan.nodes) {
    const auto node = state_.nodes.find(member.node);
    if (node == state_.nodes.end() || !node->second.record.draining ||
        std::find(chosen.begin(), chosen.end(), member.node) != chosen.end()) {
      continue;
    }
    const std::string& why = node->second.record.drain_reason;
    *reason = why.starts_with(ReasonName(Reason::kNotice)) ? Reason::kNotice : Reason::kNodeDrained;
    *evidence = fmt::format("node {} can be left now: {}", member.node, why);
    return true;
  }
  *reason = Reason::kNodeJoined;
  *evidence = fmt::format("nodes={} were={}", chosen.size(), job.plan.nodes.size());
  return chosen.size() > job.plan.nodes.size();
}

void Controller::Impl::Warm(const JobStateView& job, const NodeId& id) {
  NodeState& node = state_.nodes.at(id);
  const JobSpec& spec = job.record.spec;
  if (!node.connected || !node.warm.emplace(spec.job, Warmth::kAsked).second) return;
  Send(id, WarmCommand{spec.job, spec.command, spec.nproc_per_node});
}

bool Controller::Impl::IsCold(const JobStateView& job, const NodeState& node) const {
  const auto warm = node.warm.find(job.record.spec.job);
  if (warm != node.warm.end() && warm->second != Warmth::kAsked) return false;
  const auto since = job.newcomers.find(node.record.node);
  return since == job.newcomers.end() || now_ < since->second + options_.warm_patience;
}

void Controller::Impl::WatchNewcomers(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  run.grow_at = {};
  const bool leaving =
      std::any_of(job->plan.nodes.begin(), job->plan.nodes.end(), [this](const NodePlan& member) {
        const auto node = state_.nodes.find(member.node);
        return node != state_.nodes.end() && node->second.record.draining;
      });
  std::vector<NodeId> chosen;  // once they are all warm
  if (leaving || job->plan.nodes.size() < job->record.spec.max_nodes) {
    chosen = ChooseNodes(*job, Cold::kAll);
  }
  Reason reason;
  std::string evidence;
  if (!Better(*job, chosen, &reason, &evidence)) {
    job->newcomers.clear();
    return;
  }
  std::set<std::string_view> members;
  for (const NodePlan& member : job->plan.nodes) members.insert(member.node);
  const std::map<NodeId, Timestamp> before = std::exchange(job->newcomers, {});
  Timestamp first;    // when the first of them came
  Timestamp overdue;  // when the first that is cold is taken in as it is; ns == 0: none is cold
  for (const NodeId& node : chosen) {
    if (members.contains(node)) continue;
    const auto known = before.find(node);
    const Timestamp since = known == before.end() ? now_ : known->second;
    job->newcomers.emplace(node, since);
    if (first.ns == 0 || since < first) first = since;
    Warm(*job, node);
    if (!IsCold(*job, state_.nodes.at(node))) continue;
    const Timestamp until = since + options_.warm_patience;
    if (overdue.ns == 0 || until < overdue) overdue = until;
    if (known != before.end()) continue;
    Journal({.type = "node_warming",
             .reason = Reason::kNodeJoined,
             .job = id,
             .node = node,
             .generation = job->record.generation,
             .message =
                 fmt::format("job {} trains on until node {} has imported what it needs", id, node),
             .evidence = fmt::format("at_most_ms={}", ToMilliseconds(options_.warm_patience))});
  }
  // One switch for all of them, but the first that came waits no longer for the others than for
  // itself. Two switches in a row have ranks leave a group in the middle of its forming.
  run.grow_at =
      std::max({now_, first + options_.grow_delay, run.running_since + options_.grow_settle});
  if (overdue.ns == 0) return;
  const Timestamp patience = first + options_.warm_patience;
  run.grow_at = std::max(run.grow_at, patience > now_ ? patience : overdue);
}

void Controller::Impl::LeaveOut(const NodeId& node) {
  for (auto& [id, job] : state_.jobs) {
    if (job.newcomers.erase(node) > 0) Consider(&job);
  }
}

void Controller::Impl::Grow(JobStateView* job) {
  Runtime& run = runtime_[job->record.spec.job];
  if (run.grow_at.ns == 0 || now_ < run.grow_at || job->record.state != JobState::kRunning) return;
  run.grow_at = {};
  Reason reason;
  std::string evidence;
  if (Better(*job, ChooseNodes(*job, Cold::kNone), &reason, &evidence)) {
    Prepare(job, reason, evidence, false);
  } else {
    WatchNewcomers(job);
  }
}

void Controller::Impl::On(const NodeWarm& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || IsTerminal(job->record.state)) return;
  node->warm[e.job] = e.warm ? Warmth::kReady : Warmth::kNever;
  runtime_[e.job].emptied.erase(e.node);
  if (job->newcomers.contains(e.node)) Consider(job);
}

}  // namespace everstep::controller
