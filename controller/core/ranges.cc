// Where a world of another size, or any world from shares of one state, starts from: every shard of
// one step that is committed (or stands in the checkpoint directory) and all nodes that hold it.
// Which bytes of them a rank wants, its own process says once its model exists; the agent brings
// them (checkpoint/core/range_plan.h).
//
// Uncommitted steps do not serve: the first copies of the new generation may overwrite one, while
// what is committed stays until a newer commit.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "controller/core/copies.h"
#include "controller/core/impl.h"

namespace everstep::controller {

bool Controller::Impl::ServeRanges(JobStateView* job, RestoreCut cut,
                                   const std::vector<Holder>& holders) {
  std::map<Rank, std::uint32_t> roots;  // what each shard's checksum must be
  std::map<Rank, std::size_t> readers;  // members that see its file
  for (const Holder& h : holders) {
    if (!h.shard.file) continue;
    roots.emplace(h.shard.rank, h.shard.crc_root);
    if (IsMember(*job, h.node) && roots.at(h.shard.rank) == h.shard.crc_root) {
      ++readers[h.shard.rank];
    }
  }
  for (const Commit& commit : job->commits.commits) {
    if (!roots.empty()) break;
    if (commit.step != cut.step || commit.generation != cut.generation) continue;
    for (const HeldShard& shard : commit.shards) roots.emplace(shard.rank, shard.crc_root);
  }
  if (roots.empty()) return false;
  std::string missing;
  std::uint64_t bytes = 0;
  bool shares = false;  // of one state, of which every rank wants all
  for (Rank rank = 0; rank < cut.world_size; ++rank) {
    CutShard shard{.rank = rank, .crc_root = roots[rank], .bytes = 0, .holders = {}};
    for (const Holder& h : holders) {
      if (h.shard.rank != rank || h.shard.crc_root != shard.crc_root) continue;
      shard.bytes = h.shard.bytes;
      shares = shares || h.shard.share;
      if (h.shard.file) continue;
      CutHolder holder{h.node, DataAddress(h.node)};
      if (std::find(shard.holders.begin(), shard.holders.end(), holder) == shard.holders.end()) {
        shard.holders.push_back(std::move(holder));
      }
    }
    shard.file = readers[rank] == job->plan.nodes.size();
    if (shard.holders.empty() && !shard.file)
      missing += fmt::format("{}{}", missing.empty() ? "" : ",", rank);
    bytes += shard.bytes;
    cut.shards.push_back(std::move(shard));
  }
  if (!missing.empty()) {
    std::string& unserved = runtime_[job->record.spec.job].unserved;
    if (unserved.empty()) {  // the newest such step
      unserved = fmt::format(" unserved_step={} of_world={} ranks_without_holder={}", cut.step,
                             cut.world_size, missing);
    }
    return false;
  }
  const std::size_t parts = shares ? 1 : job->plan.nodes.size() * job->record.spec.nproc_per_node;
  for (NodePlan& member : job->plan.nodes) {
    for (WorkerPlan& worker : member.workers) {
      worker.restore = {.step = cut.step,
                        .shard_rank = worker.rank,
                        .shard_generation = cut.generation,
                        .bytes = bytes / parts,
                        .source_node = {},
                        .source_address = {},
                        .ranges = true};
    }
  }
  job->plan.cut = std::move(cut);
  return true;
}

std::map<NodeId, std::uint64_t> CutMoves(const RestoreCut& cut, const NodeId& node,
                                         const WorkerPlan& worker) {
  const std::uint64_t part = worker.restore.bytes / std::max<std::size_t>(1, cut.shards.size());
  std::map<NodeId, std::uint64_t> out;
  for (const CutShard& shard : cut.shards) {
    const bool here = std::any_of(shard.holders.begin(), shard.holders.end(),
                                  [&node](const CutHolder& h) { return h.node == node; });
    if (here) continue;
    const std::size_t holders = shard.holders.size();
    const auto turn = static_cast<std::size_t>(worker.rank + shard.rank) % std::max(1UL, holders);
    out[holders == 0 ? NodeId() : shard.holders[turn].node] += part;
  }
  return out;
}

std::string Controller::Impl::CutEvidence(const RestoreCut& cut, std::size_t ranks) {
  if (cut.shards.empty()) return "";
  const auto files = std::count_if(cut.shards.begin(), cut.shards.end(),
                                   [](const CutShard& s) { return s.holders.empty(); });
  return fmt::format(" ranks_by_ranges={} from_world={} shards_in_files={}", ranks, cut.world_size,
                     files);
}

}  // namespace everstep::controller
