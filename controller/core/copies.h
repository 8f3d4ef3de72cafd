// Where the copies of a job's state lie, and what fails together. Pure functions over the state;
// the planning of a generation and what people are shown use the same ones.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/core/placement.h"
#include "checkpoint/core/redundancy.h"
#include "checkpoint/core/survival.h"
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
// nodes must hold a shard, verified and with equal checksums, before its step is committed. 1 where
// ParityOf says that parities are kept instead.
std::uint32_t CopiesOf(const JobSpec& spec, std::size_t nodes);

// The placement of a generation's copies: by failure domains, balanced, and where they lie already
// wherever that is as good (checkpoint/core/placement.h). `nodes` by group rank.
checkpoint::Placement PlaceCopies(const ClusterState& state, const JobStateView& job,
                                  const std::vector<NodeId>& nodes);

// How the job's owner asked for its state to be kept.
checkpoint::Redundancy AskedFor(const JobSpec& spec);
// Why the job's nodes can never keep it so, and what would fit; empty: they can.
std::string RedundancyTrouble(const JobSpec& spec);
// How a generation on so many nodes keeps it: "rs(4+2)", or on fewer what is left of that.
checkpoint::Redundancy RedundancyOf(const JobSpec& spec, std::size_t nodes);
// The parity that a generation on so many nodes keeps of each sharded step; none: copies.
std::optional<checkpoint::Redundancy> ParityOf(const JobSpec& spec, std::size_t nodes);

// Which ranks share parities, over failure domains. REQUIRES that ParityOf has a value.
ParityPlan PlanParity(const ClusterState& state, const JobSpec& spec,
                      const std::vector<NodeId>& nodes);

// Fills in every member's peers, or the plan's parity.
void AssignPeers(const ClusterState& state, const JobStateView& job, GenerationPlan* plan);

// Bytes that a rank on `node` takes of a cut from elsewhere, by the node that serves them; "": the
// job's directory. A guess, until its process has said what it wants: as much of every shard, and
// nothing moves of those that its node holds.
std::map<NodeId, std::uint64_t> CutMoves(const RestoreCut& cut, const NodeId& node,
                                         const WorkerPlan& worker);

// On which nodes the newest committed step lies now, by what they reported; before the first commit
// by the plan.
struct CopySets {
  std::vector<NodeId> nodes;  // members by group rank, then others that hold something and live
  std::size_t members = 0;
  Step step = kNoStep;      // kNoStep: nothing is committed, this is what is planned
  bool replicated = false;  // every rank's state is the same: one set, of all holders
  std::vector<std::vector<std::uint32_t>> hosts;  // by rank, or one; indices into nodes
  // Of a step that is kept by parities: which, and where each of the hosts' ranks' states and each
  // parity lies.
  ParityPlan parity;
  std::map<Rank, std::vector<std::uint32_t>> at;
  std::size_t parities = 0;  // that are there ...
  std::size_t wanted = 0;    // ... of so many
};
CopySets CopiesNow(const ClusterState& state, const JobStateView& job);
// Of the rank that has fewest.
std::size_t LeastCopies(const CopySets& copies);
// Ranks whose state goes with these nodes (indices), ascending; of a replicated layout rank 0 for
// all.
std::vector<Rank> RanksLostWith(const CopySets& copies, const std::vector<std::uint32_t>& gone);
// How many of which nodes may go, by what is there now: while a parity lacks, a group counts as its
// weakest row, which is less than may really go. REQUIRES copies.parity has groups.
std::vector<checkpoint::LossGroup> LossGroupsOf(const CopySets& copies);

}  // namespace everstep::controller
