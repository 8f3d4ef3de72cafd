// What every verb gets: the parsed command line, the environment, where to print, how to reach a
// controller. One file a verb group (verb_*.cc) does the rest.
//
// Not thread-safe.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "controller/cli/client.h"
#include "controller/cli/command.h"
#include "controller/cli/registry.h"
#include "controller/cli/render.h"
#include "controller/cli/result.h"

namespace everstep::cli {

struct Io {
  std::function<void(std::string_view)> out;  // data
  std::function<void(std::string_view)> err;  // errors and remarks
  std::size_t width = 0;                      // columns of the terminal on stdout; 0: no terminal
  bool err_terminal = false;
};

class Context {
 public:
  // REQUIRES: all of them outlive the context.
  Context(const Parsed& parsed, const Environment& environment, Io* io);

  const Parsed& args;
  const Environment& env;
  const Registry registry;

  Output output = Output::kTable;
  RenderOptions render;
  std::chrono::milliseconds timeout{10'000};

  // The options above from the command line; the first error.
  Outcome ReadOptions();

  // Connects to nothing yet. --controller, --cluster, their variables, the only local cluster.
  Result<std::unique_ptr<AdminClient>> Client();
  // Where Client() connects to.
  Result<std::string> ControllerAddress() const;
  // The cluster that a drill or `down` means, by the same options. Stale ones count when named.
  Result<ClusterInfo> Cluster();

  void Out(std::string_view text) { io_->out(text); }
  // A line on stderr for people: not with -q, nor when the output is JSON.
  void Remark(const std::string& line);
  bool json() const { return output == Output::kJson || output == Output::kJsonl; }

  // `show` until Ctrl-C: again each second, over the old one on a terminal. Without --watch: once.
  Result<ExitCode> OnceOrWatch(const std::function<Result<std::string>(AdminClient*)>& show);

 private:
  struct Target {
    std::string address;
    std::string from;  // "--cluster", "EVERSTEP_CONTROLLER", ...
  };
  static Result<Target> CheckedTarget(const std::string& address, const std::string& from);
  Result<Target> FindTarget() const;

  Io* io_;
};

}  // namespace everstep::cli
