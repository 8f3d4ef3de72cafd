// The brain's part about agents' streams: who is bound to which registration, and who is gone.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/server/brain.h"
#include "controller/server/convert.h"
#include "proto/base/kill_point.h"
#include "proto/base/log.h"

namespace everstep::controller {
namespace {

constexpr std::uint64_t kBeatsPerAnswer = 2;  // two answers in the shortest lease, and more

}  // namespace

// Two living nodes of one name would take the place from each other for ever; the second is told.
bool Brain::NameTaken(const v1::Register& message, std::string* who) const {
  const auto bound = bound_.find(message.node());
  if (bound == bound_.end() || !bound->second.stream) return false;
  const auto node = state().nodes.find(message.node());
  if (node == state().nodes.end() || node->second.record.health != NodeHealth::kAlive) return false;
  const v1::Register& old = bound->second.facts;
  const bool same_place =
      old.boot_id() == message.boot_id() && old.pid_namespace() == message.pid_namespace();
  const bool same_keeper = same_place && old.keeper_pid() == message.keeper_pid() &&
                           old.keeper_start_time() == message.keeper_start_time();
  if (same_keeper) return false;  // its agent came back before its old stream was seen to break
  // On this machine the death of the old keeper is known; elsewhere silence has to prove it.
  const bool watched = old.boot_id() == here_.boot_id && old.pid_namespace() == here_.pid_namespace;
  if (same_place && (!watched || bound->second.keeper_dead)) return false;
  *who = fmt::format("{} (keeper pid {}), heard {} ms ago", old.address(), old.keeper_pid(),
                     ToMilliseconds(now() - node->second.last_heard));
  return true;
}

void Brain::Take(Register& item) {
  const NodeId node = item.message.node();
  if (std::string who; NameTaken(item.message, &who)) {
    ++counters_.agents_refused;
    LogWarning("agent_refused", {{"node", node}, {"reason", "name_taken"}, {"holder", who}});
    item.stream->Close(
        AgentStream::Why::kTaken,
        fmt::format("a living node is called {} already: {}\nhint: start this agent with another "
                    "--node, or end the other one first",
                    node, who));
    return;
  }
  const NodeRegistered event = FromWire(item.message, item.session);
  registering_[item.session] = {item.stream, std::move(item.message), std::nullopt};
  const std::size_t before = pending_.size();
  Step(event);
  const bool let_in =
      pending_.size() > before &&
      std::any_of(pending_.back().commands.begin(), pending_.back().commands.end(),
                  [&](const Command& c) {
                    const auto* registered = std::get_if<RegisteredCommand>(&c.body);
                    return registered != nullptr && registered->session == item.session;
                  });
  if (let_in) return;  // Bind follows when it is durable
  registering_.erase(item.session);
  ++counters_.agents_refused;
  item.stream->Close(
      AgentStream::Why::kTooMany,
      fmt::format(
          "node {} is one too many: this controller takes {} (--max-nodes)\nhint: start the "
          "controller with a larger --max-nodes",
          node, config_.core.max_nodes));
}

void Brain::Bind(const Command& command, const RegisteredCommand& registered) {
  const auto it = registering_.find(registered.session);
  if (it == registering_.end()) return;
  Fence(command.node);
  const std::optional<std::string> broken = std::move(it->second.broken);
  Bound& bound = bound_[command.node];
  bound = Bound{registered.session,           command.incarnation,
                std::move(it->second.stream), 0,
                std::move(it->second.facts),  false};
  // What is not needed again: a thousand nodes' holdings.
  bound.facts.clear_jobs();
  registering_.erase(it);
  if (broken) {
    bound.stream.reset();
    Step(SessionClosed{command.node, command.incarnation, *broken});
    return;
  }
  sessions_[registered.session] = command.node;
  WatchKeeper(bound);
}

void Brain::WatchKeeper(const Bound& bound) {
  if (bound.facts.boot_id() != here_.boot_id || bound.facts.pid_namespace() != here_.pid_namespace)
    return;
  watch_->Watch(bound.session, bound.facts.keeper_pid(), bound.facts.keeper_start_time());
}

void Brain::Fence(const NodeId& node) {
  const auto it = bound_.find(node);
  if (it == bound_.end()) return;
  Bound& bound = it->second;
  watch_->Forget(bound.session);
  if (!bound.stream) return;
  bound.stream->Close(
      AgentStream::Why::kFenced,
      fmt::format("registration {} of node {} is over: the node was taken for lost, or a newer one "
                  "came",
                  bound.incarnation, node));
  sessions_.erase(bound.session);
  bound.stream.reset();
  for (auto& [id, tail] : tails_) tail.asked.erase(node);
  relay_.NodeGone(node);
}

bool Brain::SendTo(const NodeId& node, v1::ControllerMessage message) {
  const auto it = bound_.find(node);
  if (it == bound_.end() || !it->second.stream) return false;
  message.set_incarnation(it->second.incarnation);
  message.set_sequence(++it->second.sequence);
  it->second.stream->Send(std::move(message));
  return true;
}

void Brain::Take(Closed& item) {
  if (const auto early = registering_.find(item.session); early != registering_.end()) {
    early->second.broken = item.evidence;
    return;
  }
  const auto it = sessions_.find(item.session);
  if (it == sessions_.end()) return;  // fenced before
  const NodeId node = it->second;
  Bound& bound = bound_.at(node);
  sessions_.erase(it);
  bound.stream.reset();
  for (auto& [id, tail] : tails_) tail.asked.erase(node);
  relay_.NodeGone(node);
  Step(SessionClosed{node, bound.incarnation, item.evidence});
  if (bound.keeper_dead) {
    Step(NodeProcessDead{
        node, bound.incarnation,
        fmt::format("stream broke, keeper pid {} is gone", bound.facts.keeper_pid())});
  }
}

const v1::ScrubReport* Brain::scrub(const NodeId& node) const {
  const auto it = bound_.find(node);
  return it == bound_.end() || !it->second.scrub ? nullptr : &*it->second.scrub;
}

const v1::CheckpointTraffic* Brain::traffic(const NodeId& node) const {
  const auto it = bound_.find(node);
  if (it == bound_.end() || it->second.traffic.sent_bytes().empty()) return nullptr;
  return &it->second.traffic;
}

void Brain::Take(KeeperDead& item) {
  const auto it = std::find_if(bound_.begin(), bound_.end(), [&](const auto& entry) {
    return entry.second.session == item.session;
  });
  if (it == bound_.end()) return;
  it->second.keeper_dead = true;
  // An agent that lives reports its keeper's death itself, with what it knows.
  if (it->second.stream) return;
  Step(NodeProcessDead{
      it->first, it->second.incarnation,
      fmt::format("stream broke, keeper pid {} is gone", it->second.facts.keeper_pid())});
}

void Brain::Take(Report& item) {
  const auto it = sessions_.find(item.session);
  if (it == sessions_.end()) return;  // of a registration that is over
  Bound& bound = bound_.at(it->second);
  bound.stream->Handled();
  if (item.message.has_heartbeat() && item.message.heartbeat().has_scrub()) {
    bound.scrub = item.message.heartbeat().scrub();
  }
  if (item.message.has_heartbeat() && item.message.heartbeat().has_traffic()) {
    bound.traffic.Swap(item.message.mutable_heartbeat()->mutable_traffic());
  }
  if (const auto event = FromWire(it->second, item.message, bound.facts)) Step(*event);
  KillPoint("commit.report_taken");
  if (item.message.has_heartbeat() && item.message.incarnation() == bound.incarnation &&
      item.message.heartbeat().sequence() % kBeatsPerAnswer == 0) {
    v1::ControllerMessage answer;
    answer.mutable_heard()->set_heartbeat(item.message.heartbeat().sequence());
    SendTo(it->second, std::move(answer));
  }
  if (item.message.has_keeper_lost() && item.message.incarnation() == bound.incarnation) {
    watch_->Forget(item.session);
    bound.keeper_dead = false;
    bound.facts.set_keeper_pid(item.message.keeper_lost().new_keeper_pid());
    bound.facts.set_keeper_start_time(item.message.keeper_lost().new_keeper_start_time());
    WatchKeeper(bound);
  }
}

}  // namespace everstep::controller
