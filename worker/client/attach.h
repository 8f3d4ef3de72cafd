// One request to the keeper: the descriptors of a rank's arena. Blocking, with a deadline.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "checkpoint/store/result.h"
#include "proto/base/ids.h"

namespace everstep::client {

struct Attached {
  int memfd = -1;    // owned by the receiver
  int eventfd = -1;  // likewise; ring after each capture
  std::uint64_t slot_bytes = 0;
};
// kUnavailable: no keeper there; kRefused: its words; kTimedOut.
checkpoint::Result<Attached> Attach(const std::string& keeper, const JobId& job, Rank rank,
                                    Generation generation, std::uint64_t slot_bytes,
                                    std::chrono::milliseconds timeout);

}  // namespace everstep::client
