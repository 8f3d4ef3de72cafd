#include "controller/core/copies.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace everstep::controller {
namespace {

std::string Label(const NodeFacts& facts, const char* key) {
  const auto label = facts.labels.find(key);
  return label == facts.labels.end() ? std::string() : label->second;
}

std::vector<std::string> Names(const std::string& list) {
  std::vector<std::string> out(1);
  for (const char c : list) {
    if (c == ',') {
      out.emplace_back();
    } else {
      out.back() += c;
    }
  }
  std::erase(out, "");
  return out;
}

// By node: on which nodes its newest capture lies now, itself first; empty: it captured nothing.
// At most `copies` of them, those with the newest step.
std::vector<std::vector<std::uint32_t>> LieNow(const JobStateView& job,
                                               const std::vector<NodeId>& nodes,
                                               std::uint32_t copies) {
  // Replicas by what they are of; by step, newest first.
  std::map<std::pair<Generation, Rank>, std::vector<std::pair<everstep::Step, std::uint32_t>>>
      replicas;
  std::vector<const HeldShard*> newest(nodes.size(), nullptr);  // own
  for (std::uint32_t i = 0; i < nodes.size(); ++i) {
    const auto holds = job.holdings.find(nodes[i]);
    if (holds == job.holdings.end()) continue;
    for (const HeldShard& s : holds->second.shards) {
      if (s.generation <= job.record.earlier_runs) continue;
      if (s.replica) {
        replicas[{s.generation, s.rank}].emplace_back(-s.step, i);
      } else if (newest[i] == nullptr || std::pair(s.generation, s.step) >
                                             std::pair(newest[i]->generation, newest[i]->step)) {
        newest[i] = &s;
      }
    }
  }
  for (auto& [of, found] : replicas) std::sort(found.begin(), found.end());
  std::vector<std::vector<std::uint32_t>> out(nodes.size());
  for (std::uint32_t i = 0; i < nodes.size(); ++i) {
    if (newest[i] == nullptr) continue;
    out[i] = {i};
    for (const auto& [step, peer] : replicas[{newest[i]->generation, newest[i]->rank}]) {
      const bool there = std::find(out[i].begin(), out[i].end(), peer) != out[i].end();
      if (!there && out[i].size() < copies) out[i].push_back(peer);
    }
  }
  return out;
}

}  // namespace

FailureDomains DomainsOf(const ClusterState& state, const std::vector<NodeId>& nodes) {
  FailureDomains out;
  const auto facts = [&](const NodeId& id) -> const NodeFacts& {
    return state.nodes.at(id).record.facts;
  };
  for (const char* key : kDomainLabels) {
    FailureDomains::Level level{.name = key, .values = {}, .of = {}};
    std::map<std::string, std::uint32_t> numbers;
    for (const NodeId& id : nodes) {
      std::string value = Label(facts(id), key);
      if (value.empty() && level.name == "host") value = facts(id).address;
      if (value.empty()) {
        level.of.push_back(checkpoint::kNoDomain);
        continue;
      }
      const auto next = static_cast<std::uint32_t>(level.values.size());
      const auto [it, is_new] = numbers.emplace(value, next);
      if (is_new) level.values.push_back(value);
      level.of.push_back(it->second);
    }
    if (!level.values.empty()) out.levels.push_back(std::move(level));
  }
  std::map<std::string, std::vector<std::uint32_t>> evicted;
  for (std::uint32_t i = 0; i < nodes.size(); ++i) {
    for (const std::string& name : Names(Label(facts(nodes[i]), kEvictLabel))) {
      auto& members = evicted[name];
      if (members.empty() || members.back() != i) members.push_back(i);
    }
  }
  out.evicted.assign(evicted.begin(), evicted.end());
  return out;
}

std::string DomainText(const NodeState& node) {
  std::string text;
  const auto add = [&](const char* key) {
    const std::string value = Label(node.record.facts, key);
    if (!value.empty()) text += fmt::format("{}{}={}", text.empty() ? "" : " ", key, value);
  };
  for (const char* key : kDomainLabels) add(key);
  add(kEvictLabel);
  return text;
}

std::uint32_t CopiesOf(const JobSpec& spec, std::size_t nodes) {
  const std::size_t wanted = spec.copies == 0 ? kDefaultCopies : spec.copies;
  return static_cast<std::uint32_t>(std::clamp<std::size_t>(nodes, 1, wanted));
}

checkpoint::Placement PlaceCopies(const ClusterState& state, const JobStateView& job,
                                  const std::vector<NodeId>& nodes) {
  const FailureDomains domains = DomainsOf(state, nodes);
  checkpoint::PlacementInput in{.nodes = static_cast<std::uint32_t>(nodes.size()),
                                .copies = CopiesOf(job.record.spec, nodes.size())};
  for (const FailureDomains::Level& level : domains.levels) in.levels.push_back(level.of);
  for (const auto& [name, members] : domains.evicted) in.together.push_back(members);
  in.previous = LieNow(job, nodes, in.copies);
  const bool any = std::any_of(in.previous.begin(), in.previous.end(),
                               [](const auto& hosts) { return hosts.size() > 1; });
  if (!any) in.previous.clear();
  return checkpoint::Place(in);
}

void AssignPeers(const ClusterState& state, const JobStateView& job, GenerationPlan* plan) {
  std::vector<NodeId> nodes;
  for (const NodePlan& member : plan->nodes) nodes.push_back(member.node);
  const checkpoint::Placement placement = PlaceCopies(state, job, nodes);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    std::vector<PeerPlan>& peers = plan->nodes[i].peers;
    peers.clear();
    for (std::size_t k = 1; k < placement.hosts[i].size(); ++k) {
      const NodePlan& peer = plan->nodes[placement.hosts[i][k]];
      peers.push_back({peer.node, fmt::format("{}:{}", peer.address, peer.data_port)});
    }
  }
}

std::size_t LeastCopies(const CopySets& copies) {
  std::size_t least = copies.hosts.empty() ? 0 : copies.hosts.front().size();
  for (const std::vector<std::uint32_t>& hosts : copies.hosts) {
    least = std::min(least, hosts.size());
  }
  return least;
}

CopySets CopiesNow(const ClusterState& state, const JobStateView& job) {
  CopySets out;
  std::map<NodeId, std::uint32_t> index;
  const auto add = [&](const NodeId& id) {
    const auto it = index.emplace(id, static_cast<std::uint32_t>(out.nodes.size())).first;
    if (it->second == out.nodes.size()) out.nodes.push_back(id);
  };
  for (const NodePlan& member : job.plan.nodes) add(member.node);
  out.members = out.nodes.size();
  for (const auto& [id, holds] : job.holdings) {
    const auto node = state.nodes.find(id);
    const bool lives = node != state.nodes.end() && node->second.record.health != NodeHealth::kLost;
    if (lives && !holds.shards.empty()) add(id);
  }
  if (job.commits.commits.empty() || job.commits.commits.front().shards.empty()) {
    for (std::uint32_t i = 0; i < out.members; ++i) {
      const NodePlan& member = job.plan.nodes[i];
      std::vector<std::uint32_t> set = {i};
      for (const PeerPlan& keeps : member.peers) {
        const auto peer = index.find(keeps.node);
        if (peer != index.end()) set.push_back(peer->second);
      }
      out.hosts.push_back(std::move(set));
    }
    return out;
  }
  const Commit& commit = job.commits.commits.front();
  out.step = commit.step;
  out.replicated = commit.replicated_layout;
  std::map<Rank, std::set<std::uint32_t>> holders;
  std::map<Rank, std::uint32_t> crc;
  for (const HeldShard& wanted : commit.shards) crc[wanted.rank] = wanted.crc_root;
  for (const auto& [id, holds] : job.holdings) {
    const auto at = index.find(id);
    const auto node = state.nodes.find(id);
    if (at == index.end() || node == state.nodes.end() ||
        node->second.record.health == NodeHealth::kLost) {
      continue;
    }
    for (const HeldShard& s : holds.shards) {
      const auto wanted = crc.find(s.rank);
      if (s.step != commit.step || s.generation != commit.shards.front().generation) continue;
      if (out.replicated || (wanted != crc.end() && wanted->second == s.crc_root)) {
        holders[out.replicated ? 0 : s.rank].insert(at->second);
      }
    }
  }
  for (const HeldShard& wanted : commit.shards) {
    if (out.replicated) break;
    const std::set<std::uint32_t>& set = holders[wanted.rank];
    out.hosts.emplace_back(set.begin(), set.end());
  }
  if (out.replicated) out.hosts.emplace_back(holders[0].begin(), holders[0].end());
  return out;
}

}  // namespace everstep::controller
