// Which slot a capture may overwrite, if any: decided anew before each capture from what the arena
// says. Pure; libeverstep.so gathers the facts, waits and acts.
//
// What it keeps true (docs/internals/lifecycle.md, "Checkpoints"):
//  - the newest committed step is never overwritten, nor is the step that this process was restored
//    from, until a newer one is committed;
//  - a captured step may be committed at any moment, even when word of it is late: it gives way
//  only
//    when the controller has released it (another rank went past it, or it lacked copies for long);
//    who must wait for that too long skips the capture instead;
//  - a step that was put together from another world's shards is committed before anything is
//    captured: until then those shards are the newest committed step;
//  - a captured step that is on its way to a peer is left alone, too;
//  - without a controller or agent a replicated layout goes on with what its own node and peer
//  hold;
//    a sharded one keeps what it has, since a newer cut could not be agreed on.
#pragma once

#include <array>
#include <cstdint>

#include "proto/base/ids.h"

namespace everstep::checkpoint {

struct SlotState {
  bool whole = false;  // finished; the rest is meaningless when not
  Step step = kNoStep;
  Generation generation = 0;
  bool committed = false;
  bool replicated = false;  // a peer verified it
  bool pushing = false;     // on its way to a peer now
  bool released = false;    // the controller gave it up: it will not be committed any more
};

struct CaptureFacts {
  Step step = kNoStep;  // to be captured
  Generation generation = 0;
  std::array<SlotState, 2> slots;
  int base = -1;  // slot this process was restored from, as long as it holds that content; -1: none
  bool replicated_layout = false;
  bool has_peer = false;
  bool agent_alive = false;
  bool controller_away = false;
  bool waited = false;  // the time to wait for a commit is used up
};

enum class CaptureAction : std::uint8_t { kWrite, kWait, kSkip };
struct CaptureDecision {
  CaptureAction action = CaptureAction::kWrite;
  std::uint32_t slot = 0;       // kWrite: overwrite this one
  bool replaces = false;        // ... which held a captured step that was never committed
  std::uint32_t waits_for = 0;  // kWait, kSkip: the slot that is not safe yet
  const char* reason = "";      // stable words, for statistics and logs
};

CaptureDecision DecideCapture(const CaptureFacts& facts);

}  // namespace everstep::checkpoint
