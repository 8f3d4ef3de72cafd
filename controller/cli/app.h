// The program: a command line in, an exit code out.
#pragma once

#include <string>
#include <vector>

#include "controller/cli/context.h"

namespace everstep::cli {

// `args` without the program's name; `called_as` is argv[0]. Prints errors itself: on stderr, or on
// stdout as JSON when JSON was asked for.
int RunCli(const std::string& called_as, const std::vector<std::string>& args,
           const Environment& environment, Io* io);

}  // namespace everstep::cli
