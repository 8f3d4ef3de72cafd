// The checkpoint memory of one node for one job: two slots per rank and role, as the arenas have
// them. Holds the rule that matters: the newest committed slot is never overwritten, and within a
// generation a capture waits until the step before it is committed (docs/internals/lifecycle.md,
// "Checkpoints").
#pragma once

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "controller/core/types.h"

namespace everstep::sim {

class Memory {
 public:
  struct Slot {
    controller::HeldShard shard;
    bool committed = false;
    bool replicated = false;  // the peer acknowledged it
    bool corrupt = false;
  };

  // Puts a shard into a slot. False: no slot may be overwritten now. `away`: commits cannot be had,
  // so the older slot may go once the newer one is replicated.
  bool Put(const controller::HeldShard& shard, bool away);
  void MarkCommitted(Generation generation, Step step);
  void MarkReplicated(const controller::HeldShard& shard);

  // Every slot whose bytes verify.
  std::vector<controller::HeldShard> Verified() const;
  std::optional<controller::HeldShard> Find(Step step, Generation generation, Rank rank,
                                            std::uint32_t crc_root) const;
  const Slot* Newest(Rank rank, Generation generation) const;  // own, not a replica
  // Spoils the n-th slot, counted over all, and says what lay there. None: there is no slot.
  std::optional<controller::HeldShard> Corrupt(std::uint64_t n);

 private:
  std::map<std::pair<Rank, bool>, std::vector<Slot>> arenas_;  // (rank, replica)
};

}  // namespace everstep::sim
