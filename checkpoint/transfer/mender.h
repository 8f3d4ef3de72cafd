// Puts a damaged slot of this node right with the bytes of a node that has them whole: the bad
// chunks alone are fetched, each checked before it is put in place (checkpoint/store/mend.h).
#pragma once

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/peer_client.h"

namespace everstep::checkpoint {

struct MendReport {
  std::uint64_t chunks = 0;  // put right
  std::uint64_t bytes = 0;   // that came
};

// One attempt; blocks. Done: every chunk of the slot was checked and is right. kStale: the slot was
// overwritten, there is nothing to mend. kCorrupt: the source's bytes are wrong, too. Others: the
// source cannot be had now. Maps slots of `arena`.
Outcome MendSlot(const PeerTask& task, Arena* arena, const SlotView& view, MendReport* report);

}  // namespace everstep::checkpoint
