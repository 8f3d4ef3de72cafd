// What a seed draws before the first event: the cluster, the jobs, how the world behaves.
#pragma once

#include <string>
#include <vector>

#include "controller/core/controller.h"
#include "tests/sim/kernel/fault.h"
#include "tests/sim/kernel/network.h"

namespace everstep::sim {

// A job and what its owner does with it.
struct SimJob {
  controller::JobSpec spec;
  bool checkpoints = true;  // false: the script knows nothing of checkpoints; no steps are reported
  bool sessions = false;    // its workers can be parked
  bool tells = false;       // its rank 0 tells the ledger
  bool tight = false;       // small budgets: it may fail, with a reason
  Duration cancel_at = {};  // 0: never
  bool again = false;       // handed in once more under its name when it has ended
};

struct WorldOptions {
  std::uint64_t seed = 0;
  std::uint32_t nodes = 4;
  controller::Options controller;
  NetworkOptions network;
  std::vector<SimJob> jobs;
  Step total_steps = 40;  // a script ends there with exit code 0
  Duration step_time = Milliseconds(300);
  bool replicated_layout = true;  // every rank's state is the same (data parallel)
  bool shares = false;            // ... and a rank captures its share of it; not with the above
  bool mixed = false;             // ... but rank 0, of some steps, its whole state
  bool peers_exit = false;        // a worker that loses a peer exits 1 (else it hangs)
  bool same_machine = false;      // the controller's shell sees dead keepers
  Duration fault_phase = Seconds(20);  // after it every fault is over, and jobs must end
  Duration settle = Seconds(400);      // ... within this: the bound on liveness
};

// The world a seed stands for. `bugs`: controller::SeededBug bits.
WorldOptions DrawWorld(std::uint64_t seed, std::uint32_t bugs);

// The faults a seed stands for, in order of time.
std::vector<Fault> DrawFaults(const WorldOptions& options);

// For people: the cluster and its jobs in two lines.
std::string Describe(const WorldOptions& options);

// Every kind a fault may have, for --help and for checking a list written by hand.
const std::vector<std::string>& FaultKinds();

}  // namespace everstep::sim
