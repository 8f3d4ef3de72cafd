// The only place of the server that knows both the wire (proto/agent.proto) and the core's values.
// Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "agent.pb.h"
#include "controller/core/decision.h"
#include "controller/core/event.h"

namespace everstep::controller {

// Equal across two registrations: the same keeper process, so nothing on the node was lost.
std::uint64_t KeeperId(const std::string& boot_id, std::uint64_t pid_namespace,
                       std::int32_t keeper_pid, std::uint64_t keeper_start_time);

// What an agent must say before it is let in. Empty: fine; else who, what, the limit, what to do.
std::string CheckRegister(const v1::Register& message);

NodeRegistered FromWire(const v1::Register& message, std::uint64_t session);

// A report of a registered agent. None: a body that is not a report to the core (log lines, or one
// a newer agent knows). `keeper` is the node's last Register: KeeperLost names only what changed.
std::optional<Event> FromWire(const NodeId& node, const v1::AgentMessage& message,
                              const v1::Register& keeper);

// What all commands of one plan share, worked out once: a plan over a thousand nodes is sent a
// thousand times. Not thread-safe; starts empty.
struct PlanNumbers {
  std::shared_ptr<const GenerationPlan> plan;  // of which the rest is
  std::uint32_t crc = 0;
  std::uint32_t world_size = 0;
  std::size_t next =
      0;  // whose part is asked for next, likely: commands go out in the plan's order
};

// Everything but incarnation and sequence.
v1::ControllerMessage ToWire(const Command& command, PlanNumbers* numbers);

}  // namespace everstep::controller
