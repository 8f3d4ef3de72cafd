// One simulated world: nodes, network, disk, controller, operator, faults and checkers, from boot
// to the last job's end. First a phase with faults, in which only safety is asked for, then one
// without, in which every job must run to its end.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/sim/world/options.h"

namespace everstep::sim {

struct RunResult {
  std::vector<std::string> violations;  // empty: all truths held
  std::uint64_t digest = 0;
  std::uint64_t events = 0;
  double virtual_seconds = 0;
  std::map<std::string, std::uint64_t>
      counts;  // what the run reached, to see that it tests something
  bool ok() const { return violations.empty(); }
};

// Called with each line of the run's story, in order.
using Storyteller = std::function<void(Timestamp now, const std::string& line)>;

// Deterministic: equal arguments give equal results. Thread-safe: worlds share nothing.
// `every_event`: the story holds each event of the timeline too.
RunResult RunWorld(const WorldOptions& options, const std::vector<Fault>& faults,
                   const Storyteller& storyteller = nullptr, bool every_event = false);

}  // namespace everstep::sim
