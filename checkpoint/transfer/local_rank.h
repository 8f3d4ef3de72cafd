// One local rank of an activated generation: its arena, what was said and sent of it. Owned by the
// service; shared with the tasks that push and restore it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/core/range_plan.h"
#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// What goes to one of the rank's peers. The rank's mutex guards the flags; the rest is the one
// push task's that runs for the peer.
struct PeerPush {
  std::string address;  // host:port; fixed from the start
  bool queued = false;
  bool running = false;
  bool again = false;             // something came while it ran
  std::uint64_t has_content = 0;  // SlotView::content that the peer verified; under the mutex

  Arena sending;  // the rank's memory, mapped
  std::chrono::milliseconds backoff{0};
  std::uint64_t gave_up_content = 0;  // this content cannot be sent
  std::uint64_t ahead = 0;            // capture of which chunks were sent as it was written
  int corrupt = 0;                    // attempts in a row that arrived with a wrong CRC
  bool troubled = false;              // said once a streak
};

struct LocalRank {
  LocalRank() = default;
  LocalRank(const LocalRank&) = delete;
  LocalRank& operator=(const LocalRank&) = delete;
  ~LocalRank() {
    if (eventfd >= 0) close(eventfd);
  }

  // Fixed from the start.
  JobId job;
  Rank rank = 0;
  Generation generation = 0;
  RestorePart restore;
  Arena arena;  // looked at by several threads; nobody maps its slots through this object
  std::vector<PeerPush> peers;  // as many as the plan names; elements do not move
  int eventfd = -1;

  std::atomic<bool> cancel{false};    // the generation is over: tasks end soon
  std::atomic<bool> restored{false};  // captures may be pushed

  // The watch thread's.
  std::uint64_t seen_content = 0;  // SlotView::content
  Step seen_step = kNoStep;
  std::uint64_t seen_capture[kSlots] = {};  // CaptureUnderWay::id

  // Of a restore by ranges. The task that brought the catalog sets them, `asked_seq` last; the
  // watch thread takes `asked_seq` when the trainer's request is there, and the task that it starts
  // reads.
  std::uint32_t asked_slot = 0;
  std::vector<ShardTier> tiers;
  std::atomic<std::uint64_t> asked_seq{0};  // of the catalog; 0: nothing is asked

  // Short. Whoever says something of this generation in the arena's header does it under the mutex,
  // and only while nobody has given it up: the words are the next generation's then.
  void GiveUp() {
    std::lock_guard<std::mutex> lock(mutex);
    cancel = true;
  }
  mutable std::mutex mutex;  // guards the rest
  int pushing[kSlots] = {};  // peers that the slot's content is on its way to
};
using LocalPtr = std::shared_ptr<LocalRank>;

}  // namespace everstep::checkpoint
