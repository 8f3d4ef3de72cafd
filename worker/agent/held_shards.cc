#include "worker/agent/held_shards.h"

#include <algorithm>
#include <utility>

namespace everstep::agent {
namespace {

std::pair<Generation, Step> Age(const HeldShard& s) {
  return {s.generation, s.step};
}

}  // namespace

void HeldShards::Note(const JobId& job, const HeldShard& shard) {
  std::vector<HeldShard>& slots = jobs_[job][{shard.replica, shard.rank}];
  std::erase_if(slots, [&](const HeldShard& s) { return s.step == shard.step; });
  slots.push_back(shard);
  std::sort(slots.begin(), slots.end(),
            [](const HeldShard& a, const HeldShard& b) { return Age(a) > Age(b); });
  if (slots.size() > kSlots) slots.resize(kSlots);
}

void HeldShards::Drop(const JobId& job, const HeldShard& shard) {
  const auto found = jobs_.find(job);
  if (found == jobs_.end()) return;
  std::erase_if(found->second[{shard.replica, shard.rank}],
                [&](const HeldShard& s) { return Age(s) == Age(shard); });
}

void HeldShards::Set(const JobId& job, const std::vector<HeldShard>& shards) {
  jobs_.erase(job);
  for (const HeldShard& s : shards) Note(job, s);
}

std::vector<HeldShard> HeldShards::Of(const JobId& job) const {
  std::vector<HeldShard> out;
  const auto found = jobs_.find(job);
  if (found == jobs_.end()) return out;
  for (const auto& [arena, slots] : found->second)
    out.insert(out.end(), slots.begin(), slots.end());
  return out;
}

}  // namespace everstep::agent
