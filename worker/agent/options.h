// The command line of everstep-agent.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/log.h"
#include "proto/base/time.h"

namespace everstep::agent {

struct AgentOptions {
  NodeId node;
  std::string state_dir;
  std::string node_dir;                  // STATE/nodes/NODE, absolute
  std::string keeper_socket;             // NODE_DIR/keeper.sock
  std::string keeper_program;            // empty: everstep-keeper beside this program
  std::vector<std::string> controllers;  // host:port; empty: read from NODE_DIR/controller alone
  std::string address;  // by which other nodes reach this one; empty: the route's to the controller
  std::uint32_t slots = 0;  // 0: no limit
  std::map<std::string, std::string> labels;
  std::uint32_t data_port = 0;         // 0: any
  std::uint32_t ckpt_streams = 2;      // connections for one slot at most
  std::string ckpt_gap_trace;          // file; empty: none
  double scrub_mib_per_s = 64;         // checkpoint memory is looked over so fast at most; 0: never
  Duration scrub_every = Seconds(60);  // ... and each copy once in this time
  std::string log_dir;  // workers' logs, when the submitter named none; empty: NODE_DIR/jobs
  LogOptions log;
  std::string local_command;  // a file with this node's own command line; empty: the job's
  int lifeline = -1;          // end of file on it ends the node
  Duration leave_timeout = Seconds(2);  // SIGTERM: how long the controller may move workers away
  Duration stop_grace = Seconds(5);     // then SIGTERM to the workers, and SIGKILL after this
};

enum class ParseOutcome { kRun, kExitOk, kExitUsage };

// Prints help, the version or an error itself (kExitOk, kExitUsage: exit 0, 2).
ParseOutcome ParseOptions(int argc, const char* const* argv, AgentOptions* options);

// What is wrong with them beyond the command line's grammar; empty: nothing. Pure.
std::string CheckOptions(const AgentOptions& options);

}  // namespace everstep::agent
