// What a worker process sees: torchrun's environment block, so that a script written for torchrun
// runs unchanged, and Everstep's own four variables. Pure functions.
//
// Source: torch/distributed/elastic/agent/server/local_elastic_agent.py (_start_workers) and run.py
// of PyTorch 2.x; docs/reference/environment.md is the table for users.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::agent {

using Environment = std::map<std::string, std::string>;

struct WorkerIdentity {
  Rank rank = 0;
  std::int32_t local_rank = 0;
  std::int32_t role_rank = 0;
  std::int32_t group_rank = 0;  // of the node
  std::uint32_t world_size = 1;
  std::uint32_t group_world_size = 1;  // nodes
  std::uint32_t local_world_size = 1;  // workers on this node
  std::string role = "default";
  std::string master_addr;
  std::uint32_t master_port = 0;
  std::uint32_t restart_count = 0;
  std::int32_t max_restarts = 0;
  std::string run_id;
  bool use_agent_store = true;  // false: rank 0 hosts the TCPStore on master_port
  bool virtual_local_rank = false;
  std::string signals_to_handle;  // empty: torchrun's default
  std::string error_file;
  JobId job;
  NodeId node;
  Generation generation = 0;
  std::string keeper_socket;
  std::size_t holders = 1;  // nodes that are to hold what this rank captures, its own among them
};

// `base` is the submitter's environment; the block wins over it. What the submitter may choose
// (OMP_NUM_THREADS, TORCH_NCCL_ASYNC_ERROR_HANDLING) is kept where it is set.
//
// With virtual_local_rank each worker sees its one device as device 0; a local rank beyond the list
// in CUDA_VISIBLE_DEVICES gets an empty list (torchrun refuses there; the agent checks first with
// VisibleDevice).
// The part that is the same for all workers of a job; `local_world`: workers on one node.
Environment JobEnvironment(const Environment& base, std::uint32_t local_world);
Environment WorkerEnvironment(const Environment& base, const WorkerIdentity& identity);

// Which device of `visible` (CUDA_VISIBLE_DEVICES; null: unrestricted) local rank n is given under
// virtual_local_rank; empty: there is none.
std::string VisibleDevice(const std::string* visible, std::int32_t local_rank);

// Replaces ${local_rank} and $local_rank, and $$ by $ (Python's string.Template.safe_substitute);
// other variables stay as they are.
std::string ExpandLocalRank(std::string_view arg, std::int32_t local_rank);
std::vector<std::string> ExpandLocalRank(const std::vector<std::string>& args,
                                         std::int32_t local_rank);

}  // namespace everstep::agent
