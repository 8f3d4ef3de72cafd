// What other policies of redundancy would cost a job and what they would survive, beside the one in
// force. Pure.
#pragma once

#include <cstdint>

#include "admin.pb.h"
#include "checkpoint/core/survival.h"
#include "controller/core/copies.h"
#include "controller/core/state.h"

namespace everstep::controller {

void FillSurvival(const checkpoint::Estimate& e, v1::Survival* to);

// `domains` of the plan's members, in its order; `replicated`: every rank's state is the same.
// REQUIRES that the plan has members.
void FillPolicies(const FailureDomains& domains, const JobStateView& job, bool replicated,
                  std::uint32_t max_lost, v1::CheckpointPlacement* to);

}  // namespace everstep::controller
