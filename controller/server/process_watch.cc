#include "controller/server/process_watch.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <utility>

#include <fmt/format.h>

#include "proto/base/process_stat.h"

namespace everstep::controller {
namespace {

constexpr std::uint64_t kWakeToken = ~0ULL;

// 0: there is no such process (any more), or it cannot be read.
std::uint64_t StartTime(std::int32_t pid) {
  const auto stat = ReadProcessStat(pid);
  return stat && !stat->dead() ? stat->start_time : 0;
}

bool Ended(int pidfd) {
  pollfd p{pidfd, POLLIN, 0};
  return poll(&p, 1, 0) > 0;
}

}  // namespace

Here ReadHere() {
  Here here;
  std::ifstream in("/proc/sys/kernel/random/boot_id");
  std::getline(in, here.boot_id);
  struct stat ns {};
  if (stat("/proc/self/ns/pid", &ns) == 0) here.pid_namespace = ns.st_ino;
  return here;
}

ProcessWatch::ProcessWatch(std::function<void(std::uint64_t)> on_dead)
    : on_dead_(std::move(on_dead)) {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeToken}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event);
  thread_ = std::thread([this] { Run(); });
}

ProcessWatch::~ProcessWatch() {
  const std::uint64_t one = 1;
  (void)!write(wake_, &one, sizeof(one));
  thread_.join();
  for (const auto& [token, fd] : watched_) close(fd);
  close(wake_);
  close(epoll_);
}

void ProcessWatch::Watch(std::uint64_t token, std::int32_t pid, std::uint64_t start_time) {
  const int fd = pid > 0 ? static_cast<int>(syscall(SYS_pidfd_open, pid, 0)) : -1;
  if (fd < 0) {
    // No descriptor is free, or a sandbox forbids it: that proves nothing, silence has to.
    if (pid > 0 && errno == ESRCH) on_dead_(token);
    return;
  }
  // Opened first, compared second: a pid that was given to another process shows another start
  // time. 0: it has ended, or cannot be looked at.
  const std::uint64_t started = StartTime(pid);
  if (started == 0 ? Ended(fd) : started != start_time) {
    close(fd);
    on_dead_(token);
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (!watched_.emplace(token, fd).second) {
    close(fd);
    return;
  }
  epoll_event event{.events = EPOLLIN, .data = {.u64 = token}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
}

void ProcessWatch::Forget(std::uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = watched_.find(token);
  if (it == watched_.end()) return;
  close(it->second);  // leaves the epoll set by itself
  watched_.erase(it);
}

void ProcessWatch::Run() {
  while (true) {
    epoll_event events[16];
    const int n = epoll_wait(epoll_, events, 16, -1);
    for (int i = 0; i < n; ++i) {
      const std::uint64_t token = events[i].data.u64;
      if (token == kWakeToken) return;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto it = watched_.find(token);
        if (it == watched_.end()) continue;
        close(it->second);
        watched_.erase(it);
      }
      on_dead_(token);
    }
  }
}

}  // namespace everstep::controller
