// The identities every Everstep process agrees on. Plain values, totally ordered, cheap to copy.
#pragma once

#include <cstdint>
#include <string>

namespace everstep {

// A machine (or a stand-in for one). Chosen by whoever starts the agent, unique within a cluster,
// [a-z0-9.-]{1,63}.
using NodeId = std::string;

// A training job. Unique within a controller, [A-Za-z0-9_.-]{1,128}.
using JobId = std::string;

// A job's configuration number: durable, only grows. Every command, report, shard and store key
// carries it; a smaller one than the receiver's is stale and dies at the door.
using Generation = std::uint64_t;

// One registration of an agent process with a controller. Durable per node, only grows.
using Incarnation = std::uint64_t;

// Global rank of a worker inside one generation, 0 .. world_size-1.
using Rank = std::int32_t;

// The trainer's own step counter, as it passes it to Checkpointer.step(n). -1: none.
using Step = std::int64_t;

inline constexpr Step kNoStep = -1;

}  // namespace everstep
