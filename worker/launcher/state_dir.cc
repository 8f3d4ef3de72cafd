#include "worker/launcher/state_dir.h"

#include <fcntl.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include <fmt/format.h>

#include "proto/base/errno_text.h"
#include "proto/base/file_lock.h"
#include "proto/base/whole_file.h"
#include "worker/launcher/process.h"

namespace everstep::launcher {
namespace fs = std::filesystem;
namespace {

// The longest path that a unix socket takes, without its final zero.
constexpr std::size_t kMaxSocketPath = sizeof(sockaddr_un::sun_path) - 1;

}  // namespace

StateDir::~StateDir() {
  if (lock_ >= 0) ::close(lock_);
}

std::string StateDir::Open(const std::string& wanted, const std::string& node,
                           const Environment& environment, const std::string& random) {
  node_ = node;
  temporary_ = wanted.empty();
  std::error_code error;
  if (temporary_) {
    const auto found = environment.find("TMPDIR");
    const std::string base =
        found == environment.end() || found->second.empty() ? "/tmp" : found->second;
    path_ = fmt::format("{}/everstep-{}", base, random);
  } else {
    path_ = fs::absolute(wanted, error).lexically_normal().string();
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  }
  const std::string socket = node_dir() + "/keeper.sock";
  if (socket.size() > kMaxSocketPath) {
    return fmt::format(
        "everstep-run: the socket {} has {} bytes, a unix socket takes {}; name a shorter "
        "directory with "
        "--state-dir",
        socket, socket.size(), kMaxSocketPath);
  }
  const auto refused = [this](const char* what, const std::string& why) {
    return fmt::format(
        "everstep-run: cannot {} the state directory {}: {}; name one that can be written with "
        "--state-dir",
        what, path_, why);
  };
  fs::create_directories(path_, error);
  if (error) return refused("make", error.message());
  if (temporary_) fs::permissions(path_, fs::perms::owner_all, error);
  lock_ = ::open((path_ + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0) return refused("write", ErrnoText(errno));
  if (!LockFile(lock_, kLockPatience)) {
    return fmt::format(
        "everstep-run: the state directory {} is in use by another run; give each its own "
        "--state-dir",
        path_);
  }
  const bool marked = fs::exists(path_ + "/run", error);
  if (!marked && fs::exists(controller(), error)) {
    return fmt::format(
        "everstep-run: {} is the state directory of a cluster; name another with --state-dir, or "
        "run on "
        "that cluster with --controller",
        path_);
  }
  // A run that was cut off left records and sockets of processes that are gone.
  fs::remove_all(controller(), error);
  fs::remove_all(node_dir(), error);
  if (const int wrong = WriteWhole(path_ + "/run", fmt::format("{}\n", ::getpid())); wrong != 0) {
    return refused("write", ErrnoText(wrong));
  }
  for (const std::string& dir : {controller(), node_dir()}) {
    fs::create_directories(dir, error);
    if (error) return refused("write", error.message());
  }
  opened_ = true;
  return {};
}

void StateDir::CleanButLogs() {
  if (!opened_) return;
  std::error_code error;
  fs::remove_all(controller() + "/db", error);
  for (const char* name : {"keeper.sock", "keeper.sock.lock", "agent.pid", "keeper.pid",
                           "controller", "command", "python"}) {
    fs::remove_all(node_dir() + "/" + name, error);
  }
  for (const char* name : {"address", "pid"}) fs::remove(controller() + "/" + name, error);
}

void StateDir::Clean() {
  if (!opened_) return;
  if (!temporary_) {
    CleanButLogs();
    return;
  }
  std::error_code error;
  fs::remove_all(path_, error);
}

}  // namespace everstep::launcher
