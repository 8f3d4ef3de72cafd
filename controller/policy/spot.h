// Traces drawn from what was measured of real spot capacity, so that a simulation runs anywhere.
//
// Spot capacity goes in batches: how often, and how many nodes at once, was counted on recorded
// traces (columns of SpotLaw). A drawn trace has losses at the times of a Poisson process with that
// mean gap, sizes from a geometric law cut off at the largest seen with the mean seen, victims at
// random, and each lost node comes back after an exponential time that holds the mean number of
// nodes. Time of day, zones and prices are not in it. Pure; a seed gives one trace everywhere.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "controller/policy/trace.h"

namespace everstep::policy {

struct SpotLaw {
  std::string_view name;
  std::string_view of;  // the recording it was counted on
  double hours = 0;
  std::uint32_t most_nodes = 0;
  double mean_nodes = 0;
  double minutes_between = 0;  // losses, of one or several nodes
  double batch_mean = 0;       // nodes of a loss
  std::uint32_t batch_most = 0;
  bool returns = true;  // else nobody comes back
};

const std::vector<SpotLaw>& SpotLaws();

// nullptr: no law of that name.
const SpotLaw* FindSpotLaw(std::string_view name);

Trace DrawTrace(const SpotLaw& law, std::uint64_t seed);

}  // namespace everstep::policy
