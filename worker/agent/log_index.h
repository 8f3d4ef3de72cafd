// Where the newest output of each job on this node lies: NODE_DIR/jobs/JOB/last. So that `everstep
// logs` finds a failed job's files after the job itself was forgotten.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::agent {

struct LogIndex {
  std::string root;  // JobLogRoot of the job
  Generation generation = 0;
  std::vector<std::pair<std::int32_t, Rank>> workers;  // local rank, rank
};

// REQUIRES: IsSafeName(job), both. Best effort: a disk that is full has said so elsewhere.
void WriteLogIndex(const std::string& node_dir, const JobId& job, const LogIndex& index);
// Generation 0: there is none, or it is damaged.
LogIndex ReadLogIndex(const std::string& node_dir, const JobId& job);

// Removes the directories of the jobs whose output is oldest, beyond `keep`; `running` stays.
// Returns how many went. A node that serves short jobs for months must not fill its disk.
std::size_t PruneJobs(const std::string& node_dir, const std::vector<JobId>& running,
                      std::size_t keep);

}  // namespace everstep::agent
