#include "worker/agent/log_index.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "proto/base/check.h"
#include "proto/base/names.h"
#include "proto/base/whole_file.h"
#include "worker/agent/log_layout.h"
#include "worker/agent/node_dir.h"

namespace everstep::agent {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxWorkers = 4096;  // of one node; more is damage

std::string IndexPath(const std::string& node_dir, const JobId& job) {
  EVERSTEP_CHECK(IsSafeName(job), "a job's name is no file name");
  return fmt::format("{}/jobs/{}/last", node_dir, job);
}

}  // namespace

void WriteLogIndex(const std::string& node_dir, const JobId& job, const LogIndex& index) {
  const std::string path = IndexPath(node_dir, job);
  std::error_code ec;
  fs::create_directories(fs::path(path).parent_path(), ec);
  std::string text = fmt::format("{}\n{}\n", index.root, index.generation);
  for (const auto& [local_rank, rank] : index.workers)
    text += fmt::format("{} {}\n", local_rank, rank);
  WriteWhole(path, text);  // without it only the logs of an ended job are not found
}

LogIndex ReadLogIndex(const std::string& node_dir, const JobId& job) {
  LogIndex index;
  std::ifstream file(IndexPath(node_dir, job));
  if (!std::getline(file, index.root) || !(file >> index.generation) || index.root.empty())
    return {};
  std::int32_t local_rank = 0;
  Rank rank = 0;
  while (index.workers.size() < kMaxWorkers && file >> local_rank >> rank) {
    if (local_rank >= 0 && rank >= 0) index.workers.emplace_back(local_rank, rank);
  }
  return index;
}

std::size_t PruneJobs(const std::string& node_dir, const std::vector<JobId>& running,
                      std::size_t keep) {
  std::vector<std::pair<fs::file_time_type, fs::path>> jobs;
  std::error_code ec;
  for (fs::directory_iterator it(node_dir + "/jobs", ec), end; !ec && it != end; it.increment(ec)) {
    const std::string name = it->path().filename().string();
    if (std::find(running.begin(), running.end(), name) != running.end()) continue;
    std::error_code no_time;
    const auto time = fs::last_write_time(it->path() / "last", no_time);
    jobs.emplace_back(no_time ? fs::file_time_type::min() : time, it->path());
  }
  if (jobs.size() <= keep) return 0;
  std::sort(jobs.begin(), jobs.end());
  std::size_t removed = 0;
  for (std::size_t i = 0; i + keep < jobs.size(); ++i) {
    fs::remove_all(jobs[i].second, ec);
    if (!ec) ++removed;
  }
  return removed;
}

}  // namespace everstep::agent
