// proto/base: what every process relies on.
#include <thread>

#include <gtest/gtest.h>

#include "proto/base/clock.h"
#include "proto/base/mailbox.h"
#include "proto/base/random.h"

namespace everstep {
namespace {

TEST(Timestamp, FormatsAsRfc3339WithMilliseconds) {
  EXPECT_EQ(FormatTimestamp({1'700'000'000'123'456'789}), "2023-11-14T22:13:20.123Z");
}

TEST(RealClock, NeverGoesBack) {
  RealClock clock;
  const Timestamp first = clock.Now();
  EXPECT_GE(clock.Now().ns, first.ns);
}

TEST(Random, IsSplitMix64) {
  Random random(0);  // reference values of the published algorithm
  EXPECT_EQ(random.Next(), 0xE220A8397B1DCDAFULL);
  EXPECT_EQ(random.Next(), 0x6E789E6AA1B965F4ULL);
}

TEST(Random, BetweenIncludesBothEnds) {
  Random random(7);
  bool low = false;
  bool high = false;
  for (int i = 0; i < 1000; ++i) {
    const auto v = random.Between(-1, 1);
    ASSERT_GE(v, -1);
    ASSERT_LE(v, 1);
    low |= v == -1;
    high |= v == 1;
  }
  EXPECT_TRUE(low && high);
}

TEST(Mailbox, RefusesWhenFullAndWhenClosed) {
  Mailbox<int> box(2);
  EXPECT_TRUE(box.Push(1));
  EXPECT_TRUE(box.Push(2));
  EXPECT_FALSE(box.Push(3));
  EXPECT_EQ(box.PopAll(std::chrono::steady_clock::now()), (std::vector<int>{1, 2}));
  box.Close();
  EXPECT_FALSE(box.Push(4));
}

TEST(Mailbox, WakesItsReader) {
  Mailbox<int> box(8);
  std::thread writer([&] { EXPECT_TRUE(box.Push(42)); });
  const auto items = box.PopAll(std::chrono::steady_clock::now() + std::chrono::seconds(20));
  writer.join();
  EXPECT_EQ(items, std::vector<int>{42});
}

}  // namespace
}  // namespace everstep
