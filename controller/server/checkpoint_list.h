// A job's checkpoints for people, from the core's state: which steps there are, in which tier, with
// how many copies, how far each is trusted, and what is damaged. Pure; call on the thread that owns
// the state.
#pragma once

#include "admin.pb.h"
#include "controller/core/state.h"

namespace everstep::controller {

v1::JobCheckpoints CheckpointsOf(const ClusterState& state, const JobStateView& job);

}  // namespace everstep::controller
