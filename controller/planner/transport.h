// The transportation problem: what is supplied goes where it is demanded at the least cost. Exact,
// by successive shortest paths with potentials (Edmonds and Karp, 1972); each path carries as much
// as it can. Pure.
#pragma once

#include <cstdint>
#include <vector>

namespace everstep::planner {

// flow[i][j] of supply i to demand j. REQUIRES equal sums, costs >= 0, cost[i].size() == demands.
std::vector<std::vector<std::int64_t>> CheapestTransport(
    std::vector<std::int64_t> supply, std::vector<std::int64_t> demand,
    const std::vector<std::vector<std::int64_t>>& cost);

}  // namespace everstep::planner
