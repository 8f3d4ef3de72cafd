// What people ask about a job's checkpoints, from the core's state: where copies lie, what they
// survive, what a loss would cost. Pure functions; call on the thread that owns the state.
#pragma once

#include <string>
#include <vector>

#include "admin.pb.h"
#include "controller/core/controller.h"
#include "controller/core/state.h"

namespace everstep::controller {

// Probabilities for 1 .. max_lost lost nodes (0: 8), at most as many as the job has. Before the
// first commit they are of the plan, else of what nodes hold.
v1::CheckpointPlacement PlacementOf(const ClusterState& state, const JobStateView& job,
                                    std::uint32_t max_lost);

// The nodes that the request means: named, of domains ("zone=a"), or so many of the worst. False:
// *error says what there is not, with a hint, and *found is false when something named is unknown
// (else the request contradicts itself).
bool NodesMeant(const ClusterState& state, const JobStateView& job,
                const v1::ForetellLossRequest& request, std::vector<NodeId>* lost,
                std::string* error, bool* found);

// `forecast` is Controller::IfLost of the same state and nodes.
v1::LossForecast LossForecastOf(const ClusterState& state, const JobStateView& job,
                                const std::vector<NodeId>& lost, const Forecast& forecast,
                                std::uint32_t count);

}  // namespace everstep::controller
