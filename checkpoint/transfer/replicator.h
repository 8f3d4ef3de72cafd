// Keeps on each local rank's peers what the rank captured last: which content is to go to whom, one
// attempt after the other, and the marks in the arena that keep a trainer off a slot on its way.
// The conversations themselves: push_slot.cc, push_ahead.cc. Owned by the transfer service;
// thread-safe.
//
//   QueuePush --> pool --> ToPush: the newest capture --> PushSlot --> again, or it is replicated
//                     \--> ToFollow: a capture under way --> PushAhead
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <optional>

#include "checkpoint/store/capture_word.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/upkeep.h"

namespace everstep::checkpoint {

class Replicator {
 public:
  // All must outlive it; `pool` runs the attempts and is stopped first.
  Replicator(const TransferOptions& options, Listener* listener, const JobTable* jobs,
             Traffic* traffic, TaskPool* pool, Upkeep* upkeep)
      : options_(options),
        listener_(listener),
        jobs_(jobs),
        traffic_(traffic),
        pool_(pool),
        upkeep_(upkeep) {}

  // Something is new there: to all of its peers, now.
  void QueuePush(const LocalPtr& local);
  // The agent ends, its ranks go on: from here on what was pushed is marked all the same when a
  // rank is given up.
  void Stop() { stopping_ = true; }

 private:
  using milliseconds = std::chrono::milliseconds;

  void QueuePush(const LocalPtr& local, std::size_t peer, milliseconds delay);
  void Run(const LocalPtr& local, std::size_t peer);
  std::optional<milliseconds> Push(const LocalPtr& local, PeerPush* peer);
  std::optional<milliseconds> After(const LocalPtr& local, PeerPush* peer, const SlotView& view,
                                    const Error& error);
  static std::optional<SlotView> ToPush(const LocalRank& local, const PeerPush& peer);
  std::optional<CaptureUnderWay> ToFollow(const LocalRank& local, const PeerPush& peer) const;
  void Follow(const LocalPtr& local, PeerPush* peer, const PeerTask& task,
              const CaptureUnderWay& capture);
  static void PushBegins(LocalRank* local, const SlotView& view);
  void PushEnds(LocalRank* local, PeerPush* peer, const SlotView& view, bool done);

  const TransferOptions options_;
  Listener* const listener_;
  const JobTable* const jobs_;
  Traffic* const traffic_;
  TaskPool* const pool_;
  Upkeep* const upkeep_;
  std::atomic<int> following_{0};  // pool threads that follow captures
  std::atomic<bool> stopping_{false};
};

}  // namespace everstep::checkpoint
