// A slot on its way into a replica arena: its chunk table, what of it is there and verified, and
// the connections that bring it. Outlives them: what broke off is resumed from here, chunk by
// chunk.
//
// Thread-safe. Owned by the replica store's entry, shared with the connections' threads. Each chunk
// has one writer at a time: who claimed it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/slot_stream.h"

namespace everstep::checkpoint {

class Arrival {
 public:
  // `writer`: of the slot that takes it. Its arena must outlive this.
  Arrival(const SlotFields& fields, std::uint32_t crc_root, const SlotWriter& writer);
  // Of a capture that is not finished: `fields` as announced, no root, no table. Takes whole
  // chunks, each checked against the CRC that it comes with, and is never published.
  static std::shared_ptr<Arrival> Ahead(const SlotFields& fields, const SlotWriter& writer);
  // Goes on in the slot of `ahead`: of what came there a chunk counts whose CRC is the table's.
  // REQUIRES: ahead.IsAheadOf(fields), and no connection brings it any more.
  Arrival(const SlotFields& fields, std::uint32_t crc_root, const Arrival& ahead);

  const SlotFields& fields() const { return fields_; }
  std::uint32_t crc_root() const { return crc_root_; }
  bool Is(const SlotFields& fields, std::uint32_t crc_root) const;
  bool ahead() const { return ahead_; }
  // It took chunks of the very capture that these fields are the end of, and has room for it.
  bool IsAheadOf(const SlotFields& fields) const;
  SlotWriter* writer() { return &writer_; }

  // The first one counts: the same root means the same table.
  void SetTable(std::vector<std::uint32_t> crcs);
  const std::vector<std::uint32_t>& crcs() const { return crcs_; }

  bool Claim(std::uint64_t chunk);  // false: verified, or another connection is at it
  void Verified(std::uint64_t chunk);
  void Unclaim(std::uint64_t chunk);
  std::uint64_t verified() const;
  Bitmap Lacking() const;

  // The lead opens it for further streams and closes it at its end. Close breaks them when told so,
  // and waits until the last has left; they end soon, each has its own limits of time.
  void Open();
  bool Join(int fd);  // false: not open
  void Leave(int fd);
  void Close(bool broken);
  void Break();  // ends the further streams, without waiting for them

 private:
  enum State : std::uint8_t { kLacking, kArriving, kVerified };
  struct OfCapture {};
  Arrival(OfCapture, const SlotFields& fields, const SlotWriter& writer);
  void CountAhead();

  const SlotFields fields_;
  const std::uint32_t crc_root_;
  const bool ahead_ = false;
  SlotWriter writer_;
  std::vector<std::uint32_t> crcs_;

  mutable std::mutex mutex_;
  std::condition_variable left_;
  std::vector<std::uint8_t> states_;
  std::vector<std::uint8_t> came_ahead_;  // by chunk, as states_; looked at once there is a table
  std::uint64_t verified_ = 0;
  bool open_ = false;
  std::set<int> streams_;
};

// The middle of a push or join: claims, receives and verifies chunks until the end frame.
// `chunk`: which one failed.
Outcome ReceiveInto(Connection* connection, Arrival* arrival, std::uint64_t* chunk);
// The same of an arrival ahead of its table: each frame's CRC is what its chunk must have.
Outcome ReceiveAhead(Connection* connection, Arrival* arrival, std::uint64_t* chunk);

}  // namespace everstep::checkpoint
