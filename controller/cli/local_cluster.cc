#include "controller/cli/local_cluster.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <utility>

#include <fmt/format.h>

#include "controller/cli/proc.h"
#include "controller/cli/supervisor.h"
#include "proto/base/errno_text.h"

namespace everstep::cli {
namespace fs = std::filesystem;
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr std::size_t kSocketPathLimit = 107;  // sun_path without its zero
constexpr milliseconds kSweepLimit{10'000};

CliError Bad(std::string message, std::string hint) {
  return {ExitCode::kUsage, "INVALID_ARGUMENT", std::move(message), std::move(hint)};
}

Outcome CheckPlan(const ClusterPlan& plan, const std::string& state_dir) {
  const bool name_ok = !plan.name.empty() && plan.name.size() <= 40 &&
                       std::all_of(plan.name.begin(), plan.name.end(), [](unsigned char c) {
                         return std::isalnum(c) != 0 || c == '-' || c == '_';
                       });
  if (!name_ok) {
    return Bad(fmt::format("--name cannot be \"{}\"", plan.name),
               "1 to 40 letters, digits, - and _");
  }
  std::size_t longest = 0;
  for (const std::string& node : plan.nodes) longest = std::max(longest, node.size());
  const std::size_t length =
      state_dir.size() + std::strlen("/nodes/") + longest + std::strlen("/keeper.sock");
  if (length > kSocketPathLimit) {
    return Bad(fmt::format("the state directory {} is too long: a socket in it would have {} "
                           "bytes in its path, the limit is {}",
                           state_dir, length, kSocketPathLimit),
               "choose a shorter one: --state-dir /tmp/c");
  }
  for (const char* program :
       {"everstep", "everstep-controller", "everstep-agent", "everstep-keeper"}) {
    const std::string path = plan.programs + "/" + program;
    if (::access(path.c_str(), X_OK) == 0) continue;
    return CliError{ExitCode::kFailed, "NOT_FOUND",
                    fmt::format("cannot start {}: {}", path, ErrnoText(errno)),
                    fmt::format("{} belongs beside everstep; is the installation whole?", program)};
  }
  return Done{};
}

CliError NoDirectory(const std::string& state_dir, const std::string& why) {
  return {ExitCode::kFailed, "FAILED", fmt::format("cannot make {}: {}", state_dir, why),
          "choose a directory that you may write: --state-dir DIR"};
}

Outcome MakeDirectory(const std::string& state_dir) {
  std::error_code error;
  if (fs::exists(state_dir, error)) {
    if (!fs::is_directory(state_dir, error)) return NoDirectory(state_dir, "it is a file");
    if (!fs::is_empty(state_dir, error) || error) {
      return CliError{ExitCode::kConflict, "ALREADY_EXISTS",
                      fmt::format("the state directory {} is not empty", state_dir),
                      "choose another with --state-dir; everstep cluster list shows whose it may "
                      "be"};
    }
    if (::access(state_dir.c_str(), W_OK) != 0) return NoDirectory(state_dir, ErrnoText(errno));
    return Done{};
  }
  fs::create_directories(fs::path(state_dir).parent_path(), error);
  if (error) return NoDirectory(state_dir, error.message());
  if (::mkdir(state_dir.c_str(), 0700) != 0) return NoDirectory(state_dir, ErrnoText(errno));
  return Done{};
}

// Ours by name; true: nothing else was there.
bool RemoveFiles(const std::string& state_dir) {
  std::error_code ignored;
  for (const char* name :
       {"cluster", "ready", "failure", "supervisor.pid", "supervisor.log", "controller", "nodes"}) {
    fs::remove_all(state_dir + "/" + name, ignored);
  }
  for (const auto& entry : fs::directory_iterator(state_dir, ignored)) {
    const std::string name = entry.path().filename();
    if (name.size() > 4 && name.compare(name.size() - 4, 4, ".new") == 0) {
      fs::remove(entry.path(), ignored);  // of a write that was cut short
    }
  }
  return ::rmdir(state_dir.c_str()) == 0 || errno == ENOENT;
}

}  // namespace

std::string CleanPath(const std::string& path) {
  std::error_code ignored;
  std::string clean = fs::absolute(path, ignored).lexically_normal();
  while (clean.size() > 1 && clean.back() == '/') clean.pop_back();
  return clean;
}

Outcome LayOut(const Registry& registry, const ClusterPlan& plan, const std::string& state_dir) {
  if (Outcome good = CheckPlan(plan, state_dir); !good.ok()) return good;
  if (Outcome taken = registry.Add(plan.name, state_dir); !taken.ok()) return taken;
  if (Outcome made = MakeDirectory(state_dir); !made.ok()) {
    registry.Remove(plan.name);
    return made;
  }
  Outcome laid = WritePlan(state_dir, plan);
  if (laid.ok()) laid = StartSupervisor(plan.programs, state_dir);
  if (!laid.ok()) {
    RemoveFiles(state_dir);
    registry.Remove(plan.name);
  }
  return laid;
}

TakenDown TakeDown(const Registry& registry, const ClusterInfo& cluster, bool keep_files,
                   milliseconds limit) {
  TakenDown done;
  if (Alive(cluster.supervisor)) {
    SendSignal(cluster.supervisor, SIGTERM);
    SendSignal(cluster.supervisor, SIGCONT);
    WaitGone({cluster.supervisor}, limit);
  }
  const auto deadline = steady_clock::now() + kSweepLimit;
  for (;;) {
    const std::vector<ProcessFacts> left = ProcessesOf(cluster.state_dir);
    if (left.empty()) break;
    std::vector<ProcessId> ids;
    done.survivors.clear();
    for (const ProcessFacts& process : left) {
      ids.push_back(process.id);
      done.survivors.push_back(fmt::format("pid {} ({})", process.id.pid, process.program));
    }
    if (steady_clock::now() >= deadline) break;
    // The supervisor first, or it starts again what dies.
    for (const bool supervisor : {true, false}) {
      for (const ProcessFacts& process : left) {
        if ((process.program == "everstep") == supervisor) {
          done.killed += SendSignal(process.id, SIGKILL);
        }
      }
    }
    if (WaitGone(ids, milliseconds(1'000))) done.survivors.clear();
  }
  if (!keep_files) done.files_left = !RemoveFiles(cluster.state_dir);
  if (done.survivors.empty()) registry.Remove(cluster.name);
  return done;
}

}  // namespace everstep::cli
