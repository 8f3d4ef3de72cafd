// From whom each rank of a generation takes what it starts from. Its own node's memory costs
// nothing, a peer's a transfer, a file a disk. Shards that few hold choose first; who sends least
// by then is taken; nodes that all want one shard pass it on to each other
// (checkpoint/core/swarm.h).
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "checkpoint/core/swarm.h"
#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kMostOthers = 3;

// How good a holder is for a rank; all of a score are equal.
int Score(const HeldShard& shard, bool here, Rank rank) {
  return (shard.file ? 0 : here ? 6 : 4) + (shard.rank == rank ? 1 : 0);
}
constexpr int kPeers = 4;  // that score and the next one
constexpr int kHere = 6;

bool SameBytes(const HeldShard& a, const HeldShard& b) {
  return a.rank == b.rank && a.crc_root == b.crc_root;
}

}  // namespace

std::string Controller::Impl::DataAddress(const NodeId& node) const {
  const NodeFacts& facts = state_.nodes.at(node).record.facts;
  return fmt::format("{}:{}", facts.address, facts.data_port);
}

bool Controller::Impl::ServeFrom(JobStateView* job, const std::vector<Holder>& holders,
                                 bool replicated) {
  struct Taker {
    const NodeId* node;
    WorkerPlan* worker;
  };
  struct Group {                      // of ranks that any of the same peers can serve
    std::vector<const Holder*> from;  // one a node
    std::vector<Taker> takers;
  };
  std::map<Rank, Group> groups;  // by the shard's rank
  constexpr Rank kAnyShard = -1;
  const auto fill = [](WorkerPlan* worker, const HeldShard& shard) {
    worker->restore = {.step = shard.step,
                       .shard_rank = shard.rank,
                       .shard_generation = shard.generation,
                       .crc_root = shard.crc_root,
                       .bytes = shard.bytes,
                       .source_node = {},
                       .source_address = {},
                       .file = shard.file};
  };
  for (NodePlan& member : job->plan.nodes) {
    for (WorkerPlan& worker : member.workers) {
      const auto score = [&](const Holder& h) {
        if (!replicated && h.shard.rank != worker.rank) return -1;
        if (h.shard.file && h.node != member.node) return -1;  // a node reads its own directory
        return Score(h.shard, h.node == member.node, worker.rank);
      };
      const auto best =
          std::max_element(holders.begin(), holders.end(),
                           [&score](const auto& a, const auto& b) { return score(a) < score(b); });
      const int best_score = best == holders.end() ? -1 : score(*best);
      if (best_score < 0) return false;
      if (best_score < kPeers || best_score >= kHere) {
        fill(&worker, best->shard);
        worker.restore.source_node = best->node;
        if (!best->shard.file) worker.restore.source_address = DataAddress(best->node);
        continue;
      }
      Group& group = groups[best_score == kPeers ? kAnyShard : worker.rank];
      group.takers.push_back({&member.node, &worker});
      if (!group.from.empty()) continue;
      for (const Holder& h : holders) {
        const bool serves =
            score(h) == best_score && (best_score == kPeers || SameBytes(h.shard, best->shard));
        const bool known = std::any_of(group.from.begin(), group.from.end(),
                                       [&h](const Holder* other) { return other->node == h.node; });
        if (serves && !known) group.from.push_back(&h);
      }
    }
  }
  std::vector<Group*> rarest_first;
  rarest_first.reserve(groups.size());
  for (auto& [rank, group] : groups) rarest_first.push_back(&group);
  std::stable_sort(rarest_first.begin(), rarest_first.end(),
                   [](const Group* a, const Group* b) { return a->from.size() < b->from.size(); });
  std::map<NodeId, std::uint64_t> sent;
  for (Group* group : rarest_first) {
    std::vector<Taker> first;  // of each node; its other ranks take theirs from that one
    for (const Taker& taker : group->takers) {
      if (first.empty() || first.back().node != taker.node) first.push_back(taker);
    }
    std::vector<std::uint64_t> by_holder;
    by_holder.reserve(group->from.size());
    for (const Holder* holder : group->from) by_holder.push_back(sent[holder->node]);
    const auto sources =
        checkpoint::PlanSwarm(first.size(), group->from.front()->shard.bytes, &by_holder);
    for (std::size_t i = 0; i < by_holder.size(); ++i) sent[group->from[i]->node] = by_holder[i];
    std::size_t place = 0;
    for (const Taker& taker : group->takers) {
      while (first[place].node != taker.node) ++place;
      const checkpoint::SwarmSource& source = sources[place];
      const Holder& holder = *group->from[source.holder];
      const bool neighbour = first[place].worker != taker.worker;
      fill(taker.worker, holder.shard);
      RestorePlan& restore = taker.worker->restore;
      restore.relay = source.depth + (neighbour ? 1 : 0);
      restore.source_node = neighbour ? *taker.node
                            : source.taker != checkpoint::SwarmSource::kHolder
                                ? *first[source.taker].node
                                : holder.node;
      restore.source_address = DataAddress(restore.source_node);
      std::vector<CutHolder> others;
      for (const Holder& h : holders) {
        const bool known = h.node == restore.source_node ||
                           std::any_of(others.begin(), others.end(), [&h](const CutHolder& other) {
                             return other.node == h.node;
                           });
        if (h.shard.file || known || !SameBytes(h.shard, holder.shard)) continue;
        others.push_back({h.node, DataAddress(h.node)});
      }
      // Whom a source leaves in the lurch together do not all turn to the same holder.
      if (!others.empty()) {
        std::rotate(others.begin(),
                    others.begin() + static_cast<std::ptrdiff_t>(restore.relay % others.size()),
                    others.end());
      }
      others.resize(std::min(others.size(), kMostOthers));
      restore.others = std::move(others);
    }
  }
  return true;
}

}  // namespace everstep::controller
