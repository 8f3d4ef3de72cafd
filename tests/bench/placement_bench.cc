// What it costs to place the copies of a large job and to say what they survive.
//
//   placement_bench [--runs 21] [--json FILE]
//
// Case NxM: N nodes, M copies, four levels of failure domains (host of 4, rack, row, zone). `time`
// is the whole of it: the placement, the exact probability for every number of lost nodes, and the
// loss of one and of two domains of each level, enumerated. Beside it: a node lost and its copies
// placed anew (`replace`), and how many copies that moved, of all; a ring of consecutive nodes, the
// least that a placement can cost, without domains (`ring`). `policies`: what other policies of
// redundancy would cost and survive over the same domains, a dozen of them placed anew.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include <fmt/format.h>

#include "checkpoint/core/placement.h"
#include "checkpoint/core/policy_prices.h"
#include "checkpoint/core/survival.h"
#include "proto/base/clock.h"
#include "tests/bench/results.h"

namespace everstep::bench {
namespace {

using checkpoint::NodeSet;
using checkpoint::Placement;
using checkpoint::PlacementInput;

PlacementInput Cluster(std::uint32_t nodes, std::uint32_t copies) {
  PlacementInput in{.nodes = nodes, .copies = copies};
  for (const std::uint32_t size : {256U, 64U, 16U, 4U}) {
    std::vector<std::uint32_t> level;
    for (std::uint32_t v = 0; v < nodes; ++v) level.push_back(v / size);
    in.levels.push_back(std::move(level));
  }
  return in;
}

std::vector<NodeSet> DomainsOf(const std::vector<std::uint32_t>& level) {
  std::map<std::uint32_t, NodeSet> members;
  for (std::uint32_t v = 0; v < level.size(); ++v) members[level[v]].push_back(v);
  std::vector<NodeSet> out;
  out.reserve(members.size());
  for (auto& [number, nodes] : members) out.push_back(std::move(nodes));
  return out;
}

template <typename Work>
double Milliseconds(const Work& work) {
  const std::int64_t began = MonotonicNanos();
  work();
  return static_cast<double>(MonotonicNanos() - began) / 1e6;
}

void Case(std::uint32_t nodes, std::uint32_t copies, int runs, Results* results) {
  const std::string name = fmt::format("{}x{}", nodes, copies);
  const PlacementInput in = Cluster(nodes, copies);
  for (int run = 0; run < runs; ++run) {
    Placement placed;
    double checked = 0;  // keeps the work from being left out
    results->Add(name, "everstep", "time", "ms", Milliseconds([&] {
                   placed = checkpoint::Place(in);
                   const auto by_losses = checkpoint::SurvivalByLosses(nodes, placed.hosts, nodes);
                   checked += by_losses ? by_losses->at(copies) : -1e9;
                   for (const auto& level : in.levels) {
                     const std::vector<NodeSet> domains = DomainsOf(level);
                     for (const std::uint32_t k : {1U, 2U}) {
                       checked +=
                           checkpoint::SurvivalByDomain(placed.hosts, domains, k).probability;
                     }
                   }
                 }));
    results->Add(name, "everstep", "placement", "ms",
                 Milliseconds([&] { checked += checkpoint::Place(in).host_sets; }));
    PlacementInput next = in;
    next.previous = placed.hosts;
    next.previous[nodes / 2].clear();
    for (auto& set : next.previous) std::erase(set, nodes / 2);
    std::uint32_t moved = 0;
    results->Add(name, "everstep", "replace", "ms",
                 Milliseconds([&] { moved = checkpoint::Place(next).moved; }));
    results->Add(name, "everstep", "policies", "ms", Milliseconds([&] {
                   for (const auto& policy :
                        checkpoint::PoliciesToCompare({.shards = 1, .parity = copies - 1}, nodes)) {
                     checked += checkpoint::PricePolicy(in, policy, false, 8).fatal;
                   }
                 }));
    results->Add(name, "everstep", "moved", "copies", moved);
    results->Add(name, "ring", "placement", "ms", Milliseconds([&] {
                   checked += checkpoint::Place({.nodes = nodes,
                                                 .copies = copies,
                                                 .strategy = checkpoint::Strategy::kRing})
                                  .host_sets;
                 }));
    if (checked < 0) fmt::print(stderr, "{}: no exact probability\n", name);
  }
}

int Main(int argc, char** argv) {
  int runs = 21;
  std::string json;
  if (const auto code = ReadFlags(argc, argv, "placement_bench", &runs, &json)) return *code;
  Results results("placement");
  Case(128, 2, runs, &results);
  Case(1024, 3, runs, &results);
  results.Print();
  fmt::print("\nlimit: time of 1024x3 at most 50 ms\n");
  if (!json.empty() && !results.Write(json)) {
    fmt::print(stderr, "error: cannot write {}\n", json);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
