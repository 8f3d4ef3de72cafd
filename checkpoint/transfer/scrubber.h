// Looks over the checkpoint memory of this node in idle time: every chunk of every finished slot,
// own and kept for peers, against its CRC. What it finds it tells; it changes nothing.
//
// It is the last in line: each chunk waits for its turn behind commit, repair and persist
// (Traffic), and all of them together are read no faster than bytes_per_s. A slot that its trainer
// overwrites while it is read proves nothing and is left; one content is looked at once in `every`.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

class Scrubber {
 public:
  struct Finding {
    JobId job;
    HeldShard shard;
    std::int64_t chunk = 0;  // the first bad one, or kTableDamaged
    std::string what;        // for the log
  };

  // `jobs`: whose arenas are looked at; `found`: on the scrubber's thread. All must outlive it.
  Scrubber(const ScrubOptions& options, ArenaHost* host, Traffic* traffic,
           std::function<std::vector<JobId>()> jobs, std::function<void(const Finding&)> found);
  ~Scrubber();  // as Stop()
  Scrubber(const Scrubber&) = delete;
  Scrubber& operator=(const Scrubber&) = delete;

  void Stop();
  // Thread-safe. `repaired` is not its own.
  std::uint64_t checked_bytes() const { return checked_bytes_; }
  std::uint64_t checked_slots() const { return checked_slots_; }

 private:
  using SlotKey = std::tuple<JobId, Rank, bool, std::uint32_t>;

  void Run();
  void Pass();
  // False: this pass is over, the node is stopping.
  bool CheckSlot(const JobId& job, const ArenaName& name, Arena* arena, std::uint32_t slot);
  bool Pause(std::chrono::nanoseconds time);  // false: stopping

  const ScrubOptions options_;
  ArenaHost* const host_;
  Traffic* const traffic_;
  const std::function<std::vector<JobId>()> jobs_;
  const std::function<void(const Finding&)> found_;

  std::atomic<std::uint64_t> checked_bytes_{0};
  std::atomic<std::uint64_t> checked_slots_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;

  // The thread's own: which content was looked at when.
  std::map<SlotKey, std::pair<std::uint64_t, std::chrono::steady_clock::time_point>> seen_;
};

}  // namespace everstep::checkpoint
