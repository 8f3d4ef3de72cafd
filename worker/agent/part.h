// This node's part of an activated generation, as the checkpoint plane wants it. Pure.
#pragma once

#include <string>

#include "checkpoint/transfer/transfer_service.h"
#include "worker/agent/core/event.h"

namespace everstep::agent {

// `directory`: the job's file tier; empty: none.
checkpoint::Part PartOf(const Activate& activate, const std::string& directory);

}  // namespace everstep::agent
