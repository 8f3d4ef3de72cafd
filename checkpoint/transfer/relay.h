// A slot that a restore takes into this node's memory, as others take it from here meanwhile: each
// chunk from the moment on at which it was checked.
//
//   restorer --Open--> RelayTable <--Await-- Fetch of another taker (replica_store.h)
//      |Verified(i)        |Relay                 |AwaitChunk(i)
//      v                   v                      v
//   slot, torn ========= its chunk i ==========> the connection
//
// The slot stays torn until all of it is here; what is passed on is checked against the table and
// the table against the plan's checksum, here and again by whoever gets it.
#pragma once

#include <chrono>
#include <compare>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/peer_server.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// Names bytes: whose, of which capture.
struct RelayKey {
  JobId job;
  Rank rank = 0;
  Generation generation = 0;
  Step step = kNoStep;
  std::uint32_t crc_root = 0;
  friend auto operator<=>(const RelayKey&, const RelayKey&) = default;
};

// Thread-safe. Shared by the restore that fills the slot and the connections that pass it on.
class Relay {
 public:
  // `arena`: an object over the slot's memory for this relay alone. `view`: the torn slot's place
  // and what it is to hold, its sequence that of now. `have`: by chunk, not 0: verified.
  Relay(Arena arena, const SlotView& view, std::vector<std::uint32_t> crcs,
        std::vector<std::uint8_t> have);

  const SlotView& view() const { return view_; }
  const std::vector<std::uint32_t>& crcs() const { return crcs_; }
  // The caller's own mapping of it.
  Result<Arena> Memory() const;

  void Verified(std::uint64_t chunk);
  // The slot was published, or its bytes mean nothing any more.
  void End(bool published);

  enum class Chunk { kHere, kLacking, kOver };
  // kLacking: not by `until`. kOver: it will not come, or may be overwritten already.
  Chunk AwaitChunk(std::uint64_t chunk, SteadyTime until);

 private:
  const Arena arena_;
  const SlotView view_;
  const std::vector<std::uint32_t> crcs_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::uint8_t> have_;
  bool over_ = false;
};

// What is on its way into this node. Thread-safe.
class RelayTable {
 public:
  // Of two ranks that take the same bytes the first one passes them on; false: that is another.
  bool Open(const RelayKey& key, const std::shared_ptr<Relay>& relay);
  void Close(const RelayKey& key, const Relay* relay);
  // Null: nothing of it was on its way by `until`, or something just ended.
  std::shared_ptr<Relay> Await(const RelayKey& key, SteadyTime until);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t closed_ = 0;
  std::map<RelayKey, std::shared_ptr<Relay>> relays_;
};

// Answers a fetch from a relay: the fields, the table, then each chunk of the range as it comes.
// Ends when the peer leaves; how long it waits is the peer's to say.
Outcome ServeRelay(PeerSession* session, Relay* relay, SteadyTime deadline);

}  // namespace everstep::checkpoint
