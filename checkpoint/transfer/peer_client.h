// The dialling side: one slot to a peer, or one slot from a peer. One attempt each; the caller
// retries.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/capture_word.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/siphash.h"
#include "checkpoint/transfer/socket.h"
#include "checkpoint/transfer/traffic.h"
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
  int streams = 1;                            // at most so many connections; small slots take fewer
  bool checked = false;                       // fetch: the source checks each chunk before it goes
  bool relay = false;                         // fetch: the source may be receiving it itself
  TrafficClass traffic_class = TrafficClass::kCommit;
  Traffic* traffic = nullptr;  // who says when bytes may go; null: at once
};

// A connection behind its handshake.
struct PeerConversation {
  Connection connection;
  ResponseFrame response;
  std::uint64_t my_nonce = 0;
  std::uint64_t their_nonce = 0;
  // kRefused: an ack that does not know the key. Others: what the ack says.
  Outcome Ack(const SipKey& key);
  // The same when its first `got` bytes are there already.
  Outcome FinishAck(const SipKey& key, AckFrame ack, std::size_t got);
};
// Dials, greets, asks. Ok: the peer's status is kOk or kHave.
Result<PeerConversation> Converse(const PeerTask& task, RequestFrame request, SteadyTime deadline);

struct PushReport {
  std::uint64_t sent_bytes = 0;
  std::uint64_t unchanged_bytes = 0;  // the peer had them in an older slot
  std::uint64_t resumed_bytes = 0;    // arrived in an earlier attempt
  int streams = 0;
};
// Done: the peer holds these bytes, verified. kStale: it knows a newer generation, or the slot was
// overwritten here; do not try again. kCorrupt: bytes changed on the way or in memory. kRefused:
// wrong key. Others: try again, what arrived is not sent again. Maps slots of `arena`.
Outcome PushSlot(const PeerTask& task, Arena* arena, const SlotView& view, PushReport* report);

// Chunks of a capture under way as they are written, until it ends, stands still, or the peer says
// something; PushSlot of the finished slot then finds them there. Done: the peer took them.
// kUnavailable: it has no slot to spare. Errors cost nothing but the attempt. Maps slots of
// `arena`.
Outcome PushAhead(const PeerTask& task, Arena* arena, const CaptureUnderWay& capture);

// What a fetch has got so far: a later attempt, at another source too, brings the rest.
struct FetchProgress {
  std::vector<std::uint8_t> have;  // by chunk; empty: nothing is known yet
};
// `wanted`: rank, generation, step, payload_bytes (0: not known, then in one stream); crc_root as
// planned. `Begin` makes the writer when the slot's fields are known. Published on Done.
class FetchSink {
 public:
  virtual ~FetchSink() = default;
  // Called before the first byte of each attempt, under a lock. Null: cannot (the sink keeps why).
  virtual SlotWriter* Begin(const SlotFields& fields) = 0;
  // The table of an attempt is here and checked, what lies there already in `have`; under the lock.
  virtual void Table(const std::vector<std::uint32_t>& /*crcs*/,
                     const std::vector<std::uint8_t>& /*have*/) {}
  // A chunk lies in the slot, checked. From several threads.
  virtual void Verified(std::uint64_t /*chunk*/) {}
  // All that was said of chunks is void.
  virtual void Lost() {}
  virtual std::string Why() const = 0;
};
Result<SlotView> FetchSlot(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root,
                           FetchSink* sink, FetchProgress* progress);

}  // namespace everstep::checkpoint
