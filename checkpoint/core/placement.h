// On which nodes each node's state is kept, so that what really fails together does not take all
// copies of anything. Pure and deterministic: the same input gives the same answer on every
// machine.
//
// Source: GEMINI (SOSP '23) section 4.1, Algorithm 1. A node's own memory is one of its m hosts.
// What counts is the number of distinct host sets: at m losses each costs 1/C(N,m) of the
// probability to survive (survival.h), and no placement has fewer than ceil(N/m).
//
//   group   m divides N: N/m closed groups, N/m host sets. Nothing is better.
//   mixed   else, GEMINI's: the last group has m + N%m nodes in a ring, a host set for each of them
//   ring    node i and the m-1 after it: N host sets; what others do, for comparison
//
// We go past the paper in three ways.
//  - `balanced`: fewest host sets when every node holds exactly m copies. The left-over group is
//    solved exactly over block designs (nodes that share a host set are a block): N=6, m=4 has 3
//    host sets where the ring has 6.
//  - `max_survival`: left-over nodes share one host set with borrowed members: ceil(N/m) host sets;
//    the m - N%m borrowed nodes hold m + N%m copies each.
//  - Failure domains: nested levels (host, rack, zone, spot pool) and any sets of nodes that are
//    evicted together. First as few domains as can be whose loss alone loses state, then as few
//    host sets as can be, then copies as far apart as can be.
//
// A node sends its state to m-1 others, always; what a node holds is bounded by `max_held`.
// O(N log N) where the spread by levels leaves nothing to mend; mending looks at N swaps for each
// copy that lies badly.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace everstep::checkpoint {

enum class Strategy : std::uint8_t { kBalanced, kMaxSurvival, kGemini, kRing };
const char* StrategyName(Strategy strategy);  // "balanced", "max_survival", "gemini", "ring"

inline constexpr std::uint32_t kNoDomain = 0xFFFFFFFF;

struct PlacementInput {
  std::uint32_t nodes = 0;
  std::uint32_t copies = 2;  // m, the node's own among them; more than there are nodes: all nodes
  Strategy strategy = Strategy::kBalanced;
  // levels[l][i]: the domain of node i at level l, any numbers; kNoDomain: in none. Widest first
  // (zone before rack) spreads best.
  std::vector<std::vector<std::uint32_t>> levels;
  std::vector<std::vector<std::uint32_t>> together;  // nodes that are lost as one; may overlap
  // Copies that a node may hold, its own among them. 0: m; for max_survival 2m - 1. Raised to m.
  std::uint32_t max_held = 0;
  // Where copies lie now, as Placement::hosts; empty: none, or nothing for that node. Kept wherever
  // the new placement is no worse for it: to move a copy costs its bytes.
  std::vector<std::vector<std::uint32_t>> previous;
};

// A domain whose loss alone loses some node's state.
struct FatalDomain {
  std::uint32_t level = 0;   // index into levels; levels.size(): `number` is an index into together
  std::uint32_t number = 0;  // the domain, as levels names it
  std::uint32_t nodes = 0;   // its nodes
  std::uint32_t lost = 0;    // nodes whose every copy it holds
  friend bool operator==(const FatalDomain&, const FatalDomain&) = default;
};

struct Placement {
  std::uint32_t copies = 0;  // m, as used
  std::vector<std::vector<std::uint32_t>>
      hosts;                       // by node: itself first, then its peers, ascending
  std::uint32_t host_sets = 0;     // distinct ones
  std::uint32_t most_held = 0;     // copies on the node that holds most
  std::uint32_t moved = 0;         // copies that `previous` has elsewhere
  std::vector<FatalDomain> fatal;  // by level, then number
  std::string shape;               // "group", "mixed", "ring", "borrowed", "alone"
};

// REQUIRES nodes >= 1, each of levels of size nodes, members of sets and of previous < nodes.
Placement Place(const PlacementInput& input);

// The fewest distinct host sets for `nodes` that each hold exactly m copies, as hosts by node (each
// ascending), found by complete search; empty when `budget` looks did not suffice. m <= nodes.
std::vector<std::vector<std::uint32_t>> FewestHostSets(std::uint32_t nodes, std::uint32_t m,
                                                       std::uint32_t budget);

}  // namespace everstep::checkpoint
