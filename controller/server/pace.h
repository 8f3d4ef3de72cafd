// How fast a job's state moves and how long a switch takes, by what the job itself measured. Pure.
#pragma once

#include <string>

#include "controller/core/state.h"

namespace everstep::controller {

struct Pace {
  double bytes_a_second = 0;
  double switch_seconds = 0;
  std::string rate_basis;  // "412 MiB/s measured at the newest commit"
  std::string basis;       // that, and ", 1 s assumed for the switch"
};

// Where nothing was measured yet: 1 GiB/s, 1 s.
Pace PaceOf(const JobStateView& job);

}  // namespace everstep::controller
