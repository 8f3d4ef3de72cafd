// Makes a failing list of faults small: delta debugging (Zeller and Hildebrandt, "Simplifying and
// Isolating Failure-Inducing Input", 2002, algorithm ddmin). The result still fails, and taking any
// single fault out of it makes the failure go away (1-minimal), unless the budget of runs ended
// first.
#pragma once

#include <functional>
#include <vector>

#include "tests/sim/kernel/fault.h"

namespace everstep::sim {

struct ShrinkResult {
  std::vector<Fault> faults;
  std::uint32_t runs = 0;
  bool minimal = false;  // false: the budget ended first
};

// REQUIRES: fails(faults). `fails` must be deterministic.
ShrinkResult Shrink(std::vector<Fault> faults,
                    const std::function<bool(const std::vector<Fault>&)>& fails,
                    std::uint32_t max_runs);

}  // namespace everstep::sim
