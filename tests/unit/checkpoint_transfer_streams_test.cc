// Slots over several connections, and slots of which most did not change.
#include <gtest/gtest.h>

#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kLarge = (97u << 20) + 321;  // three streams pay

struct Streams : ::testing::Test {
  void SetUp() override {
    a.service.reset();
    a.options.streams = 3;
    a.Boot();
    b.service->Begin(kJob, 1, "key");
  }
  Node a, b;
};

TEST_F(Streams, ALargeSlotTakesSeveralAndIsWhole) {
  Proxy proxy(b.service->port(), [](int, std::uint64_t, char*, std::size_t) { return true; });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kLarge);
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
  EXPECT_EQ(proxy.connections, 3);
  EXPECT_LT(proxy.forwarded, kLarge + (1u << 20)) << "sent twice";
}

TEST_F(Streams, OneThatBreaksCostsOnlyWhatWasUnderWay) {
  std::atomic<bool> broken{false};
  Proxy proxy(b.service->port(), [&](int number, std::uint64_t offset, char*, std::size_t) {
    if (number != 1 || broken || offset < 5'000'000) return true;
    broken = true;
    return false;
  });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kLarge);
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(broken);
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
  EXPECT_LT(proxy.forwarded, kLarge + (20u << 20));
}

TEST_F(Streams, AByteFlippedOnAFurtherStreamIsCaught) {
  std::atomic<bool> flipped{false};
  Proxy proxy(b.service->port(), [&](int number, std::uint64_t offset, char* data, std::size_t n) {
    if (number == 1 && !flipped && offset <= 3'000'000 && 3'000'000 < offset + n) {
      data[3'000'000 - offset] ^= 1;
      flipped = true;
    }
    return true;
  });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kLarge);
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(flipped);
  EXPECT_TRUE(b.heard.Complains("arrived with CRC")) << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
}

TEST_F(Streams, ARestoreComesInSeveralToo) {
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kLarge);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const HeldShard shard = b.heard.Now(&Recorder::copied).front();
  a.service->Stop();
  b.service->Begin(kJob, 2, "key");
  std::atomic<bool> broken{false};
  Proxy proxy(b.service->port(), [](int, std::uint64_t, char*, std::size_t) { return true; });
  Node c;
  c.service.reset();
  c.options.streams = 3;
  c.Boot();
  c.Activate(c.PartOf(2, 0, "", {7, 0, 1, shard.crc_root, shard.bytes, proxy.address()}));
  Arena arena = c.Open(0, false);
  ASSERT_TRUE(Becomes([&] { return arena.Restore().state != RestoreState::kPending; }));
  ASSERT_EQ(arena.Restore().state, RestoreState::kReady) << arena.Restore().message;
  EXPECT_TRUE(c.Holds(0, false, 7, kLarge));
  EXPECT_EQ(proxy.connections, 3);
}

struct Unchanged : ::testing::Test {
  void SetUp() override {
    b.service->Begin(kJob, 1, "key");
    state = StateOf(7, kSize);
  }
  void Next(Step step, std::uint32_t slot) {
    a.CaptureBytes(1, 0, slot, step, state);
    ASSERT_TRUE(b.heard.Copied(step, true)) << a.heard.Troubles() << b.heard.Troubles();
    a.service->MarkCommitted(kJob, 1, step);
    b.service->MarkCommitted(kJob, 1, step);
  }
  Node a, b;
  std::vector<unsigned char> state;
};

TEST_F(Unchanged, ChunksAreNotSentAgain) {
  Proxy proxy(b.service->port(), [](int, std::uint64_t, char*, std::size_t) { return true; });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  Next(7, 0);
  const std::uint64_t first = proxy.forwarded;
  state[2 * kChunkBytes + 5] ^= 1;
  Next(8, 1);
  EXPECT_LT(proxy.forwarded - first, kChunkBytes + 1000u);
  EXPECT_TRUE(b.HoldsBytes(0, true, 8, state));
  EXPECT_TRUE(Becomes([&] { return a.Pushes(PeerOutcome::kDone) == 2; }));
  EXPECT_EQ(a.service->traffic()->Report().unchanged_bytes, 5u * kChunkBytes);
  const std::uint64_t second = proxy.forwarded;
  Next(9, 0);  // nothing changed at all
  EXPECT_LT(proxy.forwarded - second, 1000u);
  EXPECT_TRUE(b.HoldsBytes(0, true, 9, state));
}

TEST_F(Unchanged, AChunkThatRottedAtThePeerIsSentAgain) {
  a.Activate(a.PartOf(1, 0, b.address()));
  Next(7, 0);
  Arena replica = b.Open(0, true);
  const auto held = replica.Newest();
  ASSERT_TRUE(held);
  const_cast<unsigned char*>(replica.Payload(*held))[3 * kChunkBytes + 77] ^= 0x10;
  state[0] ^= 1;
  Next(8, 1);
  EXPECT_TRUE(b.heard.Complains("chunk 3 of step 7 has CRC")) << b.heard.Troubles();
  EXPECT_TRUE(b.HoldsBytes(0, true, 8, state));
}

TEST_F(Unchanged, AnotherSizeSharesWhatLiesWhereItLay) {
  a.Activate(a.PartOf(1, 0, b.address()));
  Next(7, 0);
  state.resize(kSize + std::size_t{2} * kChunkBytes, 3);
  Next(8, 1);
  EXPECT_TRUE(b.HoldsBytes(0, true, 8, state));
  state.resize(kSize / 2);
  Next(9, 0);
  EXPECT_TRUE(b.HoldsBytes(0, true, 9, state));
}

}  // namespace
}  // namespace everstep::checkpoint
