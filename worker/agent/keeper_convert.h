// The only place of the agent that knows both the keeper's protocol and the core's values. Pure.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "agent.pb.h"
#include "keeper.pb.h"
#include "worker/agent/core/effect.h"
#include "worker/agent/core/event.h"
#include "worker/agent/log_layout.h"

namespace everstep::agent {

// --- what the agent keeps in the keeper's memory ---

inline constexpr const char* kIncarnationKey = "incarnation";
std::string PreparedKey(const JobId& job);
std::string ActivatedKey(const JobId& job);
everstep::v1::KeeperRemember Remember(const RememberIncarnation& e);
everstep::v1::KeeperRemember Remember(const RememberPrepared& e);
// Without the command: RememberPrepared holds it already (up to 1 MiB of environment).
everstep::v1::KeeperRemember Remember(const RememberActivated& e);

// What an agent that starts finds at its keeper. Exits carry no error file's content yet
// (FillError, error_file.h); `fresh` is the caller's to set.
struct Adopted {
  KeeperAttached attached;
  std::map<JobId, Activate> activates;  // of jobs whose newest generation is activated
  std::map<JobId, std::pair<Generation, std::string>> begun;  // newest prepared, and its data key
};
Adopted Adopt(const everstep::v1::KeeperState& state);

ExitInfo FromKeeper(const everstep::v1::KeeperExited& exited);

// --- requests ---

struct NodeIdentity {
  NodeId node;
  std::string node_dir;
  std::string keeper_socket;
};

struct WorkerSpawn {
  everstep::v1::KeeperSpawn request;
  LogPaths paths;
};
// One spawn for each worker of this node's plan, by local rank. `store_port`: of the store this
// node hosts for the generation, 0: it hosts none. An empty result with *error set: the command
// cannot be run here (who, what, what to do).
std::vector<WorkerSpawn> BuildSpawns(const Activate& activate, const everstep::v1::Command& command,
                                     const NodeIdentity& node, std::uint32_t store_port,
                                     std::string* error);

// With the environment that its workers get, but for what differs between ranks and generations: a
// fork server is of use only when what Python reads at import is the same. `local_world`: workers a
// node.
everstep::v1::KeeperForkServer BuildForkServer(const JobId& job,
                                               const everstep::v1::Command& command,
                                               std::uint32_t local_world);
everstep::v1::KeeperStoreHost BuildStoreHost(const JobId& job, Generation generation,
                                             const std::string& bind_address,
                                             const everstep::v1::Command& command);

}  // namespace everstep::agent
