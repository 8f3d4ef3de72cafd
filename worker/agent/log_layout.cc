#include "worker/agent/log_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "proto/base/check.h"
#include "proto/base/names.h"

namespace everstep::agent {
namespace fs = std::filesystem;

std::string JobLogRoot(const std::string& node_dir, const std::string& log_dir, const JobId& job,
                       const NodeId& node) {
  EVERSTEP_CHECK(IsSafeName(job) && IsSafeName(node), "a job's or node's name is no file name");
  if (log_dir.empty()) return fmt::format("{}/jobs/{}", node_dir, job);
  return fmt::format("{}/{}_{}", log_dir, job, node);
}

LogPaths WorkerLogPaths(const std::string& root, Generation generation, std::int32_t local_rank) {
  LogPaths paths;
  // torchrun counts attempts from 0, generations count from 1.
  paths.directory = fmt::format("{}/attempt_{}/{}", root, generation - 1, local_rank);
  paths.stdout_log = paths.directory + "/stdout.log";
  paths.stderr_log = paths.directory + "/stderr.log";
  paths.error_json = paths.directory + "/error.json";
  return paths;
}

bool MakeLogDirectory(const LogPaths& paths, std::string* error) {
  std::error_code ec;
  fs::create_directories(paths.directory, ec);
  if (ec) {
    *error =
        fmt::format("cannot make the log directory {}: {}; free or name another with --log-dir",
                    paths.directory, ec.message());
    return false;
  }
  fs::remove(paths.error_json, ec);  // absent is fine; one that stays is overwritten by its writer
  return true;
}

std::size_t PruneAttempts(const std::string& root, std::size_t keep) {
  constexpr std::string_view kPrefix = "attempt_";
  std::vector<std::pair<Generation, fs::path>> attempts;
  std::error_code ec;
  for (fs::directory_iterator it(root, ec), end; !ec && it != end; it.increment(ec)) {
    const std::string name = it->path().filename().string();
    if (!name.starts_with(kPrefix)) continue;
    Generation generation = 0;
    const char* last = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kPrefix.size(), last, generation);
    if (parsed.ec == std::errc() && parsed.ptr == last)
      attempts.emplace_back(generation, it->path());
  }
  if (attempts.size() <= keep) return 0;
  std::sort(attempts.begin(), attempts.end());
  std::size_t removed = 0;
  for (std::size_t i = 0; i + keep < attempts.size(); ++i) {
    fs::remove_all(attempts[i].second, ec);
    if (!ec) ++removed;
  }
  return removed;
}

}  // namespace everstep::agent
