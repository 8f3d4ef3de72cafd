// What really happened, as only a simulator can know it: which bytes descend from which, who
// verified a copy of what, and every truth that was found broken. Processes of the world never read
// it; checkers do.
//
// A state of training is named by its lineage: a hash over (parent, step, generation that computed
// it). Two runs of one step in two generations are different states, as two reductions of floats
// are.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "controller/core/types.h"

namespace everstep::sim {

using Lineage = std::uint64_t;
inline constexpr Lineage kFromNothing = 0;

class Truth {
 public:
  struct State {
    JobId job;
    Step step = kNoStep;
    Generation generation = 0;
    Lineage parent = kFromNothing;
  };

  explicit Truth(Timestamp start) : start_(start) {}

  Lineage Extend(const JobId& job, Lineage parent, Step step, Generation generation);
  const State* Find(Lineage lineage) const;
  // `ancestor` is `lineage` itself or one of those it was computed from.
  bool Descends(Lineage lineage, Lineage ancestor) const;

  // The checksum of a rank's shard of a state; it covers who captured it.
  std::uint32_t Checksum(Lineage lineage, Rank rank);
  std::optional<Lineage> OfChecksum(std::uint32_t crc_root) const;

  // Who verified a copy of a shard at some time.
  struct Holder {
    NodeId node;
    std::uint64_t keeper = 0;
    bool intact = true;  // no fault spoiled it since
  };
  void Copied(const NodeId& node, std::uint64_t keeper, const JobId& job, const HeldShard& shard);
  std::vector<Holder> Holders(const JobId& job, const HeldShard& shard) const;

  // A holder's slot was spoiled by a fault: that copy is dead.
  void Spoiled(const NodeId& node, std::uint64_t keeper, const JobId& job, const HeldShard& shard);

  void Count(const std::string& what) { ++counts_[what]; }
  const std::map<std::string, std::uint64_t>& counts() const { return counts_; }

  // A truth is broken. `rule` is the checker's name; the first one ends the run.
  void Violate(Timestamp now, const std::string& rule, const std::string& what);
  const std::vector<std::string>& violations() const { return violations_; }

  // The story of the run, for people; silent unless somebody listens.
  std::function<void(Timestamp now, const std::string& line)> storyteller;
  bool told() const { return storyteller != nullptr; }
  void Note(Timestamp now, const std::string& line) const {
    if (storyteller) storyteller(now, line);
  }

 private:
  const Timestamp start_;
  using CopyKey = std::tuple<JobId, Rank, Step, Generation, std::uint32_t>;
  std::map<Lineage, State> states_;
  std::map<std::uint32_t, Lineage> by_checksum_;
  std::map<std::pair<Lineage, Rank>, std::uint32_t> checksums_;
  std::map<CopyKey, std::vector<Holder>> copies_;
  std::map<std::string, std::uint64_t> counts_;
  std::vector<std::string> violations_;
};

}  // namespace everstep::sim
