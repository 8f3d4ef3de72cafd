// Who is alive. A broken stream makes a node SUSPECT at once; it is LOST after its lease, or at
// once when its keeper is known dead. Docs: docs/internals/lifecycle.md, "Loss of a node".
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {

NodeState* Controller::Impl::Fresh(const NodeId& id, Incarnation incarnation) {
  const auto it = state_.nodes.find(id);
  if (it != state_.nodes.end() && Bug(kBugMissingFence)) return &it->second;
  if (it == state_.nodes.end() || it->second.record.incarnation != incarnation ||
      it->second.record.health == NodeHealth::kLost) {
    ++state_.stale_dropped;
    return nullptr;
  }
  return &it->second;
}

void Controller::Impl::Heard(NodeState* node) {
  const Duration gap = now_ - node->last_heard;
  const Duration wanted = std::max(4 * gap, node->lease - node->lease / 16);
  node->lease = std::clamp(wanted, options_.lease, std::max(options_.lease, options_.max_lease));
  node->last_heard = now_;
  Watch(*node);
}

Timestamp Controller::Impl::NodeDeadline(const NodeState& node) const {
  if (node.record.health == NodeHealth::kLost) return {};
  const bool alive = node.record.health == NodeHealth::kAlive;
  const Timestamp silence = node.last_heard + (alive ? node.lease / 2 : node.lease);
  return node.record.leave_by.ns != 0 ? std::min(silence, node.record.leave_by) : silence;
}

void Controller::Impl::Watch(const NodeState& node) {
  const Timestamp deadline = NodeDeadline(node);
  if (deadline.ns != 0 && (node_wakeup_.ns == 0 || deadline < node_wakeup_)) {
    node_wakeup_ = deadline;
  }
}

void Controller::Impl::On(const NodeRegistered& e) {
  JournalRecovery();
  auto it = state_.nodes.find(e.node);
  if (it == state_.nodes.end() && state_.nodes.size() >= options_.max_nodes) {
    Journal({.type = "node_refused",
             .severity = Severity::kError,
             .reason = Reason::kTooManyNodes,
             .node = e.node,
             .message = fmt::format("node {} is one too many", e.node),
             .evidence =
                 fmt::format("nodes={} max_nodes={}", state_.nodes.size(), options_.max_nodes)});
    out_->close_sessions.push_back(e.node);
    return;
  }
  const bool known = it != state_.nodes.end();
  if (known && it->second.record.health != NodeHealth::kLost &&
      it->second.record.keeper_id != e.keeper_id) {
    LoseNode(e.node, Reason::kNodeReturned,
             fmt::format("registered with a new keeper, keeper_id {:x} was {:x}", e.keeper_id,
                         it->second.record.keeper_id));
  }
  NodeState& node = state_.nodes[e.node];
  const bool reattached = known && node.record.health != NodeHealth::kLost;
  if (node.record.draining && node.record.keeper_id != e.keeper_id &&
      node.record.drain_reason.starts_with(ReasonName(Reason::kNotice))) {
    // What announced its end has ended; this is another life of the node.
    node.record.draining = false;
    node.record.drain_reason.clear();
    node.record.leave_by = {};
  }
  if (known) PersistBreaks(e.node, "its agent registered again");
  if (node.connected) out_->close_sessions.push_back(e.node);
  node.record.node = e.node;
  node.record.incarnation = std::max(node.record.incarnation, e.previous_incarnation) + 1;
  node.record.keeper_id = e.keeper_id;
  node.record.facts = e.facts;
  node.record.health = NodeHealth::kAlive;
  node.connected = true;
  node.last_heard = now_;
  node.lease = std::max(node.lease, options_.lease);
  node.next_sequence = 1;
  node.warm.clear();
  Watch(node);
  node.reason = reattached ? Reason::kReattached : Reason::kRegistered;
  node.since = now_;
  node.evidence.clear();
  if (reattached) ++node.reattached;
  dirty_nodes_.insert(e.node);
  for (auto& [id, run] : runtime_) run.excluded.erase(e.node);
  Journal({.type = reattached ? "node_reattached" : "node_registered",
           .reason = node.reason,
           .node = e.node,
           .message = fmt::format("node {} {} as incarnation {}", e.node,
                                  reattached ? "is back" : "joined", node.record.incarnation),
           .evidence = fmt::format("keeper_id={:x} address={}", e.keeper_id, e.facts.address)});
  RegisteredCommand answer{.session = e.session,
                           .heartbeat_interval = options_.heartbeat_interval,
                           .lease = node.lease,
                           .known_jobs = {}};
  for (const auto& [id, job] : state_.jobs) {
    // What a failed job left in memory stays: it may be handed in again to go on.
    if (!IsTerminal(job.record.state) || KeepsMemory(job.record)) answer.known_jobs.push_back(id);
  }
  Send(e.node, std::move(answer));
  Reattach(&node, e);
  for (auto& [id, job] : state_.jobs) Consider(&job);
}

void Controller::Impl::On(const SessionClosed& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  node->connected = false;
  Suspect(e.node, Reason::kStreamBroken, e.evidence);
}

void Controller::Impl::Suspect(const NodeId& id, Reason reason, const std::string& evidence) {
  NodeState& node = state_.nodes.at(id);
  node.record.health = NodeHealth::kSuspect;
  node.reason = reason;
  node.evidence = evidence;
  node.since = now_;
  Watch(node);
  Journal({.type = "node_suspect",
           .severity = Severity::kWarning,
           .reason = reason,
           .node = id,
           .message = fmt::format(
               "node {} is suspect: {}", id,
               reason == Reason::kStreamBroken ? "its stream broke" : "its heartbeat is overdue"),
           .evidence = evidence});
  LeaveOut(id);
}

void Controller::Impl::On(const NodeProcessDead& e) {
  if (Fresh(e.node, e.incarnation) != nullptr) LoseNode(e.node, Reason::kNodeDied, e.evidence);
}

void Controller::Impl::On(const KeeperLost& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  node->record.keeper_id = e.new_keeper_id;
  node->reason = Reason::kKeeperDied;
  node->evidence = e.message;
  node->since = now_;
  node->warm.clear();
  dirty_nodes_.insert(e.node);
  Journal({.type = "keeper_died",
           .severity = Severity::kError,
           .reason = Reason::kKeeperDied,
           .node = e.node,
           .message = fmt::format("the keeper of node {} died and its workers with it", e.node),
           .evidence = e.message});
  for (auto& [id, job] : state_.jobs) {
    job.holdings.erase(e.node);
    const JobState s = job.record.state;
    if (IsTerminal(s)) continue;
    if (Eligible(job, *node)) Warm(job, e.node);
    if (!IsMember(job, e.node)) continue;
    runtime_[id].emptied.insert(e.node);
    if (s == JobState::kStopping) {
      job.waiting_for.erase(e.node);
      if (job.waiting_for.empty()) FinishStop(&job);
    } else if (s == JobState::kRunning || s == JobState::kActivating || s == JobState::kPreparing) {
      LoseCapacity(&job, Reason::kKeeperDied, fmt::format("node {}", e.node), e.message);
      if (EndOfGeneration(&job, true)) Prepare(&job, Reason::kKeeperDied, e.message, true);
    }
  }
  LeaveOut(e.node);
}

void Controller::Impl::On(const Heartbeat& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  const Duration silent = now_ - node->last_heard;
  Heard(node);
  if (node->connected && node->record.health == NodeHealth::kSuspect) {
    node->record.health = NodeHealth::kAlive;
    node->reason = Reason::kHeartbeatResumed;
    node->since = now_;
    node->evidence = fmt::format("silent_ms={}", ToMilliseconds(silent));
    Journal(
        {.type = "node_alive",
         .reason = node->reason,
         .node = e.node,
         .message = fmt::format("node {} is heard again", e.node),
         .evidence = fmt::format("{} lease_ms={}", node->evidence, ToMilliseconds(node->lease))});
    for (auto& [id, job] : state_.jobs) Consider(&job);
  }
  for (const JobProgress& progress : e.jobs) {
    JobStateView* job = FindJob(progress.job);
    if (job == nullptr || job->record.state != JobState::kRunning) continue;
    if (progress.generation != job->record.generation) continue;
    Progress(job, progress.step);
    GiveUpCopies(job);
  }
}

void Controller::Impl::On(const Notice& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  const Duration left = std::max(e.deadline - options_.notice_margin, Duration{});
  node->record.leave_by = e.deadline.count() > 0 ? now_ + left : Timestamp{};
  dirty_nodes_.insert(e.node);
  StartDrain(e.node, Reason::kNotice,
             fmt::format("source={} deadline_ms={}", e.source, ToMilliseconds(e.deadline)));
  LeaveNodes();
  Watch(*node);
}

void Controller::Impl::On(const DrainNode& e) {
  const auto it = state_.nodes.find(e.node);
  if (it == state_.nodes.end()) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no node is called '{}'", e.node),
           "everstep node list");
    return;
  }
  if (!e.allow_pause) {
    for (const auto& [id, job] : state_.jobs) {
      if (IsTerminal(job.record.state) || job.record.state == JobState::kWaiting ||
          !IsMember(job, e.node)) {
        continue;
      }
      std::vector<NodeId> left = ChooseNodes(job, Cold::kAll);
      std::erase(left, e.node);
      // ChooseNodes stops at max_nodes: a free node may stand in for the drained one.
      for (const auto& [other, node] : state_.nodes) {
        if (other != e.node && Eligible(job, node) &&
            std::find(left.begin(), left.end(), other) == left.end()) {
          left.push_back(other);
        }
      }
      if (left.size() < job.record.spec.min_nodes) {
        Answer(e.request, ReplyCode::kFailedPrecondition,
               fmt::format("job '{}' needs {} nodes and would keep {} without node '{}'", id,
                           job.record.spec.min_nodes, left.size(), e.node),
               "add a node first, or drain with --allow-pause to let the job wait");
        return;
      }
    }
  }
  // With allow_pause a job that cannot go on without the node waits for another one.
  StartDrain(e.node, Reason::kNodeDrained, e.reason, e.allow_pause);
  Answer(e.request, ReplyCode::kOk, fmt::format("node '{}' is draining", e.node));
}

void Controller::Impl::StartDrain(const NodeId& id, Reason reason, const std::string& why,
                                  bool pause) {
  NodeState& node = state_.nodes.at(id);
  const bool first = !node.record.draining;
  if (first) {
    node.record.draining = true;
    node.drain_since = now_;
    node.record.drain_reason = fmt::format("{}: {}", ReasonName(reason), why);
    dirty_nodes_.insert(id);
    Journal({.type = "node_draining",
             .severity = Severity::kWarning,
             .reason = reason,
             .node = id,
             .message = fmt::format("node {} is draining", id),
             .evidence = why});
  }
  for (auto& [job_id, job] : state_.jobs) {
    const JobState s = job.record.state;
    if (s != JobState::kRunning && s != JobState::kActivating && s != JobState::kPreparing)
      continue;
    if (!IsMember(job, id)) continue;
    if (first) StartPersist(&job, Reason::kLastBreath);
    const std::vector<NodeId> chosen = ChooseNodes(job, Cold::kNone);
    const bool lingers = std::find(chosen.begin(), chosen.end(), id) != chosen.end();
    if (!lingers && chosen.size() >= job.record.spec.min_nodes) {
      Prepare(&job, reason, fmt::format("node {}: {}", id, why), false);
      continue;
    }
    if (pause) Prepare(&job, reason, fmt::format("node {}: {}", id, why), false);
    if (pause || !first) continue;
    Journal({.type = "drain_deferred",
             .severity = Severity::kWarning,
             .reason = reason,
             .job = job_id,
             .node = id,
             .generation = job.record.generation,
             .message = fmt::format("job {} trains on with node {}: no node can take its place",
                                    job_id, id),
             .evidence = lingers ? fmt::format("leaves_in_ms={}",
                                               ToMilliseconds(node.record.leave_by - now_))
                                 : fmt::format("nodes_left={} min_nodes={}", chosen.size(),
                                               job.record.spec.min_nodes)});
    Consider(&job);  // one that could gets ready first
  }
  LeaveOut(id);
}

bool Controller::Impl::Lingers(const NodeState& node) const {
  return node.record.draining && node.record.leave_by > now_;
}

void Controller::Impl::LeaveNodes() {
  for (auto& [id, node] : state_.nodes) {
    if (node.record.leave_by.ns == 0 || now_ < node.record.leave_by) continue;
    node.record.leave_by = {};
    dirty_nodes_.insert(id);
    for (auto& [job_id, job] : state_.jobs) {
      const JobState s = job.record.state;
      const bool runs =
          s == JobState::kRunning || s == JobState::kActivating || s == JobState::kPreparing;
      // Too few nodes without it: the job waits, its state safe, rather than die with the node. Its
      // time is nearly over: as short a grace as after a loss.
      if (runs && IsMember(job, id)) {
        Prepare(&job, Reason::kNotice, fmt::format("node {}: {}", id, node.record.drain_reason),
                true);
      }
    }
  }
}

void Controller::Impl::On(const UndrainNode& e) {
  const auto it = state_.nodes.find(e.node);
  if (it == state_.nodes.end()) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no node is called '{}'", e.node),
           "everstep node list");
    return;
  }
  if (!it->second.record.draining) {
    Answer(e.request, ReplyCode::kOk, fmt::format("node '{}' was not draining", e.node));
    return;
  }
  it->second.record.draining = false;
  const std::string was = std::exchange(it->second.record.drain_reason, "");
  it->second.record.leave_by = {};
  dirty_nodes_.insert(e.node);
  Journal({.type = "node_undrained",
           .reason = Reason::kUndrained,
           .node = e.node,
           .message = fmt::format("node {} takes part again", e.node),
           .evidence = fmt::format("was={}", was)});
  Answer(e.request, ReplyCode::kOk, fmt::format("node '{}' takes part again", e.node));
  for (auto& [id, job] : state_.jobs) Consider(&job);
}

void Controller::Impl::LoseNode(const NodeId& id, Reason reason, const std::string& evidence) {
  NodeState& node = state_.nodes.at(id);
  if (node.record.health == NodeHealth::kLost) return;
  node.record.health = NodeHealth::kLost;
  if (node.connected) out_->close_sessions.push_back(id);
  node.connected = false;
  node.record.leave_by = {};
  node.reason = reason;
  node.evidence = evidence;
  node.since = now_;
  node.warm.clear();
  dirty_nodes_.insert(id);
  Journal({.type = "node_lost",
           .severity = Severity::kError,
           .reason = reason,
           .node = id,
           .message = fmt::format("node {} is lost", id),
           .evidence = evidence});
  PersistBreaks(id, "lost");
  for (auto& [job_id, job] : state_.jobs) {
    job.holdings.erase(id);
    const bool owed = job.waiting_for.erase(id) > 0;
    switch (job.record.state) {
      case JobState::kStopping:
        if (owed && job.waiting_for.empty()) FinishStop(&job);
        break;
      case JobState::kPreparing:
        if (!IsMember(job, id)) {  // it was leaving anyway
          if (owed && job.waiting_for.empty()) Activate(&job);
          break;
        }
        [[fallthrough]];
      case JobState::kActivating:
      case JobState::kRunning:
        if (!IsMember(job, id)) break;
        LoseCapacity(&job, reason, fmt::format("node {}", id), evidence);
        if (EndOfGeneration(&job, true)) Prepare(&job, reason, evidence, true);
        break;
      default: break;
    }
  }
  LeaveOut(id);
}

}  // namespace everstep::controller
