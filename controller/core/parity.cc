// Steps kept by parities instead of copies. A sharded step whose every rank has captured it is
// sealed by parities: each holder is told of which bytes (BuildShard), and says when it has them;
// the step is committed when all do. A step that lost shards with its nodes is made whole before
// the next generation starts, by the same order: a member makes each lost shard out of what is
// left, keeps it as a copy, and the restore goes on as if it had always been there. Where nodes are
// too few, or all ranks' state is the same, copies serve, and nothing here has a part.
//
//   every rank captured --> BuildShard(parity) to its holder --> ShardCopied --> committed
//   shards lost --> BuildShard(shard) to a member --> ShardCopied --> PlanRestore anew
//
// Which parities there are: checkpoint/core/parity_ranks.h.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <utility>

#include "checkpoint/core/parity_ranks.h"
#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

CutShard SourceOf(const ClusterState& state, const HeldShard& shard, const NodeId& node) {
  const NodeFacts& facts = state.nodes.at(node).record.facts;
  return {.rank = shard.rank,
          .crc_root = shard.crc_root,
          .bytes = shard.bytes,
          .holders = {{node, fmt::format("{}:{}", facts.address, facts.data_port)}}};
}

// Where the plan has a rank.
const NodeId& NodeOf(const JobStateView& job, Rank rank) {
  return job.plan.nodes[static_cast<std::size_t>(rank) / job.record.spec.nproc_per_node].node;
}

}  // namespace

bool Controller::Impl::AddParities(JobStateView* job, Commit* commit,
                                   const std::map<Rank, std::map<NodeId, HeldShard>>& held,
                                   bool* ordered) {
  const ParityPlan& plan = job->plan.parity;
  const std::int32_t world = commit->world_size;
  if (plan.groups.empty() || commit->replicated_layout) return true;
  // Each shard where the generation has its rank: elsewhere it may lie beside a parity that covers
  // it.
  for (Rank rank = 0; rank < world; ++rank) {
    const auto copies = held.find(rank);
    if (copies == held.end() || !copies->second.contains(NodeOf(*job, rank))) return false;
  }
  // Of the same groups, made earlier: those that are in their places stay as they are. To make them
  // anew would overwrite what the commit counts on before all of its successors are there.
  const std::vector<HeldShard> earlier = std::exchange(commit->parities, {});
  const auto stays = [&](const HeldShard& parity) {
    return parity.built == job->record.generation ||
           std::any_of(earlier.begin(), earlier.end(), [&parity](const HeldShard& e) {
             return e.rank == parity.rank && e.crc_root == parity.crc_root;
           });
  };
  std::vector<ShardBuild> lacking;
  for (const std::vector<Rank>& group : plan.groups) {
    for (const checkpoint::Codeword& word : checkpoint::CodewordsOf(group, plan.parity, world)) {
      for (const Rank parity : word.parities) {
        const auto found = held.find(parity);
        const NodeId& holder = NodeOf(*job, checkpoint::HolderOf(parity, world));
        // One of an earlier plan may be of other ranks, or lie beside a shard that it covers.
        if (found != held.end() && found->second.contains(holder) &&
            stays(found->second.at(holder))) {
          commit->parities.push_back(found->second.at(holder));
          continue;
        }
        ShardBuild build{.shard = {.rank = parity,
                                   .world_size = world,
                                   .generation = commit->generation,
                                   .step = commit->step,
                                   .replica = true,
                                   .built = job->record.generation},
                         .parity = plan.parity,
                         .group = group,
                         .sources = {}};
        for (const Rank rank : word.members) {
          const auto& copies = held.at(rank);
          const auto own = copies.find(NodeOf(*job, rank));
          const auto& source = own != copies.end() ? *own : *copies.begin();
          build.sources.push_back(SourceOf(state_, source.second, source.first));
        }
        lacking.push_back(std::move(build));
      }
    }
  }
  if (lacking.empty()) {
    commit->parity = plan;
    std::sort(commit->parities.begin(), commit->parities.end(),
              [](const HeldShard& a, const HeldShard& b) { return a.rank < b.rank; });
    return true;
  }
  if (std::exchange(*ordered, true)) return false;
  for (ShardBuild& build : lacking) {
    const NodeId& holder = NodeOf(*job, checkpoint::HolderOf(build.shard.rank, world));
    Send(holder, BuildShardCommand{job->record.spec.job, job->record.generation, std::move(build)});
  }
  return false;
}

// A step that was committed before this generation and that it goes on from: some of its parities
// may be gone with their nodes. New ones close the gap until the next commit, where the groups are
// what they were; else the old parities serve until then.
void Controller::Impl::SealAnew(JobStateView* job) {
  if (job->plan.parity.groups.empty() || job->commits.commits.empty()) return;
  Commit& commit = job->commits.commits.front();
  const std::size_t world = job->plan.nodes.size() * job->record.spec.nproc_per_node;
  if (commit.replicated_layout || commit.generation == job->record.generation ||
      commit.step != job->plan.restore_step ||
      static_cast<std::size_t>(commit.world_size) != world || commit.parity != job->plan.parity) {
    return;
  }
  std::map<Rank, std::map<NodeId, HeldShard>> held;
  for (const NodePlan& member : job->plan.nodes) {
    for (const HeldShard& s : job->holdings[member.node].shards) {
      if (s.step != commit.step || s.generation != commit.generation || s.file) continue;
      held[s.rank][member.node] = s;
    }
  }
  for (const HeldShard& shard : commit.shards) {  // each where this generation has its rank
    const auto& copies = held[shard.rank];
    const auto own = copies.find(NodeOf(*job, shard.rank));
    if (own == copies.end() || own->second.crc_root != shard.crc_root) return;
  }
  Commit sealed = commit;
  const JobId& id = job->record.spec.job;
  if (!AddParities(job, &sealed, held, &runtime_[id].base_ordered)) return;
  if (sealed.parities == commit.parities) return;
  commit = std::move(sealed);
  dirty_commits_.insert(id);
}

std::map<Rank, CutShard> Controller::Impl::AtHand(const JobStateView& job,
                                                  const Commit& commit) const {
  std::map<Rank, CutShard> out;
  const auto look = [&](const std::vector<HeldShard>& wanted, const NodeId& node,
                        const HeldShard& held) {
    const auto same = std::find_if(wanted.begin(), wanted.end(), [&held](const HeldShard& w) {
      return w.rank == held.rank && w.generation == held.generation && w.step == held.step &&
             w.crc_root == held.crc_root;
    });
    if (same != wanted.end()) out.try_emplace(held.rank, SourceOf(state_, held, node));
  };
  for (const auto& [node, holds] : job.holdings) {
    const auto known = state_.nodes.find(node);
    if (known == state_.nodes.end() || known->second.record.health == NodeHealth::kLost) continue;
    for (const HeldShard& held : holds.shards) {
      if (held.file) continue;
      look(commit.shards, node, held);
      look(commit.parities, node, held);
    }
  }
  return out;
}

std::optional<ShardBuild> Controller::Impl::BuildOf(const Commit& commit, const HeldShard& shard,
                                                    const std::map<Rank, CutShard>& at_hand) const {
  const bool parity = checkpoint::IsParity(shard.rank, commit.world_size);
  const Rank member = parity ? checkpoint::HolderOf(shard.rank, commit.world_size) : shard.rank;
  const auto group = std::find_if(
      commit.parity.groups.begin(), commit.parity.groups.end(),
      [member](const auto& g) { return std::find(g.begin(), g.end(), member) != g.end(); });
  if (group == commit.parity.groups.end()) return std::nullopt;
  const auto words = checkpoint::CodewordsOf(*group, commit.parity.parity, commit.world_size);
  std::set<Rank> have;
  for (const auto& [rank, source] : at_hand) have.insert(rank);
  ShardBuild build{.shard = shard, .parity = commit.parity.parity, .group = *group, .sources = {}};
  build.shard.replica = true;
  std::set<Rank> from;
  for (const checkpoint::Codeword& word : words) {
    const auto names = [&shard](const std::vector<Rank>& ranks) {
      return std::find(ranks.begin(), ranks.end(), shard.rank) != ranks.end();
    };
    if (parity && names(word.parities)) {
      from.insert(word.members.begin(), word.members.end());
      if (!std::includes(have.begin(), have.end(), from.begin(), from.end())) return std::nullopt;
    }
    if (!parity && names(word.members)) {
      from.insert(word.members.begin(), word.members.end());
      from.insert(word.parities.begin(), word.parities.end());
    }
  }
  if (!parity && !checkpoint::Recoverable(words, have)) return std::nullopt;
  for (const Rank rank : from) {
    const auto source = at_hand.find(rank);
    if (source != at_hand.end() && rank != shard.rank) build.sources.push_back(source->second);
  }
  return build;
}

std::vector<ShardBuild> Controller::Impl::LostShards(const JobStateView& job) const {
  if (job.commits.commits.empty()) return {};
  const Commit& commit = job.commits.commits.front();
  if (commit.parity.groups.empty() || job.plan.restore_step >= commit.step ||
      commit.generation <= job.record.earlier_runs ||
      GivenUp(job.record.given_up, commit.generation, commit.step)) {
    return {};
  }
  const std::map<Rank, CutShard> at_hand = AtHand(job, commit);
  std::vector<ShardBuild> lost;
  for (const HeldShard& shard : commit.shards) {
    if (at_hand.contains(shard.rank)) continue;
    auto build = BuildOf(commit, shard, at_hand);
    if (!build) return {};
    lost.push_back(std::move(*build));
  }
  return lost;
}

bool Controller::Impl::RebuildLost(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  if (run.rebuild_over) return false;
  std::vector<ShardBuild> lost = LostShards(*job);
  if (lost.empty()) return false;
  const Commit& commit = job->commits.commits.front();
  const bool begun = !run.rebuilding.empty();  // a member came back meanwhile: said again
  run.rebuilding.clear();
  const std::size_t world = job->plan.nodes.size() * job->record.spec.nproc_per_node;
  std::vector<Rank> ranks;
  std::uint64_t bytes = 0;
  for (ShardBuild& build : lost) {
    // Who will run the rank has it at hand then; in another world, each makes some.
    const Rank rank = build.shard.rank;
    const std::size_t place = world == static_cast<std::size_t>(commit.world_size)
                                  ? static_cast<std::size_t>(rank) / job->record.spec.nproc_per_node
                                  : ranks.size() % job->plan.nodes.size();
    const NodeId& node = job->plan.nodes[place].node;
    run.rebuilding[rank] = node;
    ranks.push_back(rank);
    bytes += build.shard.bytes;
    Send(node, BuildShardCommand{id, job->record.generation, std::move(build)});
  }
  if (begun) return true;
  job->deadline = now_ + options_.activate_timeout;
  Journal({.type = "rebuild",
           .severity = Severity::kWarning,
           .reason = Reason::kRebuiltFromParity,
           .job = id,
           .generation = job->record.generation,
           .message = fmt::format("job {}: step {} lost the shards of {} rank{}: made anew out of "
                                  "parities",
                                  id, commit.step, ranks.size(), ranks.size() == 1 ? "" : "s"),
           .evidence = fmt::format("step={} ranks={} bytes={}", commit.step, fmt::join(ranks, ","),
                                   bytes)});
  return true;
}

// A damaged parity is made anew where it lies. A state is made anew beside the damaged one, as a
// copy, and then serves to put that right.
std::optional<Controller::Impl::Remedy> Controller::Impl::RemedyOf(const JobStateView& job,
                                                                   const NodeId& node,
                                                                   const HeldShard& damaged) const {
  if (job.commits.commits.empty()) return std::nullopt;
  const Commit& commit = job.commits.commits.front();
  if (commit.parity.groups.empty() || damaged.step != commit.step ||
      damaged.generation != commit.generation) {
    return std::nullopt;
  }
  const bool parity = checkpoint::IsParity(damaged.rank, commit.world_size);
  const std::vector<HeldShard>& all = parity ? commit.parities : commit.shards;
  const auto wanted = std::find_if(all.begin(), all.end(), [&damaged](const HeldShard& s) {
    return s.rank == damaged.rank && s.crc_root == damaged.crc_root;
  });
  if (wanted == all.end()) return std::nullopt;
  const std::map<Rank, CutShard> at_hand = AtHand(job, commit);
  if (const auto beside = at_hand.find(damaged.rank); beside != at_hand.end()) {
    if (beside->second.holders.front().node != node) return std::nullopt;  // away just now
    return RepairShardCommand{job.record.spec.job, damaged, node, DataAddress(node)};
  }
  auto build = BuildOf(commit, *wanted, at_hand);
  if (!build) return std::nullopt;
  return BuildShardCommand{job.record.spec.job, job.record.generation, std::move(*build)};
}

void Controller::Impl::SendRemedy(const NodeId& node, Remedy remedy) {
  std::visit([&](auto& order) { Send(node, std::move(order)); }, remedy);
}

bool Controller::Impl::Rebuilds(const JobStateView& job, const ShardCopied& e) const {
  if (job.record.state != JobState::kPreparing || !IsCommitted(job, e.shard)) return false;
  const auto& rebuilding = runtime_.at(job.record.spec.job).rebuilding;
  const auto it = rebuilding.find(e.shard.rank);
  return it != rebuilding.end() && it->second == e.node;
}

void Controller::Impl::Rebuilt(JobStateView* job, const ShardCopied& e) {
  auto& rebuilding = runtime_[job->record.spec.job].rebuilding;
  rebuilding.erase(e.shard.rank);
  if (rebuilding.empty() && job->waiting_for.empty()) Activate(job);
}

void Controller::Impl::GiveUpRebuild(JobStateView* job) {
  Runtime& run = runtime_[job->record.spec.job];
  if (run.rebuilding.empty()) return;
  std::vector<Rank> ranks;
  for (const auto& [rank, node] : run.rebuilding) ranks.push_back(rank);
  run.rebuilding.clear();
  run.rebuild_over = true;
  Journal(
      {.type = "rebuild",
       .severity = Severity::kError,
       .reason = Reason::kRebuildTimeout,
       .job = job->record.spec.job,
       .generation = job->record.generation,
       .message = fmt::format("job {}: lost shards were not made anew in time: an older step is "
                              "taken",
                              job->record.spec.job),
       .evidence = fmt::format("ranks={} limit_s={:.0f}", fmt::join(ranks, ","),
                               ToSeconds(options_.activate_timeout))});
  if (job->waiting_for.empty()) Activate(job);
}

bool Controller::Impl::PretendRebuilt(JobStateView* job, std::map<Rank, NodeId>* rebuilt) {
  const std::map<Rank, NodeId> ordered =
      std::exchange(runtime_[job->record.spec.job].rebuilding, {});
  if (job->record.state != JobState::kPreparing || ordered.empty()) return false;
  Pretend(job, ordered);
  *rebuilt = ordered;
  Activate(job);
  return true;
}

bool Controller::Impl::PretendAtHand(JobStateView* job, std::map<Rank, NodeId>* rebuilt) {
  // Any node that is left will do: who takes the ranks is not known yet.
  const auto left =
      std::find_if(job->plan.nodes.begin(), job->plan.nodes.end(), [this](const NodePlan& member) {
        const auto node = state_.nodes.find(member.node);
        return node != state_.nodes.end() && node->second.record.health != NodeHealth::kLost;
      });
  if (left == job->plan.nodes.end()) return false;
  for (const ShardBuild& lost : LostShards(*job)) (*rebuilt)[lost.shard.rank] = left->node;
  Pretend(job, *rebuilt);
  return !rebuilt->empty();
}

void Controller::Impl::Pretend(JobStateView* job, const std::map<Rank, NodeId>& rebuilt) {
  for (const auto& [rank, node] : rebuilt) {
    for (const HeldShard& shard : job->commits.commits.front().shards) {
      if (shard.rank != rank) continue;
      HeldShard copy = shard;
      copy.replica = true;
      job->holdings[node].shards.push_back(copy);
    }
  }
}

}  // namespace everstep::controller
