// Bugs that can be switched on, so that the simulator can show that it finds them. Never set
// outside tests.
#pragma once

#include <cstdint>

namespace everstep::controller {

enum SeededBug : std::uint32_t {
  kBugMissingFence = 1u << 0,      // messages of old incarnations and generations are obeyed
  kBugUnsyncedBatch = 1u << 1,     // the shell sends commands before the batch is synced
  kBugPrematureCommit = 1u << 2,   // a step is committed with one copy
  kBugDoubleActivation = 1u << 3,  // a generation starts while old workers may still run
  kBugLostWakeup = 1u << 4,        // deadlines of a switch are forgotten
};

}  // namespace everstep::controller
