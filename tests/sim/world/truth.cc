#include "tests/sim/world/truth.h"

#include <fmt/format.h>

#include "proto/base/check.h"
#include "tests/sim/kernel/digest.h"

namespace everstep::sim {

Lineage Truth::Extend(const JobId& job, Lineage parent, Step step, Generation generation) {
  Digest digest;
  digest.Add(job);
  digest.Add(parent);
  digest.Add(static_cast<std::uint64_t>(step));
  digest.Add(generation);
  const Lineage lineage = digest.value();
  states_.emplace(lineage, State{job, step, generation, parent});
  return lineage;
}

const Truth::State* Truth::Find(Lineage lineage) const {
  const auto it = states_.find(lineage);
  return it == states_.end() ? nullptr : &it->second;
}

bool Truth::Descends(Lineage lineage, Lineage ancestor) const {
  if (ancestor == kFromNothing) return true;
  while (lineage != kFromNothing) {
    if (lineage == ancestor) return true;
    lineage = states_.at(lineage).parent;
  }
  return false;
}

std::uint32_t Truth::Checksum(Lineage lineage, Rank rank) {
  const auto known = checksums_.find({lineage, rank});
  if (known != checksums_.end()) return known->second;
  Digest digest;
  digest.Add(lineage);
  digest.Add(static_cast<std::uint64_t>(rank) + 1);
  // Thousands of states and 32 bits: two would share one now and then. The checkers want each to
  // have its own.
  auto crc = static_cast<std::uint32_t>(digest.value() >> 32);
  while (by_checksum_.contains(crc)) ++crc;
  by_checksum_.emplace(crc, lineage);
  checksums_.emplace(std::pair(lineage, rank), crc);
  return crc;
}

std::optional<Lineage> Truth::OfChecksum(std::uint32_t crc_root) const {
  const auto it = by_checksum_.find(crc_root);
  if (it == by_checksum_.end()) return std::nullopt;
  return it->second;
}

void Truth::Copied(const NodeId& node, std::uint64_t keeper, const JobId& job, const HeldShard& s) {
  std::vector<Holder>& holders = copies_[{job, s.rank, s.step, s.generation, s.crc_root}];
  for (Holder& holder : holders) {
    if (holder.node != node || holder.keeper != keeper) continue;
    holder.intact = true;
    return;
  }
  holders.push_back({node, keeper, true});
}

void Truth::Spoiled(const NodeId& node, std::uint64_t keeper, const JobId& job,
                    const HeldShard& s) {
  const auto it = copies_.find({job, s.rank, s.step, s.generation, s.crc_root});
  if (it == copies_.end()) return;
  for (Holder& holder : it->second) {
    if (holder.node == node && holder.keeper == keeper) holder.intact = false;
  }
}

std::vector<Truth::Holder> Truth::Holders(const JobId& job, const HeldShard& s) const {
  const auto it = copies_.find({job, s.rank, s.step, s.generation, s.crc_root});
  return it == copies_.end() ? std::vector<Holder>{} : it->second;
}

void Truth::Violate(Timestamp now, const std::string& rule, const std::string& what) {
  violations_.push_back(fmt::format("{}: at {} ms: {}", rule, ToMilliseconds(now - start_), what));
  Note(now, "VIOLATION " + violations_.back());
}

}  // namespace everstep::sim
