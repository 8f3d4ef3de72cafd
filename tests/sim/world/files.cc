#include "tests/sim/world/files.h"

#include <algorithm>
#include <iterator>

namespace everstep::sim {

bool Files::Write(Timestamp now, const JobId& job, const HeldShard& shard) {
  if (now < fails_until_) return false;
  HeldShard file = shard;
  file.replica = false;
  file.file = true;
  jobs_[job][{shard.step, shard.generation}].ranks[shard.rank] = file;
  return true;
}

bool Files::Seal(Timestamp now, const JobId& job, Generation generation, Step step) {
  Checkpoint& c = jobs_[job][{step, generation}];
  if (c.sealed) return true;
  if (c.ranks.empty() ||
      c.ranks.size() != static_cast<std::size_t>(c.ranks.begin()->second.world_size)) {
    return false;
  }
  c.sealed = true;
  c.sealed_at = now;
  return true;
}

void Files::Prune(const JobId& job, std::size_t keep, const Cut& verified) {
  auto& all = jobs_[job];
  std::size_t sealed = 0;
  for (auto it = all.end(); it != all.begin();) {
    --it;
    const Checkpoint& c = it->second;
    const bool good = c.sealed && !c.given_up;
    if (good) ++sealed;
    const bool kept = it->first == Name{verified.step, verified.generation};
    if (sealed > keep && !kept) it = all.erase(it);
  }
}

std::vector<HeldShard> Files::Survey(const JobId& job, const std::vector<Cut>& given_up) {
  std::vector<HeldShard> told;
  std::size_t checkpoints = 0;
  auto& all = jobs_[job];
  for (auto it = all.rbegin(); it != all.rend() && checkpoints < kTold; ++it) {
    Checkpoint& c = it->second;
    if (!c.sealed) continue;
    c.given_up = c.given_up || std::any_of(given_up.begin(), given_up.end(), [&](const Cut& cut) {
                   return Beyond(cut, it->first.second, it->first.first);
                 });
    if (c.given_up || c.bad_reads >= kBadReads) continue;
    ++checkpoints;
    for (const auto& [rank, shard] : c.ranks) told.push_back(shard);
  }
  return told;
}

std::optional<HeldShard> Files::Read(const JobId& job, Generation generation, Step step, Rank rank,
                                     std::uint32_t crc_root) {
  auto& all = jobs_[job];
  const auto it = all.find({step, generation});
  if (it == all.end() || !it->second.sealed || it->second.given_up) return std::nullopt;
  if (it->second.damaged) {
    ++it->second.bad_reads;
    return std::nullopt;
  }
  const auto file = it->second.ranks.find(rank);
  if (file == it->second.ranks.end() || file->second.crc_root != crc_root) return std::nullopt;
  return file->second;
}

bool Files::Damage(const JobId& job) {
  auto& all = jobs_[job];
  const auto newest = std::find_if(all.rbegin(), all.rend(), [](const auto& c) {
    return c.second.sealed && !c.second.given_up && !c.second.damaged;
  });
  if (newest == all.rend()) return false;
  newest->second.damaged = true;
  return true;
}

std::optional<HeldShard> Files::Newest(const JobId& job, Timestamp when,
                                       const std::vector<Cut>& given_up) const {
  const auto all = jobs_.find(job);
  if (all == jobs_.end()) return std::nullopt;
  for (auto it = all->second.rbegin(); it != all->second.rend(); ++it) {
    const Checkpoint& c = it->second;
    if (!c.sealed || c.given_up || c.damaged || c.sealed_at > when) continue;
    const bool beyond = std::any_of(given_up.begin(), given_up.end(), [&](const Cut& cut) {
      return Beyond(cut, it->first.second, it->first.first);
    });
    if (!beyond) return c.ranks.begin()->second;
  }
  return std::nullopt;
}

}  // namespace everstep::sim
