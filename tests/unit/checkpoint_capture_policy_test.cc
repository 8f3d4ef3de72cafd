// Stories of two slots: what a capture may overwrite.
#include "checkpoint/core/capture_policy.h"

#include <gtest/gtest.h>

#include <string>

#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

SlotState Captured(Step step, Generation generation = 3) {
  return {.whole = true, .step = step, .generation = generation};
}
SlotState Committed(Step step, Generation generation = 3) {
  SlotState s = Captured(step, generation);
  s.committed = true;
  return s;
}
CaptureFacts At(Step step, SlotState a, SlotState b) {
  return {.step = step, .generation = 3, .slots = {a, b}, .has_peer = true, .agent_alive = true};
}
std::string Say(const CaptureDecision& d) {
  switch (d.action) {
    case CaptureAction::kWrite:
      return std::string(d.replaces ? "replace " : "write ") + std::to_string(d.slot);
    case CaptureAction::kWait: return std::string("wait ") + d.reason;
    case CaptureAction::kSkip: return std::string("skip ") + d.reason;
  }
  return "?";
}
std::string Decide(const CaptureFacts& f) {
  return Say(DecideCapture(f));
}

TEST(CapturePolicy, TakesTurnsWhileEachStepIsCommitted) {
  EXPECT_EQ(Decide(At(0, {}, {})), "write 0");
  EXPECT_EQ(Decide(At(1, Committed(0), {})), "write 1");
  EXPECT_EQ(Decide(At(2, Committed(0), Committed(1))), "write 0");
  EXPECT_EQ(Decide(At(3, Committed(2), Committed(1))), "write 1");
}

TEST(CapturePolicy, WaitsForTheCommitOfTheStepBefore) {
  CaptureFacts f = At(2, Committed(0), Captured(1));
  EXPECT_EQ(Decide(f), "wait uncommitted");
  f.slots[1].committed = true;
  EXPECT_EQ(Decide(f), "write 0");
}

TEST(CapturePolicy, SkipsWhileThePeerIsStillTakingTheStepBefore) {
  CaptureFacts f = At(2, Committed(0), Captured(1));
  f.waited = true;
  f.slots[1].pushing = true;
  f.slots[1].released = true;
  EXPECT_EQ(Decide(f), "skip peer_slow");
}

// Put together from the shards of another world, of which the other slot holds one: those are what
// is committed until this one is, whether there is a peer or not.
TEST(CapturePolicy, AStateOfAnotherWorldIsCommittedFirst) {
  CaptureFacts f = At(8, Committed(7, 2), Captured(7));
  f.base = 1;
  f.has_peer = false;
  EXPECT_EQ(Decide(f), "wait base_uncommitted");
  f.waited = true;
  EXPECT_EQ(Decide(f), "skip base_uncommitted");
  f.controller_away = true;
  EXPECT_EQ(Decide(f), "skip base_uncommitted");
  f.controller_away = f.waited = false;
  f.slots[1].released = true;
  EXPECT_EQ(Decide(f), "replace 1");
  f.slots[1].committed = true;
  EXPECT_EQ(Decide(f), "write 0");
}

// Its commit may be under way: only the controller knows that there will be none.
TEST(CapturePolicy, AnUncommittedStepGivesWayWhenTheControllerReleasedItOnly) {
  CaptureFacts f = At(2, Committed(0), Captured(1));
  f.waited = true;
  EXPECT_EQ(Decide(f), "skip uncommitted");
  f.slots[1].released = true;
  EXPECT_EQ(Decide(f), "replace 1") << "and the committed one stays";
  f.waited = false;
  EXPECT_EQ(Decide(f), "replace 1");
}

TEST(CapturePolicy, TheRestoredStepIsKeptUntilANewerOneIsCommitted) {
  CaptureFacts f = At(8, Captured(8, 2), Captured(7, 2));
  f.base = 1;  // restored from 7; 8 was lost with the old generation
  f.has_peer = false;
  EXPECT_EQ(Decide(f), "write 0");
  f = At(9, Captured(8), Captured(7, 2));
  f.base = 1;
  EXPECT_EQ(Decide(f), "wait uncommitted");
  f.slots[0].committed = true;
  EXPECT_EQ(Decide(f), "write 1");
}

// Found by the simulator: the committed step went on one rank, the copies of the newer base on
// another.
TEST(CapturePolicy, TheBaseIsCommittedBeforeAnythingIsCaptured) {
  for (const bool beside : {true, false}) {
    CaptureFacts f = At(9, beside ? Committed(7, 2) : SlotState{}, Captured(8, 2));
    f.base = 1;
    EXPECT_EQ(Decide(f), "wait base_uncommitted");
    f.waited = true;
    EXPECT_EQ(Decide(f), "skip base_uncommitted");
    f.slots[1].released = true;
    EXPECT_EQ(Decide(f), "write 0");
    f.slots[1].released = false;
    f.slots[1].committed = true;
    EXPECT_EQ(Decide(f), "write 0");
  }
}

// Found by the simulator: a rank whose controller went away just then captured over the committed
// step, and a keeper's death took another rank's base.
TEST(CapturePolicy, WithoutAControllerAShardedLayoutKeepsWhatIsCommittedBesideItsBase) {
  CaptureFacts f = At(9, Committed(7, 2), Captured(8, 2));
  f.base = 1;
  f.controller_away = true;
  EXPECT_EQ(Decide(f), "skip base_uncommitted");
  f.controller_away = f.agent_alive = false;
  EXPECT_EQ(Decide(f), "skip base_uncommitted");
  f.slots[1].committed = true;
  EXPECT_EQ(Decide(f), "write 0");
}

TEST(CapturePolicy, WithoutAControllerAReplicatedLayoutGoesOnWhenItsPeerHasTheStep) {
  CaptureFacts f = At(2, Committed(0), Captured(1));
  f.controller_away = true;
  f.replicated_layout = true;
  EXPECT_EQ(Decide(f), "wait uncommitted");
  f.slots[1].replicated = true;
  EXPECT_EQ(Decide(f), "write 0");
  f.slots[1].replicated = false;
  f.agent_alive = false;
  EXPECT_EQ(Decide(f), "write 0") << "without an agent nobody pushes";
}

TEST(CapturePolicy, WithoutAControllerAShardedLayoutKeepsWhatItHas) {
  CaptureFacts f = At(2, Committed(0), Captured(1));
  f.controller_away = true;
  f.slots[1].replicated = true;
  EXPECT_EQ(Decide(f), "skip no_controller");
}

TEST(CapturePolicy, ATornSlotIsTheOneToWrite) {
  EXPECT_EQ(Decide(At(5, {}, Committed(4))), "write 0");
  EXPECT_EQ(Decide(At(5, Committed(4), {})), "write 1");
  EXPECT_EQ(Decide(At(5, Captured(4, 2), {})), "write 1") << "an older generation's only step";
}

// Whatever the facts: no decision overwrites the newest committed slot of this generation, nor the
// base before one is committed; and someone who waits is never told to wait again.
TEST(CapturePolicy, NeverOverwritesTheOnlySafeStep) {
  Random random(11);
  for (int i = 0; i < 200'000; ++i) {
    CaptureFacts f;
    f.step = random.Between(0, 12);
    f.generation = 3;
    for (SlotState& s : f.slots) {
      s = {.whole = random.Chance(800),
           .step = random.Between(0, 12),
           .generation = static_cast<Generation>(random.Between(2, 3)),
           .committed = random.Chance(400),
           .replicated = random.Chance(400),
           .pushing = random.Chance(300),
           .released = random.Chance(300)};
    }
    f.base = static_cast<int>(random.Between(-1, 1));
    if (f.base >= 0 && !f.slots[static_cast<std::size_t>(f.base)].whole) f.base = -1;
    f.replicated_layout = random.Chance(500);
    f.has_peer = random.Chance(500);
    f.agent_alive = random.Chance(700);
    f.controller_away = random.Chance(300);
    f.waited = random.Chance(500);
    const CaptureDecision d = DecideCapture(f);
    ASSERT_FALSE(f.waited && d.action == CaptureAction::kWait);
    if (d.action != CaptureAction::kWrite) continue;
    const SlotState& gone = f.slots[d.slot];
    const SlotState& stays = f.slots[1 - d.slot];
    if (!gone.whole) continue;
    const bool gone_safe = gone.committed && gone.generation == f.generation;
    const bool relaxed = f.replicated_layout && (f.controller_away || !f.agent_alive);
    if (gone_safe && static_cast<int>(d.slot) != f.base) {
      ASSERT_TRUE(stays.whole && (stays.committed || relaxed)) << i;
      ASSERT_GE(stays.step, gone.step) << i;
    }
    if (static_cast<int>(d.slot) == f.base) {
      const bool assembled = gone.generation == f.generation && gone.released && stays.committed;
      ASSERT_TRUE(stays.whole &&
                  (assembled || (stays.generation == f.generation && (stays.committed || relaxed))))
          << i;
    }
  }
}

}  // namespace
}  // namespace everstep::checkpoint
