// The command tree of `everstep`: every name, option, text and example in one place.
#pragma once

#include "controller/cli/command.h"

namespace everstep::cli {

// Built once, lives as long as the program. Thread-safe.
const ProgramSpec& Program();

// Children of `everstep ckpt`, each group in a file of its own (tree_ckpt_*.cc).
CommandSpec CkptTrafficCommand();
std::vector<CommandSpec> CkptFileCommands();
std::vector<CommandSpec> CkptTrustCommands();

// `everstep plan` (tree_plan.cc).
CommandSpec PlanCommands();
// `everstep simulate` (tree_simulate.cc).
CommandSpec SimulateCommand();

// Topics of `everstep help TOPIC` that are no commands: name, one line, text.
struct Topic {
  std::string name;
  std::string summary;
  std::string text;
};
const std::vector<Topic>& Topics();

}  // namespace everstep::cli
