// One local rank of an activated generation: its arena, what was said and sent of it. Owned by the
// service; shared with the tasks that push and restore it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

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
  std::string peer;  // host:port; empty: none
  RestorePart restore;
  Arena arena;    // looked at by several threads; nobody maps its slots through this object
  Arena sending;  // the same memory, mapped; the push task's alone
  int eventfd = -1;

  std::atomic<bool> cancel{false};    // the generation is over: tasks end soon
  std::atomic<bool> restored{false};  // captures may be pushed

  // The watch thread's.
  std::uint64_t seen_content = 0;  // SlotView::content
  Step seen_step = kNoStep;

  // The service's mutex guards the rest.
  bool push_queued = false;
  bool push_running = false;
  bool push_again = false;  // something came while it ran

  // The one push task's.
  std::chrono::milliseconds backoff{0};
  std::uint64_t gave_up_content = 0;  // this content cannot be sent
  int corrupt = 0;                    // attempts in a row that arrived with a wrong CRC
  bool troubled = false;              // said once a streak
};

}  // namespace everstep::checkpoint
