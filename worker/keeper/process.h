// Processes as the keeper sees them: starting one so that it finds what a fresh program expects,
// and reading what the kernel says of one. No state, no protocol.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace everstep::keeper {

struct LaunchSpec {
  std::vector<std::string> argv;  // argv[0] without '/' is looked for in the PATH of `env`
  std::vector<std::string> env;   // "KEY=value", complete
  std::string cwd;                // empty: the keeper's
  std::optional<mode_t> umask;
  std::string stdout_path;  // appended to, directories made; empty: /dev/null
  std::string stderr_path;
  // Descriptors of ours that the child finds under the second number; all others are closed.
  std::vector<std::pair<int, int>> keep;
  // The child writes "E" and a text here if it cannot begin; closed by the exec that succeeds.
  int status_fd = -1;
};

// Forks and executes: new session, default signals, empty mask, stdin /dev/null, and SIGKILL when
// the keeper dies. Returns the pid, or -1 and *error when the fork itself failed.
// REQUIRES a single-threaded caller.
pid_t Launch(const LaunchSpec& spec, std::string* error);

// Value of `key` in the environment that the process was started with.
std::optional<std::string> ReadProcEnvironment(pid_t pid, const std::string& key);

// Children of this (single-threaded) process, adopted ones too.
std::vector<pid_t> ListChildren();

// How often the kernel's memory killer struck in our control group, or on this machine where the
// group does not tell.
std::int64_t MemoryKills();

// The established TCP connections of a process. Reads /proc.
struct TcpConnections {
  int to_port = 0;  // its own to `port`, wherever that is
  int others = 0;
};
std::optional<TcpConnections> CountConnections(pid_t pid, std::uint16_t port);

}  // namespace everstep::keeper
