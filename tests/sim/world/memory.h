// The checkpoint memory of one node for one job: arenas of two slots, one for each local rank and
// one for each peer's rank kept here. Own slots are filled as checkpoint/core's DecideCapture says,
// the production policy; a peer's slots by the rule of the agent that receives them: never over the
// newest committed one.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/core/capture_policy.h"
#include "controller/core/types.h"

namespace everstep::sim {

class Memory {
 public:
  struct Slot {
    HeldShard shard;
    bool whole = false;
    bool committed = false;
    std::set<NodeId> acknowledged;  // peers that have it
    std::set<NodeId> pushing;       // ... that it is on its way to
    bool released = false;          // the controller gave it up
    bool corrupt = false;           // the bytes do not verify
  };
  // Where and how a trainer captures.
  struct Trainer {
    std::size_t peers = 0;
    bool kept_by_parity = false;
    bool agent_alive = false;
    bool controller_away = false;
    bool waited = false;  // its patience is used up
  };

  // A local rank captures `shard`; written when the answer is kWrite.
  checkpoint::CaptureAction Capture(const HeldShard& shard, const Trainer& trainer);
  void NewProcess(Rank rank);  // it restored nothing yet
  // A rank's process restores: into its arena, from there or from a peer's bytes.
  void Restore(Rank rank, const HeldShard& shard);
  // ... what it put together from the shards of another world's `cut`: never over its own of those.
  void Assemble(Rank rank, const HeldShard& shard, const RestoreCut& cut);
  // A peer's slot arrives, from a rank of `generation` that knows `kept` as its newest committed
  // one. False: something newer of that generation is here already.
  bool Receive(const HeldShard& shard, Generation generation, const std::optional<HeldShard>& kept);

  void MarkCommitted(Generation generation, Step step);
  void MarkReleased(Generation generation, Step step);  // and those before
  void MarkReplicated(const HeldShard& shard, const NodeId& peer);
  void MarkPushing(const HeldShard& shard, const NodeId& peer, bool pushing);

  // Slots beyond a cut are torn.
  void GiveUp(const std::vector<Cut>& cuts);

  // Every slot whose bytes verify.
  std::vector<HeldShard> Verified() const;
  std::optional<HeldShard> Find(Step step, Generation generation, Rank rank,
                                std::uint32_t crc_root) const;
  // The newest committed own slot of a rank.
  std::optional<HeldShard> Committed(Rank rank) const;
  // What a rank of this generation has to send its peer: its newest capture, else what it restored.
  const Slot* ToPush(Rank rank, Generation generation) const;
  std::string Describe() const;
  std::vector<HeldShard> Damaged() const;
  // The slot has its right bytes again. False: it was overwritten, or was never damaged.
  bool Mend(const HeldShard& shard);
  // Spoils the n-th slot, counted over all, and says what lay there. None: there is no slot.
  std::optional<HeldShard> Corrupt(std::uint64_t n);

 private:
  struct Arena {
    std::array<Slot, 2> slots;
    int base = -1;  // the slot the present process restored from, while it holds that
  };
  static std::size_t Choose(const Arena& arena);
  bool IsCommitted(const HeldShard& shard) const;
  Slot* FindSlot(const HeldShard& shard);

  std::map<std::pair<Rank, bool>, Arena> arenas_;      // (rank, replica)
  std::pair<Generation, Step> committed_{0, kNoStep};  // newest that was heard of
  std::pair<Generation, Step> released_{0, kNoStep};
};

}  // namespace everstep::sim
