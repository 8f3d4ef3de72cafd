// The dialling side: one slot to a peer, or one slot from a peer. One attempt each; the caller
// retries.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/siphash.h"
#include "checkpoint/transfer/socket.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

struct PeerLimits {
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds io_timeout{5000};      // no byte moved for so long
  std::uint64_t least_bytes_per_second = 1 << 20;  // a slower peer is given up at payload / this
};
SteadyTime DeadlineFor(const PeerLimits& limits, std::uint64_t bytes);

struct PeerTask {
  std::string address;  // host:port
  JobId job;
  SipKey key{};
  Generation generation = 0;  // the fence: newest known here
  Generation committed_generation = 0;
  Step committed_step = kNoStep;
  PeerLimits limits;
  const std::atomic<bool>* cancel = nullptr;  // set: the attempt ends soon, with kStale
};

// Done: the peer holds these bytes, verified. kStale: it knows a newer generation, or the slot was
// overwritten here; do not try again. kCorrupt: bytes changed on the way or in memory. kRefused:
// wrong key. Others: try again.
Outcome PushSlot(const PeerTask& task, const Arena& arena, const SlotView& view);

// What a fetch has got so far: a later attempt, at another source too, resumes there.
struct FetchProgress {
  std::uint64_t next_chunk = 0;
};
// `wanted`: rank, generation, step and world_size 0; crc_root as planned. `begin` makes the writer
// when the size is known. The slot is published on Done.
class FetchSink {
 public:
  virtual ~FetchSink() = default;
  // Called at most once, before the first byte. Null: cannot (the sink keeps why).
  virtual SlotWriter* Begin(const SlotFields& fields) = 0;
  virtual std::string Why() const = 0;
};
Result<SlotView> FetchSlot(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root,
                           FetchSink* sink, FetchProgress* progress);

}  // namespace everstep::checkpoint
