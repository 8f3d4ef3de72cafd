// Chunks that leave while the capture is still written. What they must never do: make a slot whole
// that no capture was, cost a committed step, or be in the way of the push that follows.
#include <gtest/gtest.h>

#include "checkpoint/store/capture_word.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/crc32c.h"
#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kLarge = (8u << 20) + 4321;
constexpr std::size_t kEnough = std::size_t{1} << 20;  // of the wire: headers, tables, words

// What a trainer holds between the begin and the end of a capture.
struct Capture {
  Capture(Node* node, std::uint32_t slot, Step step, std::uint64_t captured_ns,
          std::size_t payload_bytes)
      : fds(node->host.Open(kJob, {0, false}, 4096).value()),
        arena(std::move(Arena::Open(fds.memfd).value())),
        fields{
            .generation = 1, .step = step, .rank = 0, .world_size = 8, .captured_ns = captured_ns},
        writer(SlotWriter::Begin(&arena, slot, payload_bytes).value()) {
    writer.Announce(fields, payload_bytes);
    Ring();
  }
  ~Capture() { close(fds.eventfd); }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  void Ring() const {
    const std::uint64_t one = 1;
    EXPECT_EQ(write(fds.eventfd, &one, 8), 8);
  }
  void Write(const std::vector<unsigned char>& state, std::size_t from, std::size_t to) {
    EXPECT_TRUE(writer.Append(state.data() + from, to - from).ok());
  }
  void Finish() {
    EXPECT_TRUE(writer.Finish(fields, 0).ok());
    Ring();
  }
  ArenaFds fds;
  Arena arena;
  SlotFields fields;
  SlotWriter writer;
};

struct Ahead : ::testing::Test {
  void SetUp() override {
    a.service.reset();
    a.options.ahead_bytes = 0;
    a.Boot();
    b.service->Begin(kJob, 1, "key");
    a.Activate(a.PartOf(1, 0, proxy.address()));
  }
  // A step that both hold and know as committed.
  void Committed(std::uint32_t slot, Step step) {
    a.Capture(1, 0, slot, step, kLarge);
    ASSERT_TRUE(b.heard.Copied(step, true)) << a.heard.Troubles() << b.heard.Troubles();
    a.service->MarkCommitted(kJob, 1, step);
    b.service->MarkCommitted(kJob, 1, step);
  }
  // So many bytes of payload came over the wire since `before`.
  bool Came(std::uint64_t before, std::size_t bytes) {
    return Becomes([&] { return proxy.forwarded - before >= bytes; });
  }
  // No slot at the peer is whole and holds other bytes than its checksums say.
  bool AllWhole() {
    Arena arena = b.Open(0, true);
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena.Look(i);
      if (view && !arena.Verify(*view).ok()) return false;
    }
    return true;
  }
  Node a, b;
  Proxy proxy{b.service->port(), [](int, std::uint64_t, char*, std::size_t) { return true; }};
};

TEST_F(Ahead, WhatIsWrittenLeavesAndIsNotSentAgain) {
  const auto state = StateOf(7, kLarge);
  {
    Capture capture(&a, 0, 7, 1001, kLarge);
    capture.Write(state, 0, 5 * kChunkBytes + 77);
    ASSERT_TRUE(Came(0, std::size_t{5} * kChunkBytes)) << a.heard.Troubles();
    EXPECT_FALSE(b.Open(0, true).Newest()) << "half a capture counts at the peer";
    capture.Write(state, 5 * kChunkBytes + 77, kLarge);
    capture.Finish();
  }
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
  EXPECT_LT(proxy.forwarded, kLarge + kEnough) << "sent twice";
  EXPECT_TRUE(Becomes([&] { return a.Pushes(PeerOutcome::kDone) == 1; }));
  EXPECT_GE(a.service->traffic()->Report().resumed_bytes, 5u * kChunkBytes);
  EXPECT_EQ(a.heard.Troubles() + b.heard.Troubles(), "");
}

TEST_F(Ahead, ACaptureThatBeginsAnewSharesNothingWithTheOneGivenUp) {
  const auto first = StateOf(6, kLarge), second = StateOf(7, kLarge);
  {
    Capture capture(&a, 0, 7, 1001, kLarge);
    capture.Write(first, 0, 5 * kChunkBytes);
    ASSERT_TRUE(Came(0, std::size_t{5} * kChunkBytes));
  }  // never finished: the same step again, in the same slot, under the same odd sequence
  {
    Capture capture(&a, 0, 7, 1002, kLarge);
    capture.Write(second, 0, kLarge);
    capture.Finish();
  }
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.HoldsBytes(0, true, 7, second));
}

// Even if the clock gave both the same name: a chunk counts only when the table names its CRC.
TEST_F(Ahead, ChunksThatTheTableDoesNotNameAreAskedForAgain) {
  const auto first = StateOf(6, kLarge);
  auto second = first;
  second[3 * kChunkBytes + 5] ^= 1;
  {
    Capture capture(&a, 0, 7, 1001, kLarge);
    capture.Write(first, 0, 5 * kChunkBytes);
    ASSERT_TRUE(Came(0, std::size_t{5} * kChunkBytes));
  }
  {
    Capture capture(&a, 0, 7, 1001, kLarge);
    capture.Write(second, 0, kLarge);
    capture.Finish();
  }
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.HoldsBytes(0, true, 7, second));
}

TEST_F(Ahead, AStateThatEndsElsewhereThanAnnouncedArrivesWhole) {
  const auto state = StateOf(7, kLarge);
  {
    Capture capture(&a, 0, 7, 1001, kLarge);
    capture.Write(state, 0, 6 * kChunkBytes);
    ASSERT_TRUE(Came(0, std::size_t{6} * kChunkBytes));
    capture.Write(state, 6 * kChunkBytes, 6 * kChunkBytes + 64);
    capture.Finish();
  }
  ASSERT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.HoldsBytes(0, true, 7, {state.begin(), state.begin() + 6 * kChunkBytes + 64}));
}

TEST_F(Ahead, OnlyASlotOlderThanTheNewestCommitIsTakenForIt) {
  Committed(0, 7);
  a.Capture(1, 0, 1, 8, kLarge);  // whole at the peer, not committed yet
  ASSERT_TRUE(b.heard.Copied(8, true));
  const auto state = StateOf(9, kLarge);
  const std::uint64_t before = proxy.forwarded;
  const std::uint64_t said = proxy.returned;
  Capture capture(&a, 0, 9, 1001, kLarge);
  capture.Write(state, 0, 5 * kChunkBytes);
  ASSERT_TRUE(Becomes([&] {  // it has answered
    return proxy.returned - said >= sizeof(HelloFrame) + sizeof(ResponseFrame);
  }));
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
  EXPECT_TRUE(b.Holds(0, true, 8, kLarge));
  EXPECT_LT(proxy.forwarded - before, kEnough) << "chunks went to a peer that has no slot for them";
  capture.Write(state, 5 * kChunkBytes, kLarge);
  capture.Finish();
  ASSERT_TRUE(b.heard.Copied(9, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 9, kLarge));
}

TEST_F(Ahead, ATrainerThatDiesInTheMiddleLeavesTheCommittedStepAtThePeer) {
  Committed(0, 7);
  Committed(1, 8);
  {
    Capture capture(&a, 0, 9, 1001, kLarge);
    const std::uint64_t before = proxy.forwarded;
    capture.Write(StateOf(9, kLarge), 0, 4 * kChunkBytes);
    ASSERT_TRUE(Came(before, std::size_t{4} * kChunkBytes));
  }
  EXPECT_TRUE(b.Holds(0, true, 8, kLarge));
  EXPECT_FALSE(b.Holds(0, true, 9, kLarge));
  // Its successor restores, and captures the step again.
  b.service->Begin(kJob, 2, "key");
  a.Activate(a.PartOf(2, 0, proxy.address()));
  a.Capture(2, 0, 0, 9, kLarge);
  ASSERT_TRUE(b.heard.Copied(9, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 9, kLarge));
}

TEST_F(Ahead, ChunksThatDidNotChangeAreNotSent) {
  Committed(0, 7);
  auto state = StateOf(7, kLarge);
  state[2 * kChunkBytes + 5] ^= 1;
  const std::uint64_t before = proxy.forwarded;
  {
    Capture capture(&a, 1, 8, 1001, kLarge);
    capture.Write(state, 0, kLarge);
    ASSERT_TRUE(Came(before, kChunkBytes));
    capture.Finish();
  }
  ASSERT_TRUE(b.heard.Copied(8, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.HoldsBytes(0, true, 8, state));
  EXPECT_LT(proxy.forwarded - before, 2 * kEnough);
}

TEST_F(Ahead, CapturesThatEndInEveryPossibleWayNeverTearAPeersSlot) {
  Random random(3);
  std::uint32_t slot = 0;
  Step committed = kNoStep;
  for (Step step = 1; step <= 40; ++step) {
    const auto state = StateOf(step, kLarge);
    const std::uint64_t given_up_at = random.Below(2) == 0 ? random.Below(kLarge) : kLarge;
    {
      Capture capture(&a, slot, step, static_cast<std::uint64_t>(step), kLarge);
      capture.Write(state, 0, given_up_at);
      if (given_up_at < kLarge) continue;  // the next one writes over it while it may be sent
      capture.Finish();
    }
    ASSERT_TRUE(b.heard.Copied(step, true)) << a.heard.Troubles() << b.heard.Troubles();
    ASSERT_TRUE(b.Holds(0, true, step, kLarge));
    ASSERT_TRUE(AllWhole());
    a.service->MarkCommitted(kJob, 1, step);
    b.service->MarkCommitted(kJob, 1, step);
    committed = step;
    slot = 1 - slot;
  }
  EXPECT_NE(committed, kNoStep);
  EXPECT_TRUE(b.Holds(0, true, committed, kLarge));
}

// A client that says what it likes ahead of a table.
struct HostileAhead : Ahead {
  // The answer to an ahead conversation that sends `frame` and `bytes`.
  Outcome Says(const ChunkFrame& frame, const std::vector<unsigned char>& bytes, bool last) {
    const PeerTask task{.address = b.address(),
                        .job = kJob,
                        .key = DeriveKey("key"),
                        .generation = 1,
                        .limits = {}};
    const SlotFields fields{.generation = 1,
                            .step = 7,
                            .rank = 0,
                            .world_size = 8,
                            .payload_bytes = kLarge,
                            .table_offset = kLarge,
                            .captured_ns = 5,
                            .job_crc = Crc32c(kJob.data(), kJob.size())};
    const auto ask = [&] {
      return Converse(task, {.op = Op::kAhead, .fields = fields}, DeadlineFor(task.limits, kLarge));
    };
    auto talk = ask();
    const auto until = steady_clock::now() + kPatience;  // the one before may not have ended yet
    while (!talk.ok() && talk.error().code == ErrorCode::kUnavailable &&
           steady_clock::now() < until) {
      talk = ask();
    }
    if (!talk.ok()) return talk.error();
    if (auto ok = talk.value().connection.Send(&frame, sizeof frame); !ok.ok()) return ok;
    if (auto ok = talk.value().connection.Send(bytes.data(), bytes.size()); !ok.ok()) return ok;
    if (last) {
      if (auto ok = SendEndOfChunks(&talk.value().connection); !ok.ok()) return ok;
    }
    return talk.value().Ack(task.key);
  }
};

TEST_F(HostileAhead, FramesThatMakeNoSenseEndIt) {
  const auto chunk = StateOf(1, kChunkBytes);
  const std::uint32_t crc = Crc32c(chunk.data(), chunk.size());
  EXPECT_TRUE(Says({.index = 2, .bytes = kChunkBytes, .crc = crc}, chunk, true).ok());
  const auto code = [&](const ChunkFrame& frame, bool with_bytes = false) {
    const auto said = Says(frame, with_bytes ? chunk : std::vector<unsigned char>(), false);
    return said.ok() ? ErrorCode::kInternal : said.error().code;
  };
  EXPECT_EQ(code({.index = 2, .bytes = kChunkBytes, .crc = crc ^ 1}, true), ErrorCode::kCorrupt);
  EXPECT_EQ(code({.index = 8, .bytes = kChunkBytes, .crc = crc}), ErrorCode::kInvalid);
  EXPECT_EQ(code({.index = 2, .bytes = 5, .crc = crc}), ErrorCode::kInvalid);
  EXPECT_EQ(code({.magic = 1, .index = 2, .bytes = kChunkBytes, .crc = crc}), ErrorCode::kInvalid);
  EXPECT_FALSE(b.Open(0, true).Newest());
  a.Capture(1, 0, 0, 7, kLarge);
  ASSERT_TRUE(b.heard.Copied(7, true)) << "it is in the way of a push: " << a.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kLarge));
}

}  // namespace
}  // namespace everstep::checkpoint
