// The agent's events and effects as messages of proto/agent.proto. What the controller speaks of
// too is converted by proto/wire/convert.h.
#pragma once

#include <optional>
#include <string>

#include "agent.pb.h"
#include "worker/agent/core/effect.h"
#include "worker/agent/core/event.h"

namespace everstep::agent {

// A command as the core's event. None: an unknown body (a newer controller), *error says which, or
// a command whose names would not be safe as file names.
std::optional<Event> FromWire(const everstep::v1::ControllerMessage& message, std::string* error);

Activate ActivateFromWire(const everstep::v1::Activate& message);
everstep::v1::Activate ToWire(const Activate& activate);

// Reports, without the incarnation.
everstep::v1::AgentMessage ToWire(const SendHeartbeat& e);
everstep::v1::AgentMessage ToWire(const SendPrepared& e);
everstep::v1::AgentMessage ToWire(const SendActivated& e);
everstep::v1::AgentMessage ToWire(const SendWorkerExited& e);
everstep::v1::AgentMessage ToWire(const SendWorkerStalled& e);
everstep::v1::AgentMessage ToWire(const SendShardCopied& e);
everstep::v1::AgentMessage ToWire(const SendShardDamaged& e);
everstep::v1::AgentMessage ToWire(const SendPersisted& e);
everstep::v1::AgentMessage ToWire(const SendTold& e);
everstep::v1::AgentMessage ToWire(const SendNotice& e);
everstep::v1::AgentMessage ToWire(const SendNodeWarm& e);
everstep::v1::AgentMessage ToWire(const SendStopped& e);

}  // namespace everstep::agent
