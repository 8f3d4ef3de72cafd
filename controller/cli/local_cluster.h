// Bringing a local cluster up and taking it down, without gRPC: the verbs add the waiting and the
// words.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "controller/cli/registry.h"

namespace everstep::cli {

// Checks the plan and the directory, takes the name, writes STATE and starts the supervisor. On an
// error nothing is left.
Outcome LayOut(const Registry& registry, const ClusterPlan& plan, const std::string& state_dir);

struct TakenDown {
  std::size_t killed = 0;              // processes that had to be killed
  std::vector<std::string> survivors;  // "pid 12 (everstep-agent)"
  bool files_left = false;             // somebody else's files are in the state directory
};

// Ends every process, removes every file of ours (unless keep_files) and the name. Works on what is
// half there: no supervisor, no files, no processes. `limit` is for the supervisor's ordered end.
TakenDown TakeDown(const Registry& registry, const ClusterInfo& cluster, bool keep_files,
                   std::chrono::milliseconds limit);

// Absolute, without "." and "..", without a final slash.
std::string CleanPath(const std::string& path);

}  // namespace everstep::cli
