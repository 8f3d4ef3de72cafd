// The peers' slots that this node keeps, and the answers it gives to other data planes: takes
// pushes into replica arenas, serves fetches from any arena here.
//
// A push is taken when its generation is not older than this node's and its step is newer than what
// is held; the same bytes again are acknowledged at once. Chunks that the sender knows to be those
// of a slot that is here are copied from it, and checked on the way. A connection that breaks
// leaves its verified chunks, and the next one for the same slot brings the others. A newer push
// for a rank ends an older one that hangs. The newest committed slot is never overwritten. Shards
// that this node makes itself (shard_maker.h) are kept in the same way.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/arrival.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/peer_server.h"
#include "checkpoint/transfer/relay.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// The slot of an arena that its agent may overwrite: one that is not whole, else the one that does
// not hold the newest committed step, else the older one.
std::uint32_t ChooseSlot(const Arena& arena, Generation committed_generation, Step committed_step);
// Tells the arena's slots which of them holds the commit.
void MarkSlots(const Arena& arena, Generation generation, Step step);

class ReplicaStore final : public PeerHandler {
 public:
  // All must outlive the store.
  ReplicaStore(const TransferOptions& options, ArenaHost* host, Listener* listener, JobTable* jobs,
               Traffic* traffic, RelayTable* relays)
      : options_(options),
        host_(host),
        listener_(listener),
        jobs_(jobs),
        traffic_(traffic),
        relays_(relays) {}

  std::optional<SipKey> KeyOf(const JobId& job) override;
  void Serve(PeerSession* session) override;

  // Fills a slot of this node's copy of the rank with what `fill` makes of it: it gets a writer of
  // a torn slot with room for `payload_bytes`, and answers the slot's fields and checksum. Blocks
  // as long as `fill` does; pushes of the rank wait. `received`: counts as pushed under that
  // generation (0: it does not).
  struct Filled {
    SlotFields fields;
    std::uint32_t crc_root = 0;
  };
  Result<SlotView> Keep(const JobId& job, Rank rank, Generation received,
                        std::uint64_t payload_bytes,
                        const std::function<Result<Filled>(SlotWriter*)>& fill);

  void MarkCommitted(const JobId& job, Generation generation, Step step);
  // Ranks of which something was pushed here under this generation.
  std::set<Rank> Received(const JobId& job, Generation generation);
  void Forget(const JobId& job);
  void Drop(const JobId& job, Rank rank);
  void Clear();  // the keeper died: its arenas are gone

 private:
  struct Replica {
    std::mutex busy;  // held by the lead connection that writes; guards all but `state`'s
    Arena arena;
    std::uint64_t damaged[kSlots] = {};  // sequence of a slot that is no base: a chunk failed there

    std::mutex state;                  // short; guards the rest
    std::shared_ptr<Arrival> arrival;  // the torn slot, if one is on its way
    int active_fd = -1;
    Generation active_generation = 0;
    Step active_step = kNoStep;
    Generation received = 0;
    bool gone = false;
  };
  using ReplicaPtr = std::shared_ptr<Replica>;

  ReplicaPtr Get(const JobId& job, Rank rank);
  Outcome OpenArena(const JobId& job, Rank rank, std::uint64_t payload_bytes, Replica* replica);
  void Push(PeerSession* session, const JobFacts& facts);  // and ahead
  Result<JobFacts> Prepare(const PeerSession& session, const JobFacts& facts, Replica* replica);
  Outcome TakeAhead(PeerSession* session, const JobFacts& facts, Replica* replica, bool* answered,
                    std::uint64_t* chunk);
  Outcome Take(PeerSession* session, const JobFacts& facts, Replica* replica, bool* answered,
               std::uint64_t* chunk);
  Result<std::shared_ptr<Arrival>> Begin(const RequestFrame& request, const JobFacts& newest,
                                         Replica* replica);
  Outcome Bring(PeerSession* session, Replica* replica, Arrival* arrival, std::uint64_t* chunk);
  void CopyUnchanged(const ChunkTable& table, const HeldFrame* held, const std::uint64_t* held_seq,
                     Replica* replica, Arrival* arrival);
  void Join(PeerSession* session);
  void Fetch(PeerSession* session);  // and pick
  bool FetchWhole(PeerSession* session, bool* damaged);
  void End(const ReplicaPtr& replica);

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  JobTable* const jobs_;
  Traffic* const traffic_;
  RelayTable* const relays_;
  std::mutex mutex_;
  std::map<std::pair<JobId, Rank>, ReplicaPtr> replicas_;
};

}  // namespace everstep::checkpoint
