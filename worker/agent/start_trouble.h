// Tells a start that failed by itself from a script that failed: gloo's connectFullMesh sometimes
// cannot connect its ranks although nothing is wrong with the script, the nodes or the network.
#pragma once

#include <string>
#include <string_view>

#include "proto/base/plan.h"

namespace everstep::agent {

inline constexpr std::size_t kStderrTail = 16u << 10;

// The line of `text` that says that a process group could not be connected; empty: none. Pure.
std::string FullMeshFailure(std::string_view text);

// Looks at the error file's content, then at the end of stderr (may be absent). Empty: the worker's
// exit has another cause. Reads a file: not for the engine's thread.
std::string StartTrouble(const ExitInfo& exit, const std::string& stderr_log);

}  // namespace everstep::agent
