// everstep-run: torchrun's place, Everstep's recovery. docs/reference/flags.md is its page.
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "proto/base/version.h"
#include "worker/launcher/exit_codes.h"
#include "worker/launcher/flags.h"
#include "worker/launcher/machine.h"
#include "worker/launcher/run.h"

int main(int argc, char** argv) {
  using namespace everstep::launcher;
  ::signal(SIGPIPE, SIG_IGN);  // a console that closed is no reason to end a training
  RunRequest request;
  request.environment = OwnEnvironment();
  const ParseResult parsed =
      ParseFlags(std::vector<std::string>(argv + 1, argv + argc), request.environment);
  switch (parsed.kind) {
    case ParseKind::kHelp: fmt::print("{}", HelpText()); return kExitSucceeded;
    case ParseKind::kVersion:
      fmt::print("everstep {}\n", everstep::kVersion);
      return kExitSucceeded;
    case ParseKind::kError: fmt::print(stderr, "{}\n", parsed.error); return kExitUsage;
    case ParseKind::kRun: break;
  }
  for (const std::string& warning : parsed.warnings) {
    fmt::print(stderr, "everstep: {}\n", warning);
  }
  request.flags = parsed.flags;
  request.command = CommandPath(argv[0], request.environment);
  std::error_code error;
  // Links are followed here: the other programs lie where the file itself lies.
  request.programs = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  return Run(request);
}
