// What this node said or heard that it holds in checkpoint memory, for a registration that must not
// wait for gigabytes to be read again. A prepare asks the memory itself (effect Survey).
#pragma once

#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include "proto/base/plan.h"

namespace everstep::agent {

class HeldShards {
 public:
  static constexpr std::size_t kSlots = 2;  // of one arena: a third copy replaced the oldest

  // Newest generation and step win.
  void Note(const JobId& job, const HeldShard& shard);
  // All of the job's, as surveyed.
  void Set(const JobId& job, const std::vector<HeldShard>& shards);
  // It fails its checksum.
  void Drop(const JobId& job, const HeldShard& shard);
  void Forget(const JobId& job) { jobs_.erase(job); }
  void Clear() { jobs_.clear(); }
  std::vector<HeldShard> Of(const JobId& job) const;

 private:
  using Arena = std::pair<bool, Rank>;  // replica, rank
  std::map<JobId, std::map<Arena, std::vector<HeldShard>>> jobs_;
};

}  // namespace everstep::agent
