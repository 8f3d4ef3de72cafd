// This node's part of an activated generation, as the checkpoint plane wants it. Pure.
#pragma once

#include "checkpoint/transfer/transfer_service.h"
#include "worker/agent/core/event.h"

namespace everstep::agent {

checkpoint::Part PartOf(const Activate& activate);

}  // namespace everstep::agent
