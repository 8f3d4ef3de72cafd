#include "checkpoint/store/memory_limit.h"

#include <fmt/format.h>

#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>

namespace everstep::checkpoint {
namespace {

// "key value ..." lines; 0 when the key is not there.
std::uint64_t LineValue(const std::string& file, const std::string& key, bool* found) {
  std::ifstream in(file);
  std::string word;
  std::uint64_t value = 0;
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream fields(line);
    if (fields >> word >> value && word == key) {
      *found = true;
      return value;
    }
  }
  *found = false;
  return 0;
}

// False: no number there ("max", or no such file).
bool Number(const std::string& file, std::uint64_t* value) {
  std::ifstream in(file);
  return static_cast<bool>(in >> *value);
}

std::string ControlGroup() {  // "/user.slice/x", v2 only
  std::ifstream in("/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  }
  return {};
}

}  // namespace

MemoryLimit AvailableMemory() {
  MemoryLimit limit{static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()),
                    "this machine (unknown)"};
  bool found = false;
  const std::uint64_t kib = LineValue("/proc/meminfo", "MemAvailable:", &found);
  if (found) limit = {kib * 1024, "MemAvailable of this machine"};
  std::string group = ControlGroup();
  while (!group.empty()) {
    const std::string folder = "/sys/fs/cgroup" + (group == "/" ? "" : group);
    std::uint64_t max = 0, used = 0;
    if (Number(folder + "/memory.max", &max) && Number(folder + "/memory.current", &used)) {
      const std::uint64_t cache = LineValue(folder + "/memory.stat", "inactive_file", &found);
      used -= std::min(used, cache);
      const std::uint64_t left = max > used ? max - used : 0;
      if (left < limit.available_bytes) {
        limit = {left, fmt::format("control group {} (memory.max {})", group, HumanBytes(max))};
      }
    }
    if (group == "/") break;
    const auto slash = group.rfind('/');
    group = slash == 0 || slash == std::string::npos ? "/" : group.substr(0, slash);
  }
  return limit;
}

Outcome CheckMemory(std::uint64_t bytes, const std::string& who) {
  const MemoryLimit limit = AvailableMemory();
  if (bytes <= limit.available_bytes) return Done{};
  return Error{ErrorCode::kNoMemory,
               fmt::format("{}: needs {} of memory, but {} has {} left; checkpoint less state, use "
                           "fewer workers a node, or give the job more memory",
                           who, HumanBytes(bytes), limit.what, HumanBytes(limit.available_bytes))};
}

std::string HumanBytes(std::uint64_t bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, units[unit]);
}

const char* ErrorCodeName(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalid: return "invalid";
    case ErrorCode::kNotFound: return "not_found";
    case ErrorCode::kNoMemory: return "no_memory";
    case ErrorCode::kCorrupt: return "corrupt";
    case ErrorCode::kStale: return "stale";
    case ErrorCode::kUnavailable: return "unavailable";
    case ErrorCode::kTimedOut: return "timed_out";
    case ErrorCode::kRefused: return "refused";
    case ErrorCode::kInternal: return "internal";
  }
  return "unknown";
}

}  // namespace everstep::checkpoint
