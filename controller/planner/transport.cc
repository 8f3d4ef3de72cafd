#include "controller/planner/transport.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "proto/base/check.h"

namespace everstep::planner {

std::vector<std::vector<std::int64_t>> CheapestTransport(
    std::vector<std::int64_t> supply, std::vector<std::int64_t> demand,
    const std::vector<std::vector<std::int64_t>>& cost) {
  constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max() / 4;
  constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  const std::size_t n = supply.size(), m = demand.size();
  EVERSTEP_CHECK(std::accumulate(supply.begin(), supply.end(), std::int64_t{0}) ==
                 std::accumulate(demand.begin(), demand.end(), std::int64_t{0}));
  std::vector<std::vector<std::int64_t>> flow(n, std::vector<std::int64_t>(m, 0));
  // Vertices: supplies 0..n-1, demands n..n+m-1. Potentials keep reduced costs >= 0.
  std::vector<std::int64_t> potential(n + m, 0), distance(n + m);
  std::vector<std::size_t> before(n + m);
  std::vector<char> done(n + m);
  std::int64_t sink = 0;  // the potential of where all demands lead
  for (;;) {
    std::fill(distance.begin(), distance.end(), kFar);
    std::fill(before.begin(), before.end(), kNone);
    std::fill(done.begin(), done.end(), char{0});
    bool any = false;
    for (std::size_t i = 0; i < n; ++i) {
      if (supply[i] == 0) continue;
      distance[i] = 0;
      any = true;
    }
    if (!any) return flow;
    // The nearest demand that is not met, its distance to the sink counted.
    std::size_t target = kNone;
    std::int64_t nearest = kFar;
    for (;;) {
      std::size_t at = kNone;
      for (std::size_t v = 0; v < n + m; ++v) {
        if (done[v] == 0 && distance[v] < nearest && (at == kNone || distance[v] < distance[at])) {
          at = v;
        }
      }
      if (at == kNone) break;
      done[at] = 1;
      if (at >= n && demand[at - n] > 0 && distance[at] + potential[at] - sink < nearest) {
        nearest = distance[at] + potential[at] - sink;
        target = at;
      }
      if (at < n) {
        for (std::size_t j = 0; j < m; ++j) {
          const std::int64_t d = distance[at] + cost[at][j] + potential[at] - potential[n + j];
          if (d >= distance[n + j]) continue;
          distance[n + j] = d;
          before[n + j] = at;
        }
      } else {
        for (std::size_t i = 0; i < n; ++i) {
          if (flow[i][at - n] == 0) continue;
          const std::int64_t d = distance[at] - cost[i][at - n] + potential[at] - potential[i];
          if (d >= distance[i]) continue;
          distance[i] = d;
          before[i] = at;
        }
      }
    }
    EVERSTEP_CHECK(target != kNone, "every demand can be reached from every supply");
    for (std::size_t v = 0; v < n + m; ++v) potential[v] += std::min(distance[v], nearest);
    sink += nearest;
    // As much as the path carries.
    std::int64_t amount = demand[target - n];
    std::size_t first = target;
    for (std::size_t v = target; before[v] != kNone; v = before[v]) {
      first = before[v];
      if (v < n) amount = std::min(amount, flow[v][before[v] - n]);
    }
    amount = std::min(amount, supply[first]);
    for (std::size_t v = target; before[v] != kNone; v = before[v]) {
      if (v < n) {
        flow[v][before[v] - n] -= amount;
      } else {
        flow[before[v]][v - n] += amount;
      }
    }
    supply[first] -= amount;
    demand[target - n] -= amount;
  }
}

}  // namespace everstep::planner
