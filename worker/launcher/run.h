// One run, from a good command line to its exit code.
#pragma once

#include <string>

#include "worker/launcher/flags.h"

namespace everstep::launcher {

struct RunRequest {
  LaunchFlags flags;
  Environment environment;  // of the shell
  std::string command;      // path this program was called by
  std::string programs;     // folder of the programs beside it
};

// Blocks until the run is over, whatever happens to it; see exit_codes.h. Handles the signals of
// --signals-to-handle meanwhile. Called once, on the main thread, before any other thread was
// started.
int Run(const RunRequest& request);

}  // namespace everstep::launcher
