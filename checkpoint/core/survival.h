// The probability that a job's state survives the loss of nodes: exact where that can be had,
// sampled with its confidence interval beyond. Pure, deterministic (samples are seeded).
//
// State is lost when all hosts of some node's state are lost. GEMINI (SOSP '23) section 4.1 bounds
// the probability (CorollaryBound); here it is counted. Inclusion and exclusion over host sets
// subtracts huge numbers that are nearly equal; we count the losses of k nodes that take no host
// set whole instead, so every term is positive and nothing cancels: host sets that share no node
// are independent factors of one generating function (coefficient k: safe losses of k nodes), and a
// factor of sets that overlap is counted by a sweep over its nodes, remembering which sets have
// lost all of their nodes so far. A closed group is one term, a ring of N has m^2 states.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace everstep::checkpoint {

using NodeSet = std::vector<std::uint32_t>;

// Distinct host sets, none containing another (what takes the smaller is enough). Each ascending.
std::vector<NodeSet> MinimalHostSets(const std::vector<NodeSet>& hosts);

// Pr(state survives | k uniformly chosen nodes of `nodes` are lost) for k = 0 .. max_k (at most
// nodes). Nullopt: the sets overlap so much that the sweep would need more than 4,096 states or 64
// open sets; sample then. O(nodes * max_k * m) for groups. REQUIRES nodes <= 16,000 (beyond,
// binomials leave the range of long double).
std::optional<std::vector<double>> SurvivalByLosses(std::uint32_t nodes,
                                                    const std::vector<NodeSet>& hosts,
                                                    std::uint32_t max_k);

struct Estimate {
  double probability = 0;
  double low = 0, high = 0;  // 95 % confidence (Wilson); both `probability` when exact
  bool exact = false;
  std::uint64_t scenarios = 0;  // looked at; 0: counted by formula
};

struct EstimateLimits {
  std::uint64_t enumerate = 20'000;  // up to so many scenarios each one is looked at
  std::uint64_t samples = 20'000;    // beyond: so many are drawn
  std::uint64_t seed = 1;
};

// As SurvivalByLosses for one k, sampled where it has no answer.
Estimate Survival(std::uint32_t nodes, const std::vector<NodeSet>& hosts, std::uint32_t k,
                  const EstimateLimits& limits = {});

// Pr(state survives | k of these domains, uniformly chosen, are lost with all of their nodes).
// Domains may overlap. k larger than there are domains: all of them.
Estimate SurvivalByDomain(const std::vector<NodeSet>& hosts, const std::vector<NodeSet>& domains,
                          std::uint32_t k, const EstimateLimits& limits = {});

// Nodes whose every copy is on nodes of `failed` (any order): ascending. Empty: all state survives.
NodeSet LostWith(const std::vector<NodeSet>& hosts, const NodeSet& failed);

// Nodes of which any `tolerates` may be lost together and no more: then the state of every lost one
// of them is gone. What a parity group is (parity_groups.h); a closed group of m copies is one that
// tolerates m - 1.
struct LossGroup {
  NodeSet nodes;
  std::uint32_t tolerates = 0;
};

// As above, for groups no two of which share a node; always exact. Nodes in no group lose nothing.
std::vector<double> SurvivalByLosses(std::uint32_t nodes, const std::vector<LossGroup>& groups,
                                     std::uint32_t max_k);
Estimate SurvivalByDomain(const std::vector<LossGroup>& groups, const std::vector<NodeSet>& domains,
                          std::uint32_t k, const EstimateLimits& limits = {});
NodeSet LostWith(const std::vector<LossGroup>& groups, const NodeSet& failed);

// GEMINI's corollary 1, for m that divides N: max(0, 1 - (N/m) C(N-m, k-m) / C(N, k)); 1 for k < m.
double CorollaryBound(std::uint32_t nodes, std::uint32_t m, std::uint32_t k);

}  // namespace everstep::checkpoint
