#include "controller/server/checkpoint_status.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "checkpoint/core/parity_ranks.h"
#include "checkpoint/core/survival.h"
#include "checkpoint/core/swarm.h"
#include "controller/core/copies.h"
#include "controller/server/pace.h"
#include "controller/server/policy_status.h"

namespace everstep::controller {
namespace {

using checkpoint::NodeSet;

constexpr std::uint32_t kDefaultMaxLost = 8;

std::vector<NodeSet> NodesByDomain(const FailureDomains::Level& level, std::size_t members) {
  std::vector<NodeSet> out(level.values.size());
  for (std::uint32_t i = 0; i < members; ++i) {
    if (level.of[i] != checkpoint::kNoDomain) out[level.of[i]].push_back(i);
  }
  std::erase_if(out, [](const NodeSet& nodes) { return nodes.empty(); });
  return out;
}

std::uint64_t BytesHeld(const JobStateView& job, const NodeId& node) {
  const auto holds = job.holdings.find(node);
  std::uint64_t bytes = 0;
  if (holds == job.holdings.end()) return 0;
  for (const HeldShard& s : holds->second.shards) bytes += s.bytes;
  return bytes;
}

std::size_t Distinct(std::vector<NodeSet> sets) {
  std::sort(sets.begin(), sets.end());
  return static_cast<std::size_t>(std::unique(sets.begin(), sets.end()) - sets.begin());
}

std::vector<NodeSet> PlannedHosts(const JobStateView& job) {
  std::map<NodeId, std::uint32_t> index;
  for (const NodePlan& member : job.plan.nodes) {
    index.emplace(member.node, static_cast<std::uint32_t>(index.size()));
  }
  std::vector<NodeSet> hosts;
  for (const NodePlan& member : job.plan.nodes) {
    NodeSet set = {index.at(member.node)};
    for (const PeerPlan& keeps : member.peers) {
      if (const auto peer = index.find(keeps.node); peer != index.end()) {
        set.push_back(peer->second);
      }
    }
    std::sort(set.begin(), set.end());
    hosts.push_back(std::move(set));
  }
  return hosts;
}

const char* Shape(const std::vector<NodeSet>& hosts, std::size_t sets) {
  const std::size_t n = hosts.size();
  if (n < 2) return "alone";
  if (sets * hosts.front().size() == n) return "group";
  return sets == n ? "ring" : "mixed";
}

const Commit* NewestCommit(const JobStateView& job) {
  return job.commits.commits.empty() ? nullptr : &job.commits.commits.front();
}

bool IsOfShares(const Commit& commit) {
  return std::any_of(commit.shards.begin(), commit.shards.end(),
                     [](const HeldShard& s) { return s.share; });
}

// "zone=a": nodes of the cluster that lie in it and are not lost.
std::vector<NodeId> NodesIn(const ClusterState& state, const std::string& domain) {
  const std::size_t equals = domain.find('=');
  if (equals == std::string::npos) return {};
  const std::string key = domain.substr(0, equals), value = domain.substr(equals + 1);
  std::vector<NodeId> nodes;
  for (const auto& [id, node] : state.nodes) {
    if (node.record.health != NodeHealth::kLost) nodes.push_back(id);
  }
  const FailureDomains domains = DomainsOf(state, nodes);
  std::vector<NodeId> out;
  for (const FailureDomains::Level& level : domains.levels) {
    if (level.name != key) continue;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (level.of[i] != checkpoint::kNoDomain && level.values[level.of[i]] == value) {
        out.push_back(nodes[i]);
      }
    }
  }
  for (const auto& [name, members] : domains.evicted) {
    if (key != kEvictLabel || name != value) continue;
    for (const std::uint32_t i : members) out.push_back(nodes[i]);
  }
  return out;
}

std::string DomainsThereAre(const ClusterState& state) {
  std::set<std::string> names;
  std::vector<NodeId> nodes;
  for (const auto& [id, node] : state.nodes) {
    if (node.record.health != NodeHealth::kLost) nodes.push_back(id);
  }
  const FailureDomains domains = DomainsOf(state, nodes);
  for (const FailureDomains::Level& level : domains.levels) {
    for (const std::string& value : level.values) names.insert(level.name + "=" + value);
  }
  for (const auto& [name, members] : domains.evicted) names.insert(fmt::format("evict={}", name));
  std::vector<std::string> some(names.begin(), names.end());
  if (some.size() > 8) some.resize(8);
  return fmt::format("{}{}", fmt::join(some, ", "), names.size() > some.size() ? ", ..." : "");
}

// The members whose loss does most harm: a whole host set where `count` reaches, then others.
std::vector<NodeId> Worst(const ClusterState& state, const JobStateView& job, std::uint32_t count) {
  const CopySets copies = CopiesNow(state, job);
  const NodeSet* smallest = nullptr;
  NodeSet of_group;  // one more of a group than it bears
  if (!copies.parity.groups.empty()) {
    for (const checkpoint::LossGroup& group : LossGroupsOf(copies)) {
      NodeSet members = group.nodes;
      std::erase_if(members, [&](std::uint32_t v) { return v >= copies.members; });
      if (members.size() <= group.tolerates || group.tolerates + 1 > count) continue;
      if (!of_group.empty() && of_group.size() <= group.tolerates + 1) continue;
      of_group.assign(members.begin(), members.begin() + group.tolerates + 1);
    }
    smallest = of_group.empty() ? nullptr : &of_group;
  }
  for (const NodeSet& set : copies.hosts) {
    if (!copies.parity.groups.empty()) break;
    const bool members =
        std::all_of(set.begin(), set.end(), [&](std::uint32_t v) { return v < copies.members; });
    if (members && set.size() <= count && (smallest == nullptr || set.size() < smallest->size())) {
      smallest = &set;
    }
  }
  NodeSet chosen = smallest == nullptr ? NodeSet() : *smallest;
  for (std::uint32_t v = static_cast<std::uint32_t>(copies.members); v-- > 0;) {
    const bool in = std::find(chosen.begin(), chosen.end(), v) != chosen.end();
    if (!in && chosen.size() < count) chosen.push_back(v);
  }
  std::sort(chosen.begin(), chosen.end());
  std::vector<NodeId> out;
  for (const std::uint32_t v : chosen) out.push_back(copies.nodes[v]);
  return out;
}

// What the losses of members may take: host sets, or groups that share parities. What lies on other
// nodes, too, outlives all of theirs.
struct Losses {
  std::uint32_t members = 0;
  std::vector<NodeSet> hosts;
  std::vector<checkpoint::LossGroup> groups;  // in place of hosts

  explicit Losses(const CopySets& copies)
      : members(static_cast<std::uint32_t>(copies.members)), hosts(copies.hosts) {
    if (!copies.parity.groups.empty()) {
      groups = LossGroupsOf(copies);
      for (checkpoint::LossGroup& group : groups) {
        std::erase_if(group.nodes, [this](std::uint32_t v) { return v >= members; });
      }
    }
    std::erase_if(hosts, [this](const NodeSet& set) {
      return std::any_of(set.begin(), set.end(), [this](std::uint32_t v) { return v >= members; });
    });
  }
  checkpoint::Estimate OfNodes(std::uint32_t k) const {
    if (groups.empty()) return checkpoint::Survival(members, hosts, k);
    const double p = checkpoint::SurvivalByLosses(members, groups, k).at(k);
    return {.probability = p, .low = p, .high = p, .exact = true};
  }
  checkpoint::Estimate OfDomains(const std::vector<NodeSet>& domains, std::uint32_t k) const {
    return groups.empty() ? checkpoint::SurvivalByDomain(hosts, domains, k)
                          : checkpoint::SurvivalByDomain(groups, domains, k);
  }
  bool Fatal(const NodeSet& gone) const {
    return !(groups.empty() ? checkpoint::LostWith(hosts, gone)
                            : checkpoint::LostWith(groups, gone))
                .empty();
  }
};

// Nodes that keep parities over each member's ranks, and the ranks that each keeps parities over.
struct ParityHolders {
  std::map<NodeId, std::set<NodeId>> holders;
  std::map<NodeId, std::set<Rank>> keeps;

  explicit ParityHolders(const JobStateView& job) {
    const std::uint32_t workers = std::max(1U, job.record.spec.nproc_per_node);
    const auto world = static_cast<std::int32_t>(job.plan.nodes.size() * workers);
    const auto node = [&](Rank rank) -> const NodeId& {
      return job.plan.nodes[static_cast<std::size_t>(rank) / workers].node;
    };
    for (const std::vector<Rank>& group : job.plan.parity.groups) {
      for (const auto& word : checkpoint::CodewordsOf(group, job.plan.parity.parity, world)) {
        for (const Rank parity : word.parities) {
          const NodeId& holder = node(checkpoint::HolderOf(parity, world));
          for (const Rank rank : word.members) {
            holders[node(rank)].insert(holder);
            keeps[holder].insert(rank);
          }
        }
      }
    }
  }
};

// Memory has no step as new as the one that stands in the job's checkpoint directory.
void FromFiles(const JobStateView& job, const Forecast& forecast, v1::LossForecast* to) {
  const CommitRecord& commits = job.commits;
  for (const NodePlan& member : forecast.plan.nodes) {
    if (forecast.state == JobState::kActivating) to->add_members(member.node);
    for (const WorkerPlan& worker : member.workers) {
      v1::ShardSource* source = to->add_sources();
      source->set_rank(worker.rank);
      source->set_node(member.node);
      source->set_tier("file");
      source->set_source_node(job.record.spec.ckpt_dir);
      source->set_source_rank(worker.rank);
      source->set_choices(1);
      source->set_why("memory has no complete step as new: this rank reads its file");
      for (const HeldShard& file : job.files) {  // unknown after a restart of the controller
        if (file.rank == worker.rank) source->set_bytes(file.bytes);
      }
    }
  }
  const std::string memory = to->step() == kNoStep
                                 ? std::string("no complete step is left in memory")
                                 : fmt::format("memory is left with step {}", to->step());
  to->set_recoverable(true);
  to->set_step(commits.persisted_step);
  to->set_why(fmt::format("{}; step {} is in {}", memory, commits.persisted_step,
                          job.record.spec.ckpt_dir));
}

// The node has these very bytes in its memory now.
bool Holds(const ClusterState& state, const JobStateView& job, const NodeId& id,
           const RestorePlan& r) {
  const auto holds = job.holdings.find(id);
  return holds != job.holdings.end() && state.nodes.count(id) != 0 &&
         std::any_of(holds->second.shards.begin(), holds->second.shards.end(),
                     [&r](const HeldShard& s) {
                       return !s.file && s.step == r.step && s.generation == r.shard_generation &&
                              s.crc_root == r.crc_root;
                     });
}

// How many places have these bytes, and why this one is taken: own memory costs nothing, a peer's a
// transfer, a file a disk; of several the first that serves.
void Explain(const ClusterState& state, const JobStateView& job, const Forecast& forecast,
             const NodeId& on, const RestorePlan& r, v1::ShardSource* to) {
  std::uint32_t in_memory = 0;
  bool here = false;
  for (const auto& [id, node] : state.nodes) {
    if (node.record.health == NodeHealth::kLost || !Holds(state, job, id, r)) continue;
    if (std::find(forecast.lost.begin(), forecast.lost.end(), id) != forecast.lost.end()) continue;
    ++in_memory;
    here = here || id == on;
  }
  to->set_choices(in_memory + (r.file ? 1 : 0));
  if (r.file) {
    to->set_why("memory has no complete step as new: this rank reads its file");
  } else if (r.relay > 0) {
    to->set_why(
        fmt::format("{} and passes it on as it comes; {} holder{}, whose link carries it once",
                    r.source_node == on ? "another rank here takes it" : "that node takes it, too,",
                    in_memory, in_memory == 1 ? "" : "s"));
  } else if (r.source_node == on) {
    to->set_why("in this node's own memory: nothing is moved");
  } else {
    to->set_why(in_memory > 1
                    ? fmt::format("not in this node's memory; {} peers have it", in_memory)
                    : std::string("not in this node's memory; the only copy left"));
  }
}

std::string GroupText(const JobStateView& job, Rank rank) {
  for (const std::vector<Rank>& group : job.commits.commits.front().parity.groups) {
    if (std::find(group.begin(), group.end(), rank) != group.end()) {
      return fmt::format("its group of {}", group.size());
    }
  }
  return "its group";
}

// Who makes a lost shard anew reads, for each of its k pieces, as much from k of the others. Its
// parities are made anew, too, where the groups stay: of k shards' pieces each.
void CountRebuilt(const JobStateView& job, const Forecast& forecast,
                  std::map<NodeId, std::uint64_t>* in, std::map<NodeId, std::uint64_t>* out,
                  std::uint64_t* copy) {
  if (job.commits.commits.empty()) return;
  const Commit& commit = job.commits.commits.front();
  const std::uint32_t workers = std::max(1U, job.record.spec.nproc_per_node);
  const auto gone = [&](const NodeId& node) {
    return std::find(forecast.lost.begin(), forecast.lost.end(), node) != forecast.lost.end();
  };
  for (const std::vector<Rank>& group : commit.parity.groups) {
    const std::uint64_t k = group.size() - commit.parity.parity;
    for (const HeldShard& shard : commit.shards) {
      const auto rebuilt = forecast.rebuilt.find(shard.rank);
      if (rebuilt == forecast.rebuilt.end() ||
          std::find(group.begin(), group.end(), shard.rank) == group.end()) {
        continue;
      }
      (*in)[rebuilt->second] += k * shard.bytes;
      for (const Rank other : group) {
        const auto place = static_cast<std::size_t>(other) / workers;
        if (other == shard.rank || place >= job.plan.nodes.size()) continue;
        const NodeId& node = job.plan.nodes[place].node;
        if (!gone(node)) (*out)[node] += k * shard.bytes / (group.size() - 1);
      }
    }
    if (forecast.state != JobState::kActivating || forecast.plan.parity != commit.parity) continue;
    for (const HeldShard& parity : commit.parities) {
      const Rank holder = checkpoint::HolderOf(parity.rank, commit.world_size);
      const auto place = static_cast<std::size_t>(holder) / workers;
      if (std::find(group.begin(), group.end(), holder) != group.end() &&
          place < job.plan.nodes.size() && gone(job.plan.nodes[place].node)) {
        *copy += k * parity.bytes;
      }
    }
  }
}

void FillSources(const ClusterState& state, const JobStateView& job, const Forecast& forecast,
                 v1::LossForecast* to) {
  std::map<NodeId, std::uint64_t> in, out;
  std::uint64_t copy = 0;
  std::uint32_t deepest = 0;  // who takes what others pass on is a chunk behind each of them
  // Of shares each rank reads all, and its own goes to its peers.
  const Commit* commit = NewestCommit(job);
  const std::size_t parts = commit != nullptr && IsOfShares(*commit)
                                ? forecast.plan.nodes.size() * job.record.spec.nproc_per_node
                                : 1;
  for (const NodePlan& member : forecast.plan.nodes) {
    if (forecast.state == JobState::kActivating) to->add_members(member.node);
    for (const WorkerPlan& worker : member.workers) {
      const RestorePlan& r = worker.restore;
      if (r.step == kNoStep) continue;
      v1::ShardSource* source = to->add_sources();
      source->set_rank(worker.rank);
      source->set_node(member.node);
      if (r.ranges) {
        source->set_tier("ranges");
        source->set_source_node(fmt::format("{} shards", forecast.plan.cut.shards.size()));
        source->set_source_rank(worker.rank);
        source->set_bytes(r.bytes);
        copy += forecast.state == JobState::kActivating ? member.peers.size() * r.bytes / parts : 0;
        for (const auto& [from, bytes] : CutMoves(forecast.plan.cut, member.node, worker)) {
          if (from.empty()) continue;  // files, which no node sends
          in[member.node] += bytes;
          out[from] += bytes;
        }
        continue;
      }
      const auto rebuilt = forecast.rebuilt.find(r.shard_rank);
      source->set_tier(rebuilt != forecast.rebuilt.end() && !r.file && r.relay == 0 ? "parity"
                       : r.file                                                     ? "file"
                       : r.relay > 0                                                ? "relay"
                       : r.source_node == member.node                               ? "local"
                                                                                    : "peer");
      source->set_source_node(r.file ? job.record.spec.ckpt_dir : r.source_node);
      source->set_source_rank(r.shard_rank);
      source->set_bytes(r.bytes);
      if (source->tier() == "parity") {
        source->set_choices(1);
        source->set_source_node(GroupText(job, r.shard_rank));
        source->set_why(fmt::format(
            "every copy is lost: {} makes it anew out of parities and what is left of its group",
            rebuilt->second));
      } else {
        Explain(state, job, forecast, member.node, r, source);
      }
      deepest = std::max(deepest, r.relay);
      if (!r.file && r.source_node != member.node && source->tier() != "parity") {
        in[member.node] += r.bytes;
        out[r.source_node] += r.bytes;
      }
      if (forecast.state != JobState::kActivating) continue;
      for (const PeerPlan& peer : member.peers) {
        copy += Holds(state, job, peer.node, r) ? 0 : r.bytes;
      }
    }
  }
  CountRebuilt(job, forecast, &in, &out, &copy);
  std::sort(to->mutable_sources()->begin(), to->mutable_sources()->end(),
            [](const auto& a, const auto& b) { return a.rank() < b.rank(); });
  std::uint64_t total = 0, busiest = 0;
  for (const auto& [node, bytes] : in) total += bytes, busiest = std::max(busiest, bytes);
  for (const auto& [node, bytes] : out) busiest = std::max(busiest, bytes);
  busiest += deepest * checkpoint::kPassedOnBytes;
  to->set_bytes_to_move(total);
  to->set_bytes_to_copy(copy);
  const Pace pace = PaceOf(job);
  to->set_estimated_seconds(pace.switch_seconds +
                            static_cast<double>(busiest) / pace.bytes_a_second);
  to->set_basis(pace.basis);
}

std::string RanksText(const google::protobuf::RepeatedField<std::int32_t>& ranks) {
  constexpr int kShown = 8;
  std::vector<std::int32_t> shown(ranks.begin(),
                                  ranks.begin() + std::min<int>(ranks.size(), kShown));
  return fmt::format("rank{} {}{}", ranks.size() == 1 ? "" : "s", fmt::join(shown, ", "),
                     ranks.size() > kShown ? ", ..." : "");
}

const char* LayoutOf(const Commit& commit) {
  return commit.replicated_layout ? "replicated" : IsOfShares(commit) ? "shares" : "sharded";
}

}  // namespace

v1::CheckpointPlacement PlacementOf(const ClusterState& state, const JobStateView& job,
                                    std::uint32_t max_lost) {
  v1::CheckpointPlacement to;
  to.set_job(job.record.spec.job);
  to.set_generation(job.record.generation);
  const CopySets copies = CopiesNow(state, job);
  const Commit* commit = NewestCommit(job);
  to.set_committed_step(copies.step);
  to.set_layout(commit == nullptr ? "unknown" : LayoutOf(*commit));
  to.set_copies(CopiesOf(job.record.spec, job.plan.nodes.size()));
  to.set_redundancy(
      checkpoint::PrintRedundancy(RedundancyOf(job.record.spec, job.plan.nodes.size())));
  to.set_parities(static_cast<std::uint32_t>(copies.parities));
  to.set_parities_wanted(static_cast<std::uint32_t>(copies.wanted));
  const bool by_parity = !job.plan.parity.groups.empty();
  const ParityHolders parity(job);
  const std::vector<NodeSet> planned = PlannedHosts(job);
  const std::size_t sets =
      by_parity ? job.plan.parity.groups.size() / std::max(1U, job.record.spec.nproc_per_node)
                : Distinct(planned);
  to.set_shape(by_parity ? "parity" : Shape(planned, sets));
  to.set_host_sets(static_cast<std::uint32_t>(sets));
  std::map<NodeId, std::vector<Rank>> keeps;
  for (const NodePlan& member : job.plan.nodes) {
    for (const PeerPlan& peer : member.peers) {
      for (const WorkerPlan& w : member.workers) keeps[peer.node].push_back(w.rank);
    }
  }
  std::vector<NodeId> members;
  for (const NodePlan& member : job.plan.nodes) {
    members.push_back(member.node);
    v1::NodeCopies* node = to.add_nodes();
    node->set_node(member.node);
    node->set_domain(DomainText(state.nodes.at(member.node)));
    for (const WorkerPlan& w : member.workers) node->add_ranks(w.rank);
    for (const PeerPlan& peer : member.peers) node->add_peers(peer.node);
    for (const Rank rank : keeps[member.node]) node->add_keeps(rank);
    if (const auto at = parity.holders.find(member.node); at != parity.holders.end()) {
      for (const NodeId& holder : at->second) node->add_peers(holder);
    }
    if (const auto at = parity.keeps.find(member.node); at != parity.keeps.end()) {
      for (const Rank rank : at->second) node->add_keeps(rank);
    }
    node->set_bytes(BytesHeld(job, member.node));
  }
  if (members.empty()) {
    to.set_why("the job runs on no node now");
    return to;
  }
  const Losses losses(copies);
  const auto count = static_cast<std::uint32_t>(members.size());
  const std::uint32_t most = std::min(max_lost == 0 ? kDefaultMaxLost : max_lost, count);
  for (std::uint32_t k = 1; k <= most; ++k) {
    v1::Survival* s = to.add_by_nodes();
    s->set_domains(count);
    s->set_lost(k);
    FillSurvival(losses.OfNodes(k), s);
  }
  const FailureDomains domains = DomainsOf(state, members);
  std::vector<std::string> spread, within;
  for (const FailureDomains::Level& level : domains.levels) {
    const std::vector<NodeSet> by_domain = NodesByDomain(level, count);
    if (by_domain.size() == count && level.name == "host") continue;  // each its own: as nodes
    for (std::uint32_t k = 1; k <= std::min<std::size_t>(2, by_domain.size()); ++k) {
      v1::Survival* s = to.add_by_domain();
      s->set_level(level.name);
      s->set_domains(static_cast<std::uint32_t>(by_domain.size()));
      s->set_lost(k);
      FillSurvival(losses.OfDomains(by_domain, k), s);
    }
    bool fatal = false;
    for (std::uint32_t d = 0; d < level.values.size(); ++d) {
      NodeSet nodes;
      for (std::uint32_t i = 0; i < count; ++i) {
        if (level.of[i] == d) nodes.push_back(i);
      }
      if (!losses.Fatal(nodes)) continue;
      fatal = true;
      to.add_fatal(
          fmt::format("{}={} ({} of {} nodes)", level.name, level.values[d], nodes.size(), count));
    }
    (fatal ? within : spread).push_back(level.name);
  }
  for (const auto& [name, nodes] : domains.evicted) {
    const bool fatal = losses.Fatal(nodes);
    (fatal ? within : spread).push_back(fmt::format("{}={}", kEvictLabel, name));
    if (fatal) {
      to.add_fatal(fmt::format("{}={} ({} of {} nodes)", kEvictLabel, name, nodes.size(), count));
    }
  }
  std::string why;
  if (count == 1) {
    why = "one node: its state lies in its own memory alone";
  } else {
    why = by_parity ? fmt::format(
                          "{} group{} of {} nodes share parities, {} for each piece of "
                          "their states",
                          sets, sets == 1 ? "" : "s", count, job.plan.parity.parity)
                    : fmt::format("{} host set{} for {} nodes, the fewest with equal load", sets,
                                  sets == 1 ? "" : "s", count);
    if (!spread.empty()) {
      why += fmt::format("; {} cross every {}", by_parity ? "groups" : "copies",
                         fmt::join(spread, ", "));
    }
    if (!within.empty()) {
      why += fmt::format("; not every {}: too few nodes outside, or copies that have not moved yet",
                         fmt::join(within, ", "));
    }
  }
  if (copies.replicated) why += "; every rank's state is the same: any node that holds one will do";
  if (commit != nullptr && IsOfShares(*commit)) {
    why += "; each rank keeps its share of one state: every restore reads the shares of all ranks";
  }
  if (commit == nullptr) why += "; nothing is committed yet: this is the plan";
  to.set_why(why);
  FillPolicies(domains, job, copies.replicated, most, &to);
  return to;
}

bool NodesMeant(const ClusterState& state, const JobStateView& job,
                const v1::ForetellLossRequest& request, std::vector<NodeId>* lost,
                std::string* error, bool* found) {
  *found = true;
  const bool named = request.nodes_size() > 0 || request.domains_size() > 0;
  if (named == (request.count() > 0)) {
    *error = "which nodes are lost: names, domains, or a number\nhint: give one of them";
    return false;
  }
  if (request.count() > 0) {
    if (request.count() > job.plan.nodes.size()) {
      *error = fmt::format("the job runs on {} nodes, {} of them cannot be lost\nhint: at most {}",
                           job.plan.nodes.size(), request.count(), job.plan.nodes.size());
      return false;
    }
    *lost = Worst(state, job, request.count());
    return true;
  }
  std::set<NodeId> all;
  for (const std::string& id : request.nodes()) {
    if (state.nodes.count(id) == 0) {
      *error = fmt::format("no node is named \"{}\"\nhint: everstep node list shows the nodes", id);
      *found = false;
      return false;
    }
    all.insert(id);
  }
  for (const std::string& domain : request.domains()) {
    const std::vector<NodeId> nodes = NodesIn(state, domain);
    if (nodes.empty()) {
      *error =
          fmt::format("no node is in \"{}\"\nhint: there are: {}", domain, DomainsThereAre(state));
      *found = false;
      return false;
    }
    all.insert(nodes.begin(), nodes.end());
  }
  lost->assign(all.begin(), all.end());
  return true;
}

v1::LossForecast LossForecastOf(const ClusterState& state, const JobStateView& job,
                                const std::vector<NodeId>& lost, const Forecast& forecast,
                                std::uint32_t count) {
  v1::LossForecast to;
  to.set_job(job.record.spec.job);
  for (const NodeId& id : lost) to.add_lost(id);
  const Commit* newest = NewestCommit(job);
  to.set_committed_step(newest == nullptr ? kNoStep : newest->step);
  to.set_newest_step(job.step);
  to.set_state(JobStateName(forecast.state));
  to.set_step(kNoStep);
  const CopySets copies = CopiesNow(state, job);
  const bool touched = std::any_of(
      job.plan.nodes.begin(), job.plan.nodes.end(),
      [&](const auto& m) { return std::find(lost.begin(), lost.end(), m.node) != lost.end(); });
  NodeSet gone;
  for (std::uint32_t i = 0; i < copies.nodes.size(); ++i) {
    if (std::find(lost.begin(), lost.end(), copies.nodes[i]) != lost.end()) gone.push_back(i);
  }
  for (const Rank rank : RanksLostWith(copies, gone)) {
    if (copies.step != kNoStep && !copies.replicated) to.add_ranks_lost(rank);
  }
  for (const NodeId& id : lost) {
    to.set_detect_seconds(std::max(to.detect_seconds(), ToSeconds(state.nodes.at(id).lease)));
  }
  if (count > 0) {
    const Losses losses(copies);
    v1::Survival* s = to.mutable_survival();
    s->set_domains(losses.members);
    s->set_lost(count);
    FillSurvival(losses.OfNodes(count), s);
  }
  if (!touched && Switches(forecast.state)) {
    to.set_recoverable(true);
    to.set_step(job.step);
    to.set_why("the job runs on none of these nodes: it goes on");
    return to;
  }
  const bool goes_on = forecast.state == JobState::kActivating;
  if (!goes_on && forecast.state != JobState::kWaiting) {
    to.set_why(fmt::format("the job ends: {}", forecast.message));
    return to;
  }
  to.set_recoverable(forecast.plan.restore_step != kNoStep);
  to.set_step(forecast.plan.restore_step);
  if (job.commits.persisted.ns != 0 && job.commits.persisted_step > to.step()) {
    FromFiles(job, forecast, &to);
    if (!goes_on)
      to.set_why(to.why() + fmt::format("; the job waits for nodes ({})", forecast.message));
    return to;
  }
  FillSources(state, job, forecast, &to);
  if (!to.recoverable()) to.set_estimated_seconds(0);
  const std::string too_many =
      copies.parity.groups.empty() ? "" : ", more than its group's parities bring back";
  std::string why;
  if (to.recoverable()) {
    std::size_t local = 0;
    for (const v1::ShardSource& s : to.sources()) local += s.tier() == "local";
    std::size_t files = 0, anew = 0;
    for (const v1::ShardSource& s : to.sources()) {
      files += s.tier() == "file";
      anew += s.tier() == "parity";
    }
    why = fmt::format(
        "every rank's state of step {} is left: {} in the memory of the rank's own "
        "node, {} on a peer{}{}",
        to.step(), local, static_cast<std::size_t>(to.sources_size()) - local - files - anew,
        files == 0 ? "" : fmt::format(", {} in files", files),
        anew == 0 ? "" : fmt::format(", {} in parities", anew));
    if (const RestoreCut& cut = forecast.plan.cut; !cut.shards.empty()) {
      why = fmt::format(
          "every shard of step {} is left{}: {} ranks take their bytes from those of {}", to.step(),
          forecast.rebuilt.empty()
              ? ""
              : fmt::format(", {} of them in parities", forecast.rebuilt.size()),
          to.sources_size(), cut.world_size);
    }
    if (to.step() < to.committed_step()) {
      why +=
          fmt::format("; of step {}, which was committed, every copy of {} goes with these nodes{}",
                      to.committed_step(), RanksText(to.ranks_lost()), too_many);
    }
  } else if (to.ranks_lost_size() > 0) {
    why = fmt::format("every copy of {} goes with these nodes{}, and no older step is complete",
                      RanksText(to.ranks_lost()), too_many);
  } else if (copies.step == kNoStep) {
    why = "nothing was committed yet";
  } else if (const auto world = forecast.plan.nodes.size() * job.record.spec.nproc_per_node;
             !copies.replicated && world != copies.hosts.size()) {
    why = fmt::format(
        "what is left is the state of {} ranks, each its own; the job would go on with {}",
        copies.hosts.size(), world);
  } else {
    why = "no node that is left holds a complete step";
  }
  if (!goes_on) why += fmt::format("; the job waits for nodes ({})", forecast.message);
  to.set_why(why);
  return to;
}

}  // namespace everstep::controller
