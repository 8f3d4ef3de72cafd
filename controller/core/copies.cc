#include "controller/core/copies.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "checkpoint/core/parity_groups.h"
#include "checkpoint/core/parity_ranks.h"

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
      if (checkpoint::IsParity(s.rank, s.world_size)) continue;
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
  if (ParityOf(spec, nodes)) return 1;
  const std::size_t wanted = spec.copies == 0 ? kDefaultCopies : spec.copies;
  return static_cast<std::uint32_t>(std::clamp<std::size_t>(nodes, 1, wanted));
}

checkpoint::Redundancy AskedFor(const JobSpec& spec) {
  const std::uint32_t copies = spec.copies == 0 ? kDefaultCopies : spec.copies;
  return {.shards = copies < 2 ? 1 : std::max(spec.parity_states, 1U), .parity = copies - 1};
}

std::string RedundancyTrouble(const JobSpec& spec) {
  if (spec.parity_states < 2) return {};
  const checkpoint::Redundancy asked = AskedFor(spec);
  if (asked.copies() || asked.shards > checkpoint::kMostShards ||
      asked.parity > checkpoint::kMostParity) {
    return fmt::format("{} parities over {} states; k is 2 to {}, r is 1 to {}", asked.parity,
                       spec.parity_states, checkpoint::kMostShards, checkpoint::kMostParity);
  }
  const std::uint32_t takes = asked.shards + asked.parity;
  if (takes <= spec.max_nodes) return {};
  return fmt::format(
      "{} takes {} nodes, the job has at most {}; {} fits", checkpoint::PrintRedundancy(asked),
      takes, spec.max_nodes,
      checkpoint::PrintRedundancy(checkpoint::OnNodes(asked, std::max(1U, spec.max_nodes))));
}

checkpoint::Redundancy RedundancyOf(const JobSpec& spec, std::size_t nodes) {
  return checkpoint::OnNodes(AskedFor(spec),
                             static_cast<std::uint32_t>(std::max<std::size_t>(nodes, 1)));
}

std::optional<checkpoint::Redundancy> ParityOf(const JobSpec& spec, std::size_t nodes) {
  const checkpoint::Redundancy policy = RedundancyOf(spec, nodes);
  if (policy.copies()) return std::nullopt;  // as asked, or too few nodes for more than copies
  return policy;
}

ParityPlan PlanParity(const ClusterState& state, const JobSpec& spec,
                      const std::vector<NodeId>& nodes) {
  const FailureDomains domains = DomainsOf(state, nodes);
  checkpoint::ParityInput in{.nodes = static_cast<std::uint32_t>(nodes.size()),
                             .policy = *ParityOf(spec, nodes.size())};
  for (const FailureDomains::Level& level : domains.levels) in.levels.push_back(level.of);
  for (const auto& [name, members] : domains.evicted) in.together.push_back(members);
  const checkpoint::ParityPlacement placed = checkpoint::PlaceParity(in);
  ParityPlan plan{.parity = placed.policy.parity, .groups = {}};
  for (const auto& group : placed.groups) {
    for (std::uint32_t local = 0; local < spec.nproc_per_node; ++local) {
      std::vector<Rank> ranks;
      ranks.reserve(group.size());
      for (const std::uint32_t node : group) {
        ranks.push_back(static_cast<Rank>(node * spec.nproc_per_node + local));
      }
      plan.groups.push_back(std::move(ranks));
    }
  }
  return plan;
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
  plan->parity = {};
  if (ParityOf(job.record.spec, nodes.size())) {
    plan->parity = PlanParity(state, job.record.spec, nodes);
  }
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

namespace {

// Where the states and parities of a step lie: by the plan, nothing being committed yet.
void PlanGroups(const JobStateView& job, CopySets* out) {
  out->parity = job.plan.parity;
  const std::uint32_t workers = std::max(1U, job.record.spec.nproc_per_node);
  const auto world = static_cast<std::int32_t>(out->members * workers);
  for (const std::vector<Rank>& group : out->parity.groups) {
    for (const Rank rank : group) {
      const auto node = static_cast<std::uint32_t>(rank) / workers;
      out->at[rank] = {node};
      for (std::uint32_t p = 0; p < out->parity.parity; ++p) {
        out->at[checkpoint::ParityRank(rank, p, world)] = {node};
      }
      out->wanted += out->parity.parity;
    }
  }
  out->parities = out->wanted;
}

// ... and of the newest commit, by what nodes reported.
void NoteParity(const Commit& commit, const HeldShard& s, std::uint32_t node, CopySets* out) {
  for (const std::vector<HeldShard>* wanted : {&commit.shards, &commit.parities}) {
    const bool is = std::any_of(wanted->begin(), wanted->end(), [&s](const HeldShard& w) {
      return w.rank == s.rank && w.crc_root == s.crc_root;
    });
    if (!is) continue;
    std::vector<std::uint32_t>& at = out->at[s.rank];
    if (std::find(at.begin(), at.end(), node) == at.end()) at.push_back(node);
  }
}

std::int32_t WorldOf(const CopySets& copies) {
  std::size_t ranks = 0;
  for (const std::vector<Rank>& group : copies.parity.groups) ranks += group.size();
  return static_cast<std::int32_t>(ranks);
}

}  // namespace

std::vector<Rank> RanksLostWith(const CopySets& copies, const std::vector<std::uint32_t>& gone) {
  std::vector<Rank> out;
  if (copies.parity.groups.empty()) {
    for (const std::uint32_t rank : checkpoint::LostWith(copies.hosts, gone)) {
      out.push_back(static_cast<Rank>(rank));
    }
    return out;
  }
  std::set<Rank> have;
  for (const auto& [rank, nodes] : copies.at) {
    const bool left = std::any_of(nodes.begin(), nodes.end(), [&gone](std::uint32_t node) {
      return std::find(gone.begin(), gone.end(), node) == gone.end();
    });
    if (left) have.insert(rank);
  }
  for (const std::vector<Rank>& group : copies.parity.groups) {
    if (checkpoint::Recoverable(
            checkpoint::CodewordsOf(group, copies.parity.parity, WorldOf(copies)), have)) {
      continue;
    }
    for (const Rank rank : group) {
      if (!have.contains(rank)) out.push_back(rank);
    }
  }
  std::sort(out.begin(), out.end());
  return out;
}

// A row bears the loss of as many of its pieces as it has parities; a node may hold several. The
// groups of one set of nodes, one for each local rank, count as the weakest of them.
std::vector<checkpoint::LossGroup> LossGroupsOf(const CopySets& copies) {
  std::vector<checkpoint::LossGroup> out;
  for (const std::vector<Rank>& group : copies.parity.groups) {
    std::set<std::uint32_t> nodes;
    std::uint32_t tolerates = copies.parity.parity;
    for (const checkpoint::Codeword& word :
         checkpoint::CodewordsOf(group, copies.parity.parity, WorldOf(copies))) {
      std::map<std::uint32_t, std::uint32_t> pieces;  // that go with a node
      std::uint32_t missing = 0;
      for (const std::vector<Rank>* ranks : {&word.members, &word.parities}) {
        for (const Rank rank : *ranks) {
          const auto at = copies.at.find(rank);
          if (at == copies.at.end() || at->second.empty()) {
            ++missing;
            continue;
          }
          nodes.insert(at->second.begin(), at->second.end());
          if (at->second.size() == 1) ++pieces[at->second.front()];
        }
      }
      std::vector<std::uint32_t> worst;
      worst.reserve(pieces.size());
      for (const auto& [node, count] : pieces) worst.push_back(count);
      std::sort(worst.rbegin(), worst.rend());
      std::uint32_t bears = 0, taken = missing;
      while (bears < worst.size() && taken + worst[bears] <= copies.parity.parity) {
        taken += worst[bears++];
      }
      tolerates = std::min(tolerates, bears);
    }
    checkpoint::LossGroup merged{{nodes.begin(), nodes.end()}, tolerates};
    std::erase_if(out, [&merged](const checkpoint::LossGroup& other) {
      const bool shared =
          std::any_of(other.nodes.begin(), other.nodes.end(), [&merged](std::uint32_t node) {
            return std::find(merged.nodes.begin(), merged.nodes.end(), node) != merged.nodes.end();
          });
      if (!shared) return false;
      merged.nodes.insert(merged.nodes.end(), other.nodes.begin(), other.nodes.end());
      merged.tolerates = std::min(merged.tolerates, other.tolerates);
      return true;
    });
    std::sort(merged.nodes.begin(), merged.nodes.end());
    merged.nodes.erase(std::unique(merged.nodes.begin(), merged.nodes.end()), merged.nodes.end());
    out.push_back(std::move(merged));
  }
  return out;
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
    PlanGroups(job, &out);
    return out;
  }
  const Commit& commit = job.commits.commits.front();
  out.step = commit.step;
  out.replicated = commit.replicated_layout;
  out.parity = commit.parity;
  out.wanted = commit.parities.size();
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
      if (!commit.parity.groups.empty() && !s.file) NoteParity(commit, s, at->second, &out);
      if (checkpoint::IsParity(s.rank, s.world_size)) continue;
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
  for (const HeldShard& parity : commit.parities) out.parities += out.at.count(parity.rank);
  return out;
}

}  // namespace everstep::controller
