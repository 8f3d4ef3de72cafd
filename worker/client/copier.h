// The thread that copies a capture's bytes while the trainer computes. One per handle, started by
// the first overlapped capture, asleep between captures. Takes no lock of the trainer's language,
// blocks all signals, allocates nothing once its buffers have grown to the state's size.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "checkpoint/store/result.h"
#include "checkpoint/store/slot_writer.h"
#include "worker/client/everstep.h"

namespace everstep::client {

class Copier {
 public:
  // kInternal when the system gives no thread.
  static checkpoint::Result<std::unique_ptr<Copier>> Start();
  // Gives up what is under way, then ends the thread.
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Appends `late` (adopts pieces without data), aligned, to `writer` from the thread, and behind
  // it what `early` and `tail` hold now. Only `late`'s memory must stay as it is until Wait says
  // so. `offsets` (may be null): where each piece of late and early will lie. kNoMemory: nothing is
  // under way then. REQUIRES: nothing is under way; `writer` stays where it is and is not touched
  // until Wait has answered true.
  checkpoint::Outcome Copy(checkpoint::SlotWriter* writer, const everstep_piece* late,
                           std::uint32_t late_count, const everstep_piece* early,
                           std::uint32_t early_count, const void* tail, std::uint64_t tail_bytes,
                           std::uint64_t* offsets);

  // True: nothing is under way any more; outcome() tells how it ended. Any thread.
  bool Wait(std::chrono::milliseconds timeout);
  // True: the number of copies that have ended, given up ones too, is not `*count` any more; it is
  // put there. Any thread.
  bool Watch(std::uint64_t* count, std::chrono::milliseconds timeout);
  // Valid after Wait has answered true. kStale: it was given up.
  const checkpoint::Outcome& outcome() const { return outcome_; }
  // Returns when nothing is under way, in a few milliseconds; counts as an end for Watch even then.
  void GiveUp();

 private:
  Copier() = default;
  void Run();
  checkpoint::Outcome Work();

  pthread_t thread_{};
  bool started_ = false;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  bool busy_ = false;  // guarded by mutex_, as are the next two
  bool ending_ = false;
  std::uint64_t ended_ = 0;
  std::atomic<bool> give_up_{false};

  // Of the copy under way: the caller's until busy_ is set, the thread's until it is cleared.
  checkpoint::SlotWriter* writer_ = nullptr;
  std::vector<everstep_piece> late_;
  std::vector<unsigned char> staged_;
  checkpoint::Outcome outcome_{checkpoint::Done{}};
};

}  // namespace everstep::client
