// A keeper's arenas, held in the process of a test or benchmark: real memfds, no keeper.
// Thread-safe. Owns the descriptors; hands out duplicates.
#pragma once

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

class MemoryHost final : public ArenaHost {
 public:
  ~MemoryHost() override {
    for (auto& [key, fds] : arenas_) {
      close(fds.memfd);
      close(fds.eventfd);
    }
  }
  Result<std::vector<ArenaName>> List(const JobId& job) override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<ArenaName> out;
    for (auto& [key, fds] : arenas_) {
      if (key.first == job) out.push_back(key.second);
    }
    return out;
  }
  Result<ArenaFds> Open(const JobId& job, const ArenaName& name,
                        std::uint64_t slot_bytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = arenas_.find({job, name});
    if (it == arenas_.end()) {
      if (slot_bytes == 0) return Error{ErrorCode::kNotFound, "no such arena"};
      if (full_) return Error{ErrorCode::kNoMemory, "this node's memory is full"};
      auto fd = CreateArenaFd({job, name.rank, name.replica, slot_bytes});
      if (!fd.ok()) return fd.error();
      it = arenas_
               .emplace(std::pair(job, name),
                        ArenaFds{fd.value(), eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)})
               .first;
    }
    return ArenaFds{fcntl(it->second.memfd, F_DUPFD_CLOEXEC, 0),
                    fcntl(it->second.eventfd, F_DUPFD_CLOEXEC, 0)};
  }
  void Drop(const JobId& job, const ArenaName& name) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = arenas_.find({job, name});
    if (it == arenas_.end()) return;
    close(it->second.memfd);
    close(it->second.eventfd);
    arenas_.erase(it);
  }
  // No new arena can be had.
  void SetFull(bool full) {
    std::lock_guard<std::mutex> lock(mutex_);
    full_ = full;
  }

 private:
  std::mutex mutex_;
  bool full_ = false;
  std::map<std::pair<JobId, ArenaName>, ArenaFds> arenas_;
};

}  // namespace everstep::checkpoint
