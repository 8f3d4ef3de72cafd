// What the heartbeat says of the node's checkpoint traffic: TrafficReport as a message.
#pragma once

#include "agent.pb.h"
#include "checkpoint/transfer/traffic.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::agent {

// Leaves *to empty while nothing was sent or received.
void ToWire(const checkpoint::TrafficReport& report, v1::CheckpointTraffic* to);
void ToWire(const checkpoint::ScrubReport& report, v1::ScrubReport* to);

}  // namespace everstep::agent
