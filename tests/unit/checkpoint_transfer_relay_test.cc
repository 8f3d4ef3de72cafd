// Restores whose source is another restore: what was checked is passed on, what does not come is
// asked of a holder.
#include <gtest/gtest.h>

#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kLarge = (9u << 20) + 321;

bool Pass(int, std::uint64_t, char*, std::size_t) {
  return true;
}

// a holds step 7 of rank 0; b, c and d want it in generation 2.
struct Relays : ::testing::Test {
  void SetUp() override {
    for (Node* node : {&b, &c, &d}) {
      node->service.reset();
      node->options.relay_timeout = milliseconds(300);
      node->Boot();
    }
    a.Activate(a.PartOf(1, 0, ""));
    view = a.Capture(1, 0, 0, 7, kLarge);
    for (Node* node : {&a, &b, &c, &d}) node->service->Begin(kJob, 2, "key");
  }
  RestorePart From(const std::string& source, std::uint32_t relay, const std::string& holder) {
    RestorePart part{7, 0, 1, view.crc_root, kLarge, source};
    part.relay = relay;
    if (!holder.empty()) part.others = {holder};
    return part;
  }
  ::testing::AssertionResult Restored(Node* node, Rank rank) {
    Arena arena = node->Open(rank, false);
    if (!Becomes([&] { return arena.Restore().state != RestoreState::kPending; })) {
      return ::testing::AssertionFailure() << "pending still";
    }
    if (arena.Restore().state != RestoreState::kReady) {
      return ::testing::AssertionFailure() << arena.Restore().message;
    }
    return node->Holds(rank, false, 7, kLarge);
  }
  Node a, b, c, d;
  SlotView view;
};

TEST_F(Relays, ALineOfTakersCostsItsHolderOneShard) {
  Proxy holder(a.service->port(), Pass), first(b.service->port(), Pass),
      second(c.service->port(), Pass);
  // The last one asks first: it waits for those before it.
  d.Activate(d.PartOf(2, 3, "", From(second.address(), 2, holder.address())));
  c.Activate(c.PartOf(2, 2, "", From(first.address(), 1, holder.address())));
  b.Activate(b.PartOf(2, 1, "", From(holder.address(), 0, "")));
  EXPECT_TRUE(Restored(&b, 1));
  EXPECT_TRUE(Restored(&c, 2));
  EXPECT_TRUE(Restored(&d, 3));
  EXPECT_EQ(holder.connections, 1);
  EXPECT_LT(holder.returned, kLarge + 10'000);
  EXPECT_GT(first.returned, kLarge);
  EXPECT_GT(second.returned, kLarge);
}

TEST_F(Relays, WhatIsCheckedIsPassedOnWhileTheRestIsOnItsWay) {
  std::atomic<bool> open{false};
  Proxy holder(a.service->port(), Pass, [&](int, std::uint64_t offset, char*, std::size_t) {
    return offset < 4'000'000 || Becomes([&] { return open.load(); });
  });
  Proxy passed_on(b.service->port(), Pass);
  c.service.reset();
  c.options.relay_timeout = milliseconds(20'000);
  c.Boot();
  c.service->Begin(kJob, 2, "key");
  b.Activate(b.PartOf(2, 1, "", From(holder.address(), 0, "")));
  c.Activate(c.PartOf(2, 2, "", From(passed_on.address(), 1, a.address())));
  EXPECT_TRUE(Becomes([&] { return passed_on.returned > 2'000'000; }));
  EXPECT_EQ(b.Open(1, false).Restore().state, RestoreState::kPending);
  EXPECT_LT(passed_on.returned, 4'100'000u) << "what was not there";
  open = true;
  EXPECT_TRUE(Restored(&b, 1));
  EXPECT_TRUE(Restored(&c, 2));
}

TEST_F(Relays, ASourceThatDiesMidwayIsReplacedByTheHolderForWhatLacks) {
  std::atomic<bool> open{false};
  Proxy slow(a.service->port(), Pass, [&](int, std::uint64_t offset, char*, std::size_t) {
    return offset < 5'000'000 || Becomes([&] { return open.load(); });
  });
  Proxy passed_on(b.service->port(), Pass), holder(a.service->port(), Pass);
  b.Activate(b.PartOf(2, 1, "", From(slow.address(), 0, "")));
  c.Activate(c.PartOf(2, 2, "", From(passed_on.address(), 1, holder.address())));
  ASSERT_TRUE(Becomes([&] { return passed_on.returned > std::uint64_t{4} * kChunkBytes; }));
  EXPECT_EQ(holder.connections, 0);
  b.service->Stop();
  EXPECT_TRUE(Restored(&c, 2));
  EXPECT_LT(holder.returned, kLarge - std::uint64_t{3} * kChunkBytes)
      << "what was there came again";
  open = true;
}

TEST_F(Relays, ASourceThatStallsIsLeftForTheHolder) {
  std::atomic<bool> open{false};
  Proxy slow(a.service->port(), Pass, [&](int, std::uint64_t offset, char*, std::size_t) {
    return offset < 5'000'000 || Becomes([&] { return open.load(); });
  });
  b.Activate(b.PartOf(2, 1, "", From(slow.address(), 0, "")));
  c.Activate(c.PartOf(2, 2, "", From(b.address(), 1, a.address())));
  // Whoever takes it from c need not turn to anybody.
  Proxy holder(a.service->port(), Pass);
  d.service.reset();
  d.options.relay_timeout = milliseconds(20'000);
  d.Boot();
  d.service->Begin(kJob, 2, "key");
  d.Activate(d.PartOf(2, 3, "", From(c.address(), 2, holder.address())));
  EXPECT_TRUE(Restored(&c, 2));
  EXPECT_TRUE(Restored(&d, 3));
  EXPECT_EQ(holder.connections, 0);
  EXPECT_EQ(b.Open(1, false).Restore().state, RestoreState::kPending);
  open = true;
  EXPECT_TRUE(Restored(&b, 1));
}

TEST_F(Relays, ASourceThatCrawlsIsLeftForTheHolder) {
  c.service.reset();
  c.options.relay_bytes_per_second = 64u << 20;
  c.Boot();
  c.service->Begin(kJob, 2, "key");
  b.Activate(b.PartOf(2, 1, "", From(a.address(), 0, "")));
  ASSERT_TRUE(Restored(&b, 1));
  Proxy crawl(b.service->port(), Pass, [](int, std::uint64_t, char*, std::size_t) {
    std::this_thread::sleep_for(milliseconds(50));  // 1.3 MB/s at most
    return true;
  });
  c.Activate(c.PartOf(2, 2, "", From(crawl.address(), 1, a.address())));
  EXPECT_TRUE(Restored(&c, 2));
  EXPECT_LT(crawl.returned, kLarge);
}

TEST_F(Relays, ASourceThatNeverTakesItIsLeftForTheHolder) {
  c.Activate(c.PartOf(2, 2, "", From(b.address(), 1, a.address())));
  EXPECT_TRUE(Restored(&c, 2));
}

TEST_F(Relays, ASourceWhoseGenerationIsOverIsLeftForTheHolder) {
  std::atomic<bool> open{false};
  Proxy slow(a.service->port(), Pass, [&](int, std::uint64_t offset, char*, std::size_t) {
    return offset < 5'000'000 || Becomes([&] { return open.load(); });
  });
  Proxy passed_on(b.service->port(), Pass);
  b.Activate(b.PartOf(2, 1, "", From(slow.address(), 0, "")));
  c.Activate(c.PartOf(2, 2, "", From(passed_on.address(), 1, a.address())));
  ASSERT_TRUE(Becomes([&] { return passed_on.returned > std::uint64_t{2} * kChunkBytes; }));
  b.service->Begin(kJob, 3, "key");
  EXPECT_TRUE(Restored(&c, 2));
  open = true;
}

TEST_F(Relays, AChunkThatIsSpoiledOnTheWayIsNeitherBelievedNorPassedOn) {
  std::atomic<int> flipped{0};
  Proxy spoils(b.service->port(), Pass, [&](int, std::uint64_t offset, char* data, std::size_t n) {
    if (offset <= 3'000'000 && 3'000'000 < offset + n) {
      data[3'000'000 - offset] ^= 1;
      ++flipped;
    }
    return true;
  });
  b.Activate(b.PartOf(2, 1, "", From(a.address(), 0, "")));
  c.Activate(c.PartOf(2, 2, "", From(spoils.address(), 1, a.address())));
  d.Activate(d.PartOf(2, 3, "", From(c.address(), 2, a.address())));
  EXPECT_TRUE(Restored(&c, 2));
  EXPECT_TRUE(Restored(&d, 3));
  EXPECT_EQ(flipped, 1);
}

TEST_F(Relays, OneWhoHasItAlreadyServesItWhicheverRankItIs) {
  b.Activate(b.PartOf(2, 1, "", From(a.address(), 0, "")));
  ASSERT_TRUE(Restored(&b, 1));
  c.Activate(c.PartOf(2, 2, "", From(b.address(), 1, "")));
  EXPECT_TRUE(Restored(&c, 2));
  // Also who is asked as a holder: it may be the only one that is left.
  d.Activate(d.PartOf(2, 3, "", From(b.address(), 0, "")));
  EXPECT_TRUE(Restored(&d, 3));
}

TEST_F(Relays, ALaterRankOfItsNodeTakesItFromThereWithoutAWire) {
  b.Activate(b.PartOf(2, 1, "", From(a.address(), 0, "")));
  ASSERT_TRUE(Restored(&b, 1));
  b.Activate(b.PartOf(3, 2, "", From("", 0, "")));
  EXPECT_TRUE(Restored(&b, 2));
}

TEST_F(Relays, WhatRotsInAnotherRanksArenaIsMendedThere) {
  b.Activate(b.PartOf(2, 1, "", From(a.address(), 0, "")));
  ASSERT_TRUE(Restored(&b, 1));
  b.Flip(1, false, 7, (3u << 20) + 5);
  ASSERT_FALSE(b.Holds(1, false, 7, kLarge));
  b.service->Mend(kJob, ToShard(view, false), a.address());
  EXPECT_TRUE(Becomes([&] { return bool(b.Holds(1, false, 7, kLarge)); })) << b.heard.Troubles();
}

TEST_F(Relays, TwoRanksOfANodeTakeItOverTheLinkOnce) {
  Proxy holder(a.service->port(), Pass);
  Part part = b.PartOf(2, 1, "", From(holder.address(), 0, ""));
  part.workers.push_back({2, From(b.address(), 1, holder.address())});
  b.Activate(part);
  EXPECT_TRUE(Restored(&b, 1));
  EXPECT_TRUE(Restored(&b, 2));
  EXPECT_EQ(holder.connections, 1);
}

TEST_F(Relays, WithoutAHolderThatHasItTheRestoreFailsAndSaysWhy) {
  Node empty;
  empty.service->Begin(kJob, 2, "key");
  c.Activate(c.PartOf(2, 2, "", From(b.address(), 1, empty.address())));
  Arena arena = c.Open(2, false);
  ASSERT_TRUE(Becomes([&] { return arena.Restore().state != RestoreState::kPending; }));
  EXPECT_EQ(arena.Restore().state, RestoreState::kFailed);
  EXPECT_NE(arena.Restore().message.find("is not here (any more)"), std::string::npos)
      << arena.Restore().message;
}

}  // namespace
}  // namespace everstep::checkpoint
