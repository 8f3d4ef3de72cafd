#include "checkpoint/core/capture_policy.h"

#include <utility>

namespace everstep::checkpoint {
namespace {

bool Newer(const SlotState& a, const SlotState& b) {
  return std::pair(a.step, a.generation) > std::pair(b.step, b.generation);
}

CaptureDecision Write(std::uint32_t slot, bool replaces, const char* reason) {
  return {CaptureAction::kWrite, slot, replaces, 0, reason};
}
CaptureDecision WaitFor(std::uint32_t slot, const char* reason) {
  return {CaptureAction::kWait, 0, false, slot, reason};
}
CaptureDecision Skip(std::uint32_t slot, const char* reason) {
  return {CaptureAction::kSkip, 0, false, slot, reason};
}

}  // namespace

CaptureDecision DecideCapture(const CaptureFacts& f) {
  const bool alone = !f.agent_alive || f.controller_away;  // no commit can be had now
  const auto safe = [&](const SlotState& s) {
    if (s.committed) return true;
    return alone && f.replicated_layout && (s.replicated || !f.has_peer || !f.agent_alive);
  };

  // What must be kept: the newest safe step of this generation, else the base, else the newest
  // committed, else the newest whole one.
  int keep = -1;
  int pending = -1;  // captured by this generation and not safe
  for (int i = 0; i < 2; ++i) {
    const SlotState& s = f.slots[static_cast<std::size_t>(i)];
    if (!s.whole || s.generation != f.generation || i == f.base) continue;
    int& best = safe(s) ? keep : pending;
    if (best < 0 || Newer(s, f.slots[static_cast<std::size_t>(best)])) best = i;
  }
  if (keep >= 0 && pending >= 0 &&
      !Newer(f.slots[static_cast<std::size_t>(pending)], f.slots[static_cast<std::size_t>(keep)])) {
    pending = -1;  // an older step that was passed over
  }
  const bool first_of_generation = keep < 0 && pending < 0;
  if (keep < 0) keep = f.base;
  for (const bool committed : {true, false}) {
    for (int i = 0; i < 2 && keep < 0; ++i) {
      const SlotState& s = f.slots[static_cast<std::size_t>(i)];
      const SlotState& other = f.slots[static_cast<std::size_t>(1 - i)];
      if (!s.whole || i == pending || (committed && !s.committed)) continue;
      const bool rival = other.whole && 1 - i != pending && (!committed || other.committed);
      if (!rival || !Newer(other, s)) keep = i;
    }
  }

  if (pending >= 0) {
    const auto slot = static_cast<std::uint32_t>(pending);
    const SlotState& s = f.slots[slot];
    if (alone && !f.replicated_layout) return Skip(slot, "no_controller");
    // It may be committed at any moment, until the controller has said that it will not be.
    if (!f.waited && !s.released) return WaitFor(slot, "uncommitted");
    if (!alone && !s.released) return Skip(slot, "uncommitted");
    if (s.pushing && f.agent_alive) return Skip(slot, "peer_slow");
    return Write(slot, true, "never_committed");
  }

  const auto target = static_cast<std::uint32_t>(
      keep >= 0 ? 1 - keep : (f.slots[0].whole && !f.slots[1].whole ? 1 : 0));
  // The step this process came from may have fewer copies than the committed one before it, here or
  // for another rank, and a newer capture would push its copies out: it is committed first.
  // One that was put together from the shards of another world is of this generation: while it is
  // not committed, the slots that it came from are what is, and other ranks may be reading them.
  if (first_of_generation && f.base >= 0) {
    const auto base = static_cast<std::uint32_t>(f.base);
    const SlotState& s = f.slots[base];
    const bool assembled = s.generation == f.generation;
    const SlotState& other = f.slots[1 - base];
    if (assembled && !s.committed && s.released && other.whole && other.committed) {
      return Write(base, true, "never_committed");
    }
    // Without a controller nothing of a sharded layout is committed: what is stays.
    const bool kept_here = alone && f.replicated_layout;
    if (!s.committed && !s.released && (assembled || (f.has_peer && !kept_here))) {
      return f.waited || alone ? Skip(base, "base_uncommitted") : WaitFor(base, "base_uncommitted");
    }
  }
  return Write(target, false, "free");
}

}  // namespace everstep::checkpoint
