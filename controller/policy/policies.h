// The policies, each in a file of its own. Pure.
#pragma once

#include <cstdint>

#include "controller/policy/replay.h"

namespace everstep::policy {

// Steps between two checkpoints; 0: none is ever written.
inline constexpr std::uint64_t kNoCheckpoints = 0;

// Varuna: equal pipelines, a checkpoint every so many steps, everything starts again after a loss
// (restart.cc). With notice of at least a checkpoint's time it writes one before it leaves.
struct RestartOptions {
  std::uint64_t every = 1;
  bool from_memory = false;  // each step is in other nodes' memory: no stall, a quick restart
};
Report RestartReport(const Capacity& capacity, const Model& model, const Rules& rules,
                     const RestartOptions& options);

// Bamboo: each node shadows its successor's stage (bamboo.cc). A loss that shadows cover costs a
// pause; two neighbours at once, or more, a rollback to the checkpoint.
Report BambooReport(const Capacity& capacity, const Model& model, const Rules& rules,
                    std::uint64_t every);

// Oobleck as published: unequal pipelines on every node; a loss costs the iteration and a switch in
// place (oobleck.cc). Better than its artifact in one thing: nodes that come are used at a
// boundary.
Report OobleckReport(const Capacity& capacity, const Model& model, const Rules& rules);

// Everstep: the production planner says who runs what before and after each change (planned.cc).
// Nodes that have room for fewer than f + 1 copies run one, with each step in peers' memory.
struct PlannedOptions {
  bool keep_gradients = true;  // pipelines that a loss leaves alone keep what they have summed up
  bool price_moves = true;     // moving state takes its time
};
Report PlannedReport(const Capacity& capacity, const Model& model, const Rules& rules,
                     const PlannedOptions& options = {});

}  // namespace everstep::policy
