// What other threads have for the main one: the newest status of the job, lines of remote workers,
// and the news that the controller is out of reach. A descriptor tells poll().
//
// Thread-safe. Statuses overwrite each other (each is whole); lines are bounded, their writer
// waits.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "admin.pb.h"

namespace everstep::launcher {

class Inbox {
 public:
  static constexpr std::size_t kMaxLines = 1024;  // of at most 64 KiB

  struct Content {
    std::optional<v1::JobStatus> status;
    std::vector<v1::JobLogLines> lines;
    std::string lost;  // why the controller is out of reach, when it is
  };

  Inbox() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Inbox() { ::close(wake_); }
  Inbox(const Inbox&) = delete;
  Inbox& operator=(const Inbox&) = delete;

  int descriptor() const { return wake_; }

  void PutStatus(v1::JobStatus status) {
    std::lock_guard<std::mutex> lock(mutex_);
    content_.status = std::move(status);
    content_.lost.clear();
    Wake();
  }
  void PutLost(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    content_.lost = why;
    Wake();
  }
  void PutLines(const v1::JobLogLines& lines) {
    std::unique_lock<std::mutex> lock(mutex_);
    room_.wait(lock, [this] { return closed_ || content_.lines.size() < kMaxLines; });
    if (closed_) return;
    content_.lines.push_back(lines);
    Wake();
  }
  Content Take() {
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t n = ::read(wake_, &count, sizeof(count));
    std::lock_guard<std::mutex> lock(mutex_);
    Content taken = std::exchange(content_, {});
    room_.notify_all();
    return taken;
  }
  // Something elsewhere wants the main thread.
  void Wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_, &one, sizeof(one));
  }
  // Writers no longer wait.
  void Close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    room_.notify_all();
  }

 private:
  const int wake_;
  std::mutex mutex_;
  std::condition_variable room_;
  Content content_;
  bool closed_ = false;
};

}  // namespace everstep::launcher
