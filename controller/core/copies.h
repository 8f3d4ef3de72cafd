// Where the copies of a job's state lie, and what fails together. Pure functions over the state;
// the planning of a generation and what people are shown use the same ones.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/core/placement.h"
#include "controller/core/state.h"

namespace everstep::controller {

// Labels of a node that name a failure domain, widest first: `--label rack=r7`. A node without a
// `host` label is of the host of its address. `--label evict=a,b`: it is evicted together with all
// nodes that name a set of theirs `a` or `b`.
inline constexpr const char* kDomainLabels[] = {"region", "zone", "pool", "rack", "host"};
inline constexpr char kEvictLabel[] = "evict";

// The failure domains of some nodes; all indices are into the list of nodes it was made for.
struct FailureDomains {
  struct Level {
    std::string name;                 // "rack"
    std::vector<std::string> values;  // by number, in the order of the nodes
    std::vector<std::uint32_t> of;    // by node: its number, or checkpoint::kNoDomain
  };
  std::vector<Level> levels;  // those that some of the nodes have
  std::vector<std::pair<std::string, std::vector<std::uint32_t>>> evicted;  // by name
};

FailureDomains DomainsOf(const ClusterState& state, const std::vector<NodeId>& nodes);

// "zone=a rack=r7 evict=b"; "" when it is in none. Without the host that its address names.
std::string DomainText(const NodeState& node);

// The one rule of how many copies of each rank's state a generation on so many nodes keeps, the
// rank's own among them: min(m, nodes), at least 1. So many peers less one are pushed to, so many
// nodes must hold a shard, verified and with equal checksums, before its step is committed.
std::uint32_t CopiesOf(const JobSpec& spec, std::size_t nodes);

// The placement of a generation's copies: by failure domains, balanced, and where they lie already
// wherever that is as good (checkpoint/core/placement.h). `nodes` by group rank.
checkpoint::Placement PlaceCopies(const ClusterState& state, const JobStateView& job,
                                  const std::vector<NodeId>& nodes);

// Fills in every member's peers.
void AssignPeers(const ClusterState& state, const JobStateView& job, GenerationPlan* plan);

// On which nodes the newest committed step lies now, by what they reported; before the first commit
// by the plan.
struct CopySets {
  std::vector<NodeId> nodes;  // members by group rank, then others that hold something and live
  std::size_t members = 0;
  Step step = kNoStep;      // kNoStep: nothing is committed, this is what is planned
  bool replicated = false;  // every rank's state is the same: one set, of all holders
  std::vector<std::vector<std::uint32_t>> hosts;  // by rank, or one; indices into nodes
};
CopySets CopiesNow(const ClusterState& state, const JobStateView& job);
// Of the rank that has fewest.
std::size_t LeastCopies(const CopySets& copies);

}  // namespace everstep::controller
