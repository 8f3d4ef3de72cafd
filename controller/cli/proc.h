// Processes as /proc shows them, found by what they work on and not by pid files: a file may be
// stale.
//
// Linux only. Thread-safe.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace everstep::cli {

// A pid and the clock tick it started at: together they name one process for ever (until a reboot).
struct ProcessId {
  pid_t pid = 0;
  std::uint64_t start_time = 0;  // field 22 of /proc/PID/stat
};

struct ProcessFacts {
  ProcessId id;
  pid_t parent = 0;
  char state = '?';     // R S D T Z ...
  std::string program;  // file name of the executable; empty: cannot be read
  std::string name;     // as ps shows it; the keeper's guard calls itself everstep-guard
  std::vector<std::string> arguments;
  bool marked = false;  // its environment says that it belongs to the directory asked for
};

// Name in the environment of what a supervisor starts: the cluster's state directory.
inline constexpr const char* kStateVariable = "EVERSTEP_CLUSTER_STATE";

// pid 0 when there is no such process.
ProcessId Identify(pid_t pid);
// Alive and not a zombie.
bool Alive(const ProcessId& id);

// Every process of this user that works for `directory` (a cluster's state directory or a node's):
// our programs with it in their arguments, processes that have it in kStateVariable or
// EVERSTEP_KEEPER, and all descendants of both (and of this process, if asked). Never this process.
// Zombies are left out.
std::vector<ProcessFacts> ProcessesOf(const std::string& directory, bool own_children = false);

// Through a pidfd, so that a reused pid is never hit. False: it is gone.
bool SendSignal(const ProcessId& id, int signal);
// Until all are gone. False: some were left at the deadline.
bool WaitGone(const std::vector<ProcessId>& ids, std::chrono::milliseconds limit);

// "/usr/bin" of the running program; empty: unknown.
std::string OwnFolder();

}  // namespace everstep::cli
