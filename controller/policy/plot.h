// Simulations as SVG. Pure.
#pragma once

#include <string>
#include <vector>

#include "controller/policy/simulate.h"

namespace everstep::policy {

// Over the trace's time: its nodes, and below them the samples of each policy and of the oracle.
std::string CoursePlot(const Simulation& simulation);

// A row for each trace, a panel for each model, a dot for each policy at its share of the oracle.
std::string GridPlot(const std::vector<Simulation>& simulations);

}  // namespace everstep::policy
