// Where a worker's output lies: ROOT/attempt_(GENERATION -
// 1)/LOCAL_RANK/{stdout.log,stderr.log,error.json}. ROOT is STATE/nodes/NAME/jobs/JOB, or
// LOG_DIR/JOB_NODE when the submitter named a log directory (many nodes may share it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "proto/base/ids.h"

namespace everstep::agent {

struct LogPaths {
  std::string directory;
  std::string stdout_log;
  std::string stderr_log;
  std::string error_json;
};

// REQUIRES: IsSafeName(job) and IsSafeName(node).
std::string JobLogRoot(const std::string& node_dir, const std::string& log_dir, const JobId& job,
                       const NodeId& node);
// REQUIRES: generation > 0.
LogPaths WorkerLogPaths(const std::string& root, Generation generation, std::int32_t local_rank);

// Makes the directory and removes an error file of an earlier try. False: *error says what and
// where.
bool MakeLogDirectory(const LogPaths& paths, std::string* error);

// Removes the oldest attempt directories beyond `keep`. A generation of a crash loop leaves one
// each, and a disk must not fill with them. Returns how many went.
std::size_t PruneAttempts(const std::string& root, std::size_t keep);

}  // namespace everstep::agent
