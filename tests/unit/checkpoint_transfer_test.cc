// Two or three nodes' data planes over loopback, real memfds, real sockets.
#include "checkpoint/transfer/transfer_service.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/siphash.h"
#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

TEST(SipHash, AgreesWithThePublishedVector) {
  unsigned char key[16], input[15];
  for (unsigned char i = 0; i < 16; ++i) key[i] = i;
  for (unsigned char i = 0; i < 15; ++i) input[i] = i;
  SipKey k;
  std::memcpy(k.data(), key, 16);
  EXPECT_EQ(SipHash(k, input, 15), 0xa129ca6149be45e5ull);  // the paper's appendix A
}

TEST(Transfer, ACapturedSlotReachesThePeerBitForBit) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(a.heard.Copied(7, false)) << a.heard.Troubles();
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_EQ(a.heard.Now(&Recorder::copied).front().crc_root,
            b.heard.Now(&Recorder::copied).front().crc_root);
  EXPECT_EQ(a.heard.Now(&Recorder::captured).front(), 7);
  Arena arena = a.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.header()->slot[0].replicated_seq != arena.Look(0)->seq &&
         steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(arena.header()->slot[0].replicated_seq, arena.Look(0)->seq);
}

TEST(Transfer, ACapturedSlotReachesEveryPeerAndIsReplicatedWhenAllHaveIt) {
  Node a, b, c;
  b.service->Begin(kJob, 1, "key");
  Part part = a.PartOf(1, 0, b.address());
  part.peers.push_back(c.address());  // which does not know the job yet
  a.Activate(part);
  const SlotView view = a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  Arena arena = a.Open(0, false);
  EXPECT_NE(arena.header()->slot[0].replicated_seq, view.seq) << "one of two peers lacks it";
  c.service->Begin(kJob, 1, "key");
  EXPECT_TRUE(c.heard.Copied(7, true)) << a.heard.Troubles() << c.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_TRUE(c.Holds(0, true, 7, kSize));
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.header()->slot[0].replicated_seq != view.seq && steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(arena.header()->slot[0].replicated_seq, view.seq);
  EXPECT_EQ(arena.header()->slot[0].pushing_seq, 0u);
}

TEST(Transfer, ThePeerKeepsTheTwoNewestStepsOfAStream) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  for (Step step = 0; step < 20; ++step) {
    a.Capture(1, 0, static_cast<std::uint32_t>(step % 2), step, 100'000);
    ASSERT_TRUE(b.heard.Copied(step, true)) << step << a.heard.Troubles() << b.heard.Troubles();
    a.service->MarkCommitted(kJob, 1, step);
    b.service->MarkCommitted(kJob, 1, step);
  }
  EXPECT_TRUE(b.Holds(0, true, 18, 100'000));
  EXPECT_TRUE(b.Holds(0, true, 19, 100'000));
}

TEST(Transfer, ThePeerNeverOverwritesTheNewestCommittedStep) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 1, 1000);
  ASSERT_TRUE(b.heard.Copied(1, true));
  a.service->MarkCommitted(kJob, 1, 1);  // b is told by the next push alone
  for (Step step : {2, 3, 4}) {
    a.Capture(1, 0, 1, step, 1000);
    ASSERT_TRUE(b.heard.Copied(step, true)) << a.heard.Troubles() << b.heard.Troubles();
  }
  EXPECT_TRUE(b.Holds(0, true, 1, 1000));
  EXPECT_TRUE(b.Holds(0, true, 4, 1000));
}

TEST(Transfer, AStaleGenerationIsRefused) {
  Node a, b;
  b.service->Begin(kJob, 5, "key");
  a.Activate(a.PartOf(4, 0, b.address()));
  a.Capture(4, 0, 0, 7, 1000);
  EXPECT_TRUE(a.heard.Complains("generation 4 of job demo is over; this node is at 5"))
      << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).open());
}

TEST(Transfer, AWrongKeyIsRefused) {
  Node a, b;
  b.service->Begin(kJob, 1, "another key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(a.heard.Complains("wrong key for job demo")) << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).open());
}

TEST(Transfer, AJobThatComesLaterIsPushedToThen) {
  Node a, b;
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  ASSERT_TRUE(a.heard.Complains("not on this node (yet)"));
  b.service->Begin(kJob, 1, "key");
  EXPECT_TRUE(b.heard.Copied(7, true));
}

TEST(Transfer, AByteFlippedOnTheWayIsCaughtAndSentAgain) {
  Node a, b;
  std::atomic<bool> flipped{false};
  Proxy proxy(b.service->port(), [&](int, std::uint64_t offset, char* data, std::size_t n) {
    const std::uint64_t victim = 3'000'000;
    if (!flipped && offset <= victim && victim < offset + n) {
      data[victim - offset] ^= 1;
      flipped = true;
    }
    return true;
  });
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(flipped);
  EXPECT_TRUE(b.heard.Complains("arrived with CRC")) << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_LT(proxy.forwarded, kSize * 18 / 10) << "sent from the start again";
}

TEST(Transfer, ABrokenConnectionIsResumedBehindTheVerifiedChunks) {
  Node a, b;
  Proxy proxy(b.service->port(), [&](int number, std::uint64_t offset, char*, std::size_t) {
    return number != 0 || offset < 4'300'000;
  });
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_GE(proxy.connections, 2);
  EXPECT_LT(proxy.forwarded, kSize + (2u << 20));
}

TEST(Transfer, ASourceWhoseMemoryChangedAfterTheCaptureIsNamed) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.service->Begin(kJob, 2, "key");  // nothing is pushed while the byte is flipped
  const SlotView view = a.Capture(2, 0, 0, 7, kSize);
  Arena arena = a.Open(0, false);
  const_cast<unsigned char*>(arena.Payload(view))[100] ^= 4;
  a.Activate(a.PartOf(2, 0, b.address()));
  EXPECT_TRUE(a.heard.Complains("memory is suspect")) << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).Newest());
}

TEST(Transfer, APeerThatSaysNothingIsGivenUpAndStopDoesNotWaitForIt) {
  auto silent = Listen("127.0.0.1", 0);
  ASSERT_TRUE(silent.ok());
  Node a(milliseconds(200));
  a.Activate(a.PartOf(1, 0, fmt::format("127.0.0.1:{}", silent.value().port)));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(a.heard.Complains("no byte moved for 200 ms")) << a.heard.Troubles();
  Node slow(milliseconds(60'000));
  slow.Activate(slow.PartOf(1, 0, fmt::format("127.0.0.1:{}", silent.value().port)));
  slow.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(slow.heard.Copied(7, false));
  const auto began = steady_clock::now();
  slow.service->Stop();
  EXPECT_LT(steady_clock::now() - began, std::chrono::seconds(5));
  close(silent.value().fd);
}

TEST(Transfer, APeerThatDiesInTheMiddleCostsNothingHere) {
  Node a;
  auto b = std::make_unique<Node>();
  b->service->Begin(kJob, 1, "key");
  std::atomic<bool> reached{false};
  Proxy proxy(b->service->port(), [&](int, std::uint64_t offset, char*, std::size_t) {
    if (offset > 2'000'000) reached = true;
    return !reached;
  });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(a.heard.Complains("pushing step 7"));
  b.reset();
  a.Capture(1, 0, 1, 8, kSize);
  EXPECT_TRUE(a.heard.Copied(8, false));
  EXPECT_TRUE(a.Holds(0, false, 7, kSize));
  EXPECT_TRUE(a.Holds(0, false, 8, kSize));
}

TEST(Transfer, ANewcomerFetchesItsRestoreFromThePeerThatHoldsIt) {
  Node a, b, c;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const HeldShard shard = b.heard.Now(&Recorder::copied).front();
  a.service->Stop();  // its node is gone
  b.service->Begin(kJob, 2, "key");
  const RestorePart restore{7, 0, 1, shard.crc_root, shard.bytes, b.address()};
  c.Activate(c.PartOf(2, 0, b.address(), restore));
  Arena arena = c.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.Restore().state == RestoreState::kPending && steady_clock::now() < deadline)
    std::this_thread::yield();
  ASSERT_EQ(arena.Restore().state, RestoreState::kReady) << arena.Restore().message;
  EXPECT_EQ(arena.Restore().generation, 2u);
  EXPECT_TRUE(c.Holds(0, false, 7, kSize));
}

TEST(Transfer, ARestoreFromThisNodesOwnMemoryNeedsNoWire) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 3, b.address()));
  a.Capture(1, 3, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const HeldShard shard = b.heard.Now(&Recorder::copied).front();
  b.Activate(b.PartOf(
      2, 0, "", {7, 3, 1, shard.crc_root, shard.bytes, b.address()}));  // rank 0 takes rank 3's
  Arena arena = b.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.Restore().state == RestoreState::kPending && steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(arena.Restore().state, RestoreState::kReady) << arena.Restore().message;
  EXPECT_TRUE(b.Holds(0, false, 7, kSize));
}

// A large state takes seconds to copy, and a second fault may come meanwhile.
TEST(Transfer, ARestoreThatWasGivenUpWritesNoMoreOnceTheNextGenerationStarts) {
  constexpr std::size_t kLarge = 256u << 20;
  Node a;
  a.Activate(a.PartOf(1, 3, ""));
  const SlotView view = a.Capture(1, 3, 0, 7, kLarge);
  for (Generation g = 2; g < 6; g += 2) {
    // Rank 0 takes rank 3's; before that is done the next generation starts from nothing.
    a.Activate(a.PartOf(g, 0, "", {7, 3, 1, view.crc_root, kLarge, a.address()}));
    ASSERT_EQ(a.Open(0, false).Restore().state, RestoreState::kPending);
    std::this_thread::sleep_for(milliseconds(5 * static_cast<int>(g)));
    a.service->Begin(kJob, g + 1, "key");
    a.Activate(a.PartOf(g + 1, 0, ""));
    ASSERT_EQ(a.Open(0, false).Restore().state, RestoreState::kFresh);
    a.Capture(g + 1, 0, 0, 10 + static_cast<Step>(g), 1000);
    a.Capture(g + 1, 0, 1, 11 + static_cast<Step>(g), 1000);
    std::this_thread::sleep_for(milliseconds(400));  // as long as a copy would take
    EXPECT_TRUE(a.Holds(0, false, 10 + static_cast<Step>(g), 1000));
    EXPECT_TRUE(a.Holds(0, false, 11 + static_cast<Step>(g), 1000));
  }
}

// 100 MB/s beside the fixed part: what is large is not given up for being large.
TEST(Transfer, ARestoresPatienceGrowsWithItsBytes) {
  Node a;
  a.service.reset();
  a.options.restore_timeout = milliseconds(0);
  a.Boot();
  const auto began = steady_clock::now();
  a.Activate(a.PartOf(1, 0, "", {7, 0, 1, 99, 40'000'000, "127.0.0.1:1"}));
  EXPECT_EQ(a.Open(0, false).Restore().slot_seq, 40'000'000u) << "the trainer does not know";
  ASSERT_TRUE(Becomes([&] { return a.Open(0, false).Restore().state == RestoreState::kFailed; }));
  EXPECT_GE(steady_clock::now() - began, milliseconds(300));
}

TEST(Transfer, ARestoreThatCannotBeHadSaysWhy) {
  Node a, b;
  b.service->Begin(kJob, 2, "key");
  a.Activate(a.PartOf(2, 0, "", {7, 0, 1, 1234, 1000, b.address()}));
  Arena arena = a.Open(0, false);
  EXPECT_TRUE(a.heard.Complains("is not here (any more)")) << a.heard.Troubles();
  const RestoreView word = arena.Restore();
  EXPECT_EQ(word.state, RestoreState::kFailed);
  EXPECT_NE(word.message.find("step 7 of rank 0"), std::string::npos) << word.message;
}

TEST(Transfer, AFreshStartIsSaidAtOnceAndALocalSlotIsReadyAtOnce) {
  Node a;
  a.Activate(a.PartOf(1, 0, ""));
  Arena arena = a.Open(0, false);
  EXPECT_EQ(arena.Restore().state, RestoreState::kFresh);
  const SlotView view = a.Capture(1, 0, 1, 7, kSize);
  a.Activate(a.PartOf(2, 0, "", {7, 0, 1, view.crc_root, kSize, ""}));
  EXPECT_EQ(arena.Restore().state, RestoreState::kReady);
  EXPECT_EQ(arena.Restore().slot, 1u);
  EXPECT_EQ(arena.header()->agent.fence_generation, 2u);
}

TEST(Transfer, SurveyReportsWholeSlotsAndLeavesOutADamagedOne) {
  Node a;
  a.Activate(a.PartOf(1, 2, ""));
  a.Capture(1, 2, 0, 7, kSize);
  const SlotView newer = a.Capture(1, 2, 1, 8, kSize);
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u);
  Arena arena = a.Open(2, false);
  const_cast<unsigned char*>(arena.Payload(newer))[kSize - 1] ^= 1;
  const auto left = a.service->Survey(kJob);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].step, 7);
  EXPECT_TRUE(a.heard.Complains("slot 1, step 8: chunk 5 of 6"));
}

void SurveyNoPayloads(Node* node) {
  node->service.reset();
  node->options.survey_bytes = 0;
  node->Boot();
}

// Beyond survey_bytes payloads are not looked at: 40 GB would outlast the controller's patience.
// Whoever takes the bytes finds the damage, and from then on nobody is told of them.
TEST(Transfer, SurveyOfMuchMemoryReadsNoPayloadsAndLeavesOutWhatWasFoundDamaged) {
  Node a, b;
  SurveyNoPayloads(&a);
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 2, b.address()));
  a.Capture(1, 2, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const SlotView newer = a.Capture(1, 2, 1, 8, kSize);
  ASSERT_TRUE(b.heard.Copied(8, true));
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u);
  const auto held = b.service->Survey(kJob);
  ASSERT_EQ(held.size(), 2u);
  EXPECT_TRUE(held[0].replica);
  EXPECT_EQ(held[0].rank, 2);
  Arena arena = a.Open(2, false);
  unsigned char* payload = const_cast<unsigned char*>(arena.Payload(newer));
  payload[kSize - 1] ^= 1;
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u) << "the payload was read";
  EXPECT_FALSE(arena.Verify(newer).ok());
  const auto left = a.service->Survey(kJob);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].step, 7);
  EXPECT_TRUE(a.heard.Complains("slot 1, step 8: was found damaged"));
  payload[kSize - 1] ^= 1;
  EXPECT_TRUE(arena.Verify(newer).ok());
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u) << "it was put right";
  const_cast<std::uint32_t*>(arena.ChunkCrcs(newer))[2] ^= 1;
  EXPECT_EQ(a.service->Survey(kJob).size(), 1u);
  EXPECT_TRUE(a.heard.Complains("its chunk checksums give"));
  EXPECT_TRUE(a.service->Survey("no such job").empty());
}

// Both of a restore's ways outside the worker: a copy from the node's own memory, then a peer's.
TEST(Transfer, ASourceThatFailsItsCheckIsLeftOutAndTheNextOneIsTaken) {
  Node a, b;
  SurveyNoPayloads(&a);
  SurveyNoPayloads(&b);
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 2, b.address()));
  const SlotView view = a.Capture(1, 2, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.service->Begin(kJob, 2, "key");
  const auto spoil = [&](Node* node, bool replica, std::uint64_t at) {
    Arena arena = node->Open(2, replica);
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      if (const auto v = arena.Look(i)) const_cast<unsigned char*>(arena.Payload(*v))[at] ^= 1;
    }
  };
  spoil(&b, true, kSize / 2);
  b.Activate(b.PartOf(2, 3, "", {7, 2, 1, view.crc_root, kSize, a.address()}));
  ASSERT_TRUE(Becomes([&] { return b.Open(3, false).Restore().state == RestoreState::kReady; }));
  EXPECT_TRUE(b.Holds(3, false, 7, kSize)) << "not from the peer";
  EXPECT_FALSE(b.service->RestoreFailed(kJob, 2, 3));
  for (const HeldShard& s : b.service->Survey(kJob)) EXPECT_FALSE(s.replica) << "still named";

  // The peer's own bytes go bad, too: it is told apart from the wire, and its survey knows.
  spoil(&a, false, kSize / 3);
  EXPECT_EQ(a.service->Survey(kJob).size(), 1u);
  Node c;
  c.Activate(c.PartOf(2, 4, "", {7, 2, 1, view.crc_root, kSize, a.address()}));
  ASSERT_TRUE(Becomes([&] { return c.Open(4, false).Restore().state == RestoreState::kFailed; }));
  EXPECT_NE(c.Open(4, false).Restore().message.find("damaged in this node's memory"),
            std::string::npos)
      << c.Open(4, false).Restore().message;
  EXPECT_TRUE(c.service->RestoreFailed(kJob, 2, 4));
  EXPECT_FALSE(c.service->RestoreFailed(kJob, 1, 4));
  EXPECT_TRUE(a.service->Survey(kJob).empty());
}

// In place nobody but the worker reads: what it finds, its agent knows.
TEST(Transfer, ASlotThatFailsInItsWorkersHandsIsLeftOutAndThatRestoreHasFailed) {
  Node a;
  SurveyNoPayloads(&a);
  a.Activate(a.PartOf(1, 0, ""));
  a.Capture(1, 0, 0, 6, kSize);
  const SlotView view = a.Capture(1, 0, 1, 7, kSize);
  a.Activate(a.PartOf(2, 0, "", {7, 0, 1, view.crc_root, kSize, ""}));
  Arena arena = a.Open(0, false);
  ASSERT_EQ(arena.Restore().state, RestoreState::kReady);
  EXPECT_FALSE(a.service->RestoreFailed(kJob, 2, 0));
  const_cast<unsigned char*>(arena.Payload(view))[9] ^= 1;
  EXPECT_FALSE(arena.Verify(view).ok());
  EXPECT_TRUE(a.service->RestoreFailed(kJob, 2, 0));
  const auto left = a.service->Survey(kJob);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].step, 6);
  a.Activate(a.PartOf(3, 0, "", {7, 0, 1, view.crc_root, kSize, ""}));
  ASSERT_TRUE(Becomes([&] { return arena.Restore().state == RestoreState::kFailed; }))
      << "the damaged slot was announced again";
}

TEST(Transfer, ARestartedAgentGoesOnWithTheSamePart) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  const Part part = a.PartOf(1, 0, b.address());
  a.Activate(part);
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.service.reset();
  a.Capture(1, 0, 1, 8, kSize);  // nobody listened
  a.Boot();
  a.Activate(part);
  EXPECT_EQ(a.Open(0, false).Restore().state, RestoreState::kFresh)
      << "a running trainer was told anew";
  EXPECT_TRUE(b.heard.Copied(8, true)) << a.heard.Troubles();
}

// Prepare fences the arenas before Activate looks at them.
TEST(Transfer, ANewGenerationForgetsWhatTheOneBeforeReleasedAndToldItsPeer) {
  Node a, b, c;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  const SlotView view = a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.service->MarkReleased(kJob, 1, 9);
  a.service->Begin(kJob, 2, "key");
  c.service->Begin(kJob, 2, "key");
  a.Activate(a.PartOf(2, 0, c.address(), {7, 0, 1, view.crc_root, kSize, ""}));
  EXPECT_EQ(a.Open(0, false).header()->agent.released_step, kNoStep)
      << "captures of generation 2 would be given up before they were made";
  EXPECT_TRUE(c.heard.Copied(7, true)) << "the new peer never got it\n" << a.heard.Troubles();
}

TEST(Transfer, ArenasOfEarlierMembershipsGoWhenANewStepIsCommitted) {
  Node a, b;
  a.Activate(a.PartOf(1, 5, ""));
  a.Capture(1, 5, 0, 1, 1000);
  a.Activate(a.PartOf(2, 0, ""));
  a.Capture(2, 0, 0, 2, 1000);
  ASSERT_TRUE(a.heard.Copied(2, false));
  EXPECT_TRUE(a.Open(5, false).open());
  a.service->MarkCommitted(kJob, 2, 2);
  const auto deadline = steady_clock::now() + kPatience;
  while (a.Open(5, false).open() && steady_clock::now() < deadline) std::this_thread::yield();
  EXPECT_FALSE(a.Open(5, false).open());
  EXPECT_TRUE(a.Holds(0, false, 2, 1000));
}

TEST(Transfer, GarbageOnThePortIsDroppedAndTheNextPushWorks) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  Random random(9);
  for (int i = 0; i < 50; ++i) {
    auto c = Connection::Dial(b.address(), milliseconds(1000), milliseconds(1000),
                              steady_clock::now() + kPatience);
    ASSERT_TRUE(c.ok());
    std::vector<unsigned char> junk(random.Below(2000));
    for (auto& j : junk) j = static_cast<unsigned char>(random.Next());
    if (i % 2 == 0 && junk.size() > sizeof(HelloFrame)) {
      const HelloFrame hello{.nonce = 1};
      std::memcpy(junk.data(), &hello, sizeof hello);
    }
    (void)c.value().Send(junk.data(), junk.size());
  }
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(b.heard.Copied(7, true));
}

TEST(Transfer, TooManyConnectionsWaitForTheirTurn) {
  Node a, b;
  b.service.reset();
  b.options.max_connections = 1;
  b.options.io_timeout = milliseconds(300);
  b.Boot();
  b.service->Begin(kJob, 1, "key");
  auto idle = Connection::Dial(b.address(), milliseconds(1000), milliseconds(1000),
                               steady_clock::now() + kPatience);
  ASSERT_TRUE(idle.ok());
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(b.heard.Copied(7, true)) << "the idle connection was never given up";
}

TEST(Transfer, APortInUseIsNamed) {
  Node a;
  MemoryHost host;
  Recorder heard;
  TransferOptions options;
  options.port = a.service->port();
  const auto second = TransferService::Start(options, &host, &heard);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.error().message.find(std::to_string(options.port)), std::string::npos);
  EXPECT_NE(second.error().message.find("choose another port"), std::string::npos);
}

// Looks over its memory many times a second.
struct ScrubbingNode : Node {
  ScrubbingNode() {
    service->Stop();
    options.scrub = {.bytes_per_s = std::uint64_t{4} << 30, .every = milliseconds(50)};
    Boot();
  }
};

TEST(Scrub, AFlippedBitInAReplicaIsFoundNamedAndPutRightFromItsOwner) {
  Node a;
  ScrubbingNode b;
  b.service->Begin(kJob, 1, "key");
  b.Activate(b.PartOf(1, 5, ""));  // a member, with a rank of its own
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  ASSERT_TRUE(Becomes([&] { return b.service->scrubbed().checked_slots > 0; }));
  b.Flip(0, true, 7, (3u << 20) + 99);
  ASSERT_TRUE(b.heard.Until([&] { return !b.heard.damaged.empty(); }));
  const Recorder::Damage found = b.heard.Now(&Recorder::damaged).front();
  EXPECT_EQ(found.shard.rank, 0);
  EXPECT_EQ(found.shard.step, 7);
  EXPECT_TRUE(found.shard.replica);
  EXPECT_EQ(found.chunk, 3);
  EXPECT_EQ(found.by, "scrub");
  EXPECT_FALSE(b.Holds(0, true, 7, kSize));

  const std::size_t copied = b.heard.Now(&Recorder::copied).size();
  b.service->Mend(kJob, found.shard, a.address());
  EXPECT_TRUE(b.heard.Until([&] { return b.heard.copied.size() > copied; })) << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_EQ(b.service->scrubbed().damaged, 1u);
  EXPECT_EQ(b.service->scrubbed().repaired, 1u);
}

TEST(Scrub, ATableOfChecksumsThatWentBadIsPutRightToo) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  const SlotView view = a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  Arena arena = a.Open(0, false);
  const_cast<std::uint32_t*>(arena.ChunkCrcs(view))[1] ^= 4;
  a.Flip(0, false, 7, 5u << 20);
  a.service->Mend(kJob, ToShard(view, false), b.address());
  EXPECT_TRUE(Becomes([&] { return static_cast<bool>(a.Holds(0, false, 7, kSize)); }))
      << a.heard.Troubles();
}

TEST(Scrub, ASourceThatIsDamagedItselfMendsNothing) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  const SlotView view = a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.Flip(0, false, 7, 17);
  b.Flip(0, true, 7, 18);
  a.service->Mend(kJob, ToShard(view, false), b.address());
  EXPECT_TRUE(a.heard.Complains("mending step 7 of rank 0")) << a.heard.Troubles();
  EXPECT_FALSE(a.Holds(0, false, 7, kSize));
}

TEST(Scrub, WhatWasFoundDamagedIsNotRestoredFromInPlace) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  const SlotView view = a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.Flip(0, false, 7, 4u << 20);
  EXPECT_TRUE(a.service->Survey(kJob).empty());
  ASSERT_FALSE(a.heard.Now(&Recorder::damaged).empty());
  EXPECT_EQ(a.heard.Now(&Recorder::damaged).front().by, "survey");
  EXPECT_EQ(a.heard.Now(&Recorder::damaged).front().chunk, 4);
  b.service->Begin(kJob, 2, "key");
  a.Activate(a.PartOf(2, 0, b.address(),
                      {.step = 7,
                       .shard_rank = 0,
                       .shard_generation = 1,
                       .crc_root = view.crc_root,
                       .bytes = kSize,
                       .source_address = b.address()}));
  EXPECT_TRUE(Becomes([&] { return a.Open(0, false).Restore().state == RestoreState::kReady; }))
      << a.heard.Troubles();
  EXPECT_TRUE(a.Holds(0, false, 7, kSize));
}

TEST(Transfer, WhatARollBackGaveUpIsNotFoundAgain) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  const SlotView old = a.Capture(1, 0, 1, 8, 1000);
  ASSERT_TRUE(b.heard.Copied(8, true)) << b.heard.Troubles();
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u);
  Part part = a.PartOf(2, 0, b.address(), {.step = 7, .shard_rank = 0, .shard_generation = 1});
  part.given_up = {{.generation = 1, .step = 7}};
  a.Activate(part);
  const std::vector<HeldShard> left = a.service->Survey(kJob);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left.front().step, 7);
  // What the new generation captures beyond the step is its own.
  a.Capture(2, 0, old.slot, 8, 1000);
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u);
}

}  // namespace
}  // namespace everstep::checkpoint
