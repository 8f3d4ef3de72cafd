#include "controller/server/checkpoint_list.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "checkpoint/core/parity_ranks.h"
#include "controller/core/copies.h"
#include "proto/wire/convert.h"

namespace everstep::controller {
namespace {

struct Found {
  std::map<Rank, std::pair<std::set<NodeId>, std::uint64_t>> ranks;  // holders, bytes
  bool files = false;
  bool replicated = false;
  std::int32_t world_size = 0;
};

bool Lives(const ClusterState& state, const NodeId& id) {
  const auto node = state.nodes.find(id);
  return node != state.nodes.end() && node->second.record.health != NodeHealth::kLost;
}

// Copies of the rank that has fewest; of a replicated layout any rank's counts for all.
std::size_t Least(const Found& found) {
  std::set<NodeId> any;
  std::size_t least = SIZE_MAX;
  for (const auto& [rank, held] : found.ranks) {
    any.insert(held.first.begin(), held.first.end());
    least = std::min(least, held.first.size());
  }
  if (found.replicated) return any.size();
  return static_cast<std::int32_t>(found.ranks.size()) < found.world_size ? 0 : least;
}

}  // namespace

v1::JobCheckpoints CheckpointsOf(const ClusterState& state, const JobStateView& job) {
  const JobRecord& record = job.record;
  const CommitRecord& commits = job.commits;
  v1::JobCheckpoints to;
  to.set_job(record.spec.job);
  to.set_generation(record.generation);
  to.set_copies(CopiesOf(record.spec, job.plan.nodes.size()));
  to.set_redundancy(checkpoint::PrintRedundancy(RedundancyOf(record.spec, job.plan.nodes.size())));
  const CopySets copies = CopiesNow(state, job);
  to.set_parities(static_cast<std::uint32_t>(copies.step == kNoStep ? 0 : copies.parities));
  to.set_parities_wanted(static_cast<std::uint32_t>(copies.wanted));
  to.set_newest_step(job.step);
  to.set_committed_step(commits.commits.empty() ? kNoStep : commits.commits.front().step);
  to.set_verified_step(commits.verified_at.ns == 0 ? kNoStep : commits.verified.step);
  to.set_verify_after_steps(record.spec.verify_after);
  to.set_shards_damaged(record.shards_damaged);
  to.set_shards_repaired(record.shards_repaired);
  to.set_anomalies(commits.anomalies);
  to.set_anomaly_step(commits.anomalies == 0 ? kNoStep : commits.anomaly_step);
  to.set_anomaly_why(commits.anomaly_why);
  to.set_ckpt_dir(record.spec.ckpt_dir);
  for (const Cut& cut : record.given_up) wire::ToProto(cut, to.add_given_up());
  for (const NodePlan& member : job.plan.nodes) {
    const auto node = state.nodes.find(member.node);
    if (node != state.nodes.end() && !node->second.memory_suspect.empty()) {
      to.add_suspect_nodes(member.node);
    }
  }

  std::map<std::pair<everstep::Step, Generation>, Found> all;
  for (const auto& [id, holds] : job.holdings) {
    if (!Lives(state, id)) continue;
    for (const HeldShard& s : holds.shards) {
      Found& found = all[{s.step, s.generation}];
      found.world_size = s.world_size;
      if (s.file) {
        found.files = true;
        continue;
      }
      if (checkpoint::IsParity(s.rank, s.world_size)) continue;
      found.replicated = s.replicated_layout;
      found.ranks[s.rank].first.insert(id);
      found.ranks[s.rank].second = s.bytes;
    }
  }
  for (const Cut& file : commits.files) all[{file.step, file.generation}].files = true;
  if (commits.persisted.ns != 0) {
    all[{commits.persisted_step, commits.persisted_generation}].files = true;
  }
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    const auto& [step, generation] = it->first;
    const Found& found = it->second;
    const bool committed =
        found.files || std::any_of(commits.commits.begin(), commits.commits.end(),
                                   [step = step, generation = generation](const Commit& c) {
                                     return c.step == step && c.generation == generation;
                                   });
    const bool verified = commits.verified_at.ns != 0 && step <= commits.verified.step && committed;
    v1::JobCheckpoint* item = to.add_items();
    item->set_step(step);
    item->set_generation(generation);
    item->set_trust(verified ? "verified" : committed ? "committed" : "captured");
    item->set_tier(found.ranks.empty() ? "files" : found.files ? "memory+files" : "memory");
    if (found.ranks.empty()) continue;
    item->set_least_copies(static_cast<std::uint32_t>(Least(found)));
    std::uint64_t bytes = 0;
    for (const auto& [rank, held] : found.ranks) bytes += held.second;
    item->set_bytes(bytes);
  }

  if (commits.commits.empty()) return to;
  const Commit& newest = commits.commits.front();
  const auto held = all.find({newest.step, newest.generation});
  for (const HeldShard& shard : newest.shards) {
    v1::RankCopies* rank = to.add_ranks();
    rank->set_rank(shard.rank);
    if (held != all.end()) {
      const auto holders = held->second.ranks.find(shard.rank);
      if (holders != held->second.ranks.end()) {
        for (const NodeId& id : holders->second.first) rank->add_nodes(id);
      }
    }
    for (const DamageKey& d : job.damaged) {
      if (d.rank == shard.rank && d.step == newest.step && d.generation == newest.generation) {
        rank->add_damaged(d.node);
      }
    }
  }
  return to;
}

}  // namespace everstep::controller
