// The process behind `everstep cluster up`: starts the controller and one agent a node, starts a
// dead one again, and at SIGTERM ends all of it. It is what a service manager is on real machines.
//
//   STATE/  cluster          what to run (ClusterPlan)
//           supervisor.pid   "pid start_time"      supervisor.log
//           failure          why the first start did not work; the supervisor has ended then
//           ready            `cluster up` saw every node alive
//           controller/      db/ address controller.log hold
//           nodes/NAME/      the agent's and keeper's files, hold
//
// `hold` in a part's folder says how long it stays down after a drill: milliseconds since the
// epoch, or "ever". A node whose keeper died with its agent comes back after kNodeReturn, an agent
// alone at once: a service manager restarts a process, a machine has to boot.
//
// One thread; every process it starts (and what they leave behind) is its descendant: it is a
// subreaper.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "controller/cli/registry.h"

namespace everstep::cli {

inline constexpr std::chrono::milliseconds kNodeReturn{5'000};

// Until SIGTERM or SIGINT. Returns the exit code of the process.
int Supervise(const std::string& state_dir, const Environment& environment);

// Starts Supervise (as `PROGRAMS/everstep cluster supervise STATE`) in a session of its own, child
// of init: it outlives this process and its terminal. Returns when it runs.
Outcome StartSupervisor(const std::string& programs, const std::string& state_dir);

// How a part is held down.
struct Hold {
  bool ever = false;
  std::int64_t until_ms = 0;  // wall clock, milliseconds since the epoch
};
Outcome WriteHold(const std::string& part_dir, const Hold& hold);
void RemoveHold(const std::string& part_dir);
// Empty: not held (an expired one is none).
std::optional<Hold> ReadHold(const std::string& part_dir);
std::int64_t WallMilliseconds();

}  // namespace everstep::cli
