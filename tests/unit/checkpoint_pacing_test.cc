// When checkpoint bytes may go: Algorithm 2, the head-of-line bound, the limit on the step's time,
// the classes. Time is simulated.
#include "checkpoint/core/gap_trace.h"
#include "checkpoint/core/pacing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

TEST(FillSpans, FillsTheSpansInOrderAndTheRestGoesBehindTheLast) {
  // 100 bytes/s, no latency; two spans of 1 s used to 90 %: 90 bytes each, 20 remain.
  const auto chunks = FillSpans({.idle_s = {1, 1},
                                 .safety = 0.9,
                                 .bytes = 200,
                                 .copies = 1,
                                 .chunk_bytes = 60,
                                 .link = {.alpha_s = 0, .bytes_per_s = 100}});
  ASSERT_EQ(chunks.size(), 5u);
  EXPECT_EQ(chunks[0].bytes, 60u);
  EXPECT_EQ(chunks[1].bytes, 30u);
  EXPECT_EQ(chunks[2].span, 1u);
  EXPECT_EQ(chunks[3].bytes, 30u);
  EXPECT_EQ(chunks[4].span, 2u);
  EXPECT_EQ(chunks[4].bytes, 20u);
}

TEST(FillSpans, ASpanShorterThanTheLatencyIsLeftNotSpunOn) {
  const auto chunks = FillSpans({.idle_s = {0.001, 0.0005},
                                 .bytes = 10,
                                 .copies = 2,
                                 .chunk_bytes = 10,
                                 .link = {.alpha_s = 0.01, .bytes_per_s = 1000}});
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[0].span, 2u);
  EXPECT_EQ(chunks[1].copy, 1);
}

TEST(FillSpans, NeverMoreThanASpanAndEveryByteOfEveryCopy) {
  Random random(4);
  for (int world = 0; world < 3000; ++world) {
    SpanRequest r;
    for (std::uint64_t i = random.Below(12); i > 0; --i) {
      r.idle_s.push_back(static_cast<double>(random.Below(1000)) / 1000);
    }
    r.safety = 0.05 + 0.9 * static_cast<double>(random.Below(100)) / 100;
    r.bytes = 1 + random.Below(1'000'000);
    r.copies = 1 + static_cast<int>(random.Below(4));
    r.chunk_bytes = 1 + random.Below(random.Below(2) == 0 ? 100'000 : 2'000'000);
    if (r.bytes / r.chunk_bytes > 20'000) r.chunk_bytes = r.bytes / 20'000;
    r.link = {static_cast<double>(random.Below(50)) / 1000,
              1e3 * std::pow(10, static_cast<double>(random.Below(5)))};
    std::vector<double> used(r.idle_s.size() + 1);
    std::vector<std::uint64_t> sent(static_cast<std::size_t>(r.copies));
    std::size_t last = 0;
    for (const SpanChunk& c : FillSpans(r)) {
      ASSERT_GE(c.span, last) << "world " << world;
      last = c.span;
      ASSERT_LE(c.bytes, r.chunk_bytes);
      ASSERT_GT(c.bytes, 0u);
      used[c.span] += r.link.Seconds(static_cast<double>(c.bytes));
      sent[static_cast<std::size_t>(c.copy)] += c.bytes;
    }
    for (std::size_t i = 0; i < r.idle_s.size(); ++i) {
      ASSERT_LE(used[i], r.safety * r.idle_s[i] + 1e-9) << "world " << world << " span " << i;
    }
    for (const std::uint64_t bytes : sent) ASSERT_EQ(bytes, r.bytes) << "world " << world;
  }
}

TEST(InFlight, IsAFractionOfTheLayersSlackWithinItsBounds) {
  EXPECT_EQ(InFlightBytes(0, 0, 1e9), kUsualInFlight);
  EXPECT_EQ(InFlightBytes(0.040, 0.020, 1e9), 1'000'000u);  // 5 % of 20 ms at 1 GB/s
  EXPECT_EQ(InFlightBytes(0.001, 0.002, 1e9), kLeastInFlight);
  EXPECT_EQ(InFlightBytes(10, 0, 1e10), kMostInFlight);
}

TEST(StepLimit, StepsThatStayAsTheyAreAreNeverLimited) {
  StepLimit limit;
  for (int i = 0; i < 500; ++i) {
    limit.OnStep({.step_s = 0.1 + 0.001 * (i % 3), .bytes = 100 * kMiB, .busy_s = 0.05});
    ASSERT_TRUE(std::isinf(limit.rate()));
  }
  EXPECT_LT(limit.slowdown(), 0.02);
  EXPECT_NEAR(limit.baseline_s(), 0.1, 1e-3);
}

TEST(StepLimit, HalvesWhenStepsGetSlowerAndClimbsAChunkAStepWhenTheyDoNot) {
  StepLimit limit({.chunk_bytes = 16 * kMiB});
  for (int i = 0; i < 10; ++i) limit.OnStep({.step_s = 0.1});  // without traffic
  const StepSample slow{.step_s = 0.15, .bytes = 10 * kMiB, .busy_s = 0.01};
  for (std::size_t i = 0; i < StepLimit::kSettle; ++i) limit.OnStep(slow);
  EXPECT_DOUBLE_EQ(limit.rate(), 500.0 * kMiB);  // half of 10 MiB in 10 ms
  EXPECT_EQ(limit.backoffs(), 1u);
  EXPECT_NEAR(limit.slowdown(), 0.5, 1e-9);
  const StepSample fine{.step_s = 0.1, .bytes = 10 * kMiB, .busy_s = 0.02};
  for (std::size_t i = 0; i < StepLimit::kSettle; ++i) limit.OnStep(fine);
  EXPECT_DOUBLE_EQ(limit.rate(), 516.0 * kMiB);
  limit.OnStep(fine);
  EXPECT_DOUBLE_EQ(limit.rate(), 532.0 * kMiB);
}

TEST(StepLimit, APushAlwaysFitsAStep) {
  StepLimit limit;
  for (int i = 0; i < 10; ++i) limit.OnStep({.step_s = 0.1});
  for (int i = 0; i < 1000; ++i) {
    limit.OnStep({.step_s = 0.3, .bytes = 100 * kMiB, .busy_s = 0.05});
    ASSERT_GE(limit.rate(), 1000.0 * kMiB);
  }
  EXPECT_DOUBLE_EQ(limit.rate(), 1000.0 * kMiB);
}

// Most chunks of every second step stay as they are, and are not sent.
TEST(StepLimit, AStepWithLittleToSendDoesNotSlowAFullOne) {
  StepLimit limit;
  for (int i = 0; i < 10; ++i) limit.OnStep({.step_s = 0.1});
  for (int i = 0; i < 1000; ++i) {
    const std::uint64_t bytes = i % 2 == 0 ? 100 * kMiB : kMiB;
    limit.OnStep(
        {.step_s = 0.3, .bytes = bytes, .busy_s = 1e-3 * static_cast<double>(bytes) / kMiB});
    ASSERT_GE(limit.rate(), 980.0 * kMiB) << i;
  }
  EXPECT_GT(limit.backoffs(), 0u);
}

// The wall clock that dates captures may be set, or the machine may sleep: one step of an hour.
TEST(StepLimit, AnHourThatAClockJumpedIsForgotten) {
  StepLimit limit({.chunk_bytes = 16 * kMiB});
  for (int i = 0; i < 10; ++i) limit.OnStep({.step_s = 0.1});
  const StepSample step{.step_s = 0.1, .bytes = 10 * kMiB, .busy_s = 0.02};  // 500 MiB/s
  for (int i = 0; i < 10; ++i) limit.OnStep(step);
  ASSERT_TRUE(std::isinf(limit.rate()));
  StepSample jumped = step;
  jumped.step_s = 3600;
  limit.OnStep(jumped);
  EXPECT_EQ(limit.backoffs(), 1u);
  EXPECT_GE(limit.rate(), 250.0 * kMiB);
  for (int i = 0; i < 100; ++i) limit.OnStep(step);
  EXPECT_EQ(limit.backoffs(), 1u);
  EXPECT_TRUE(std::isinf(limit.rate()));
  EXPECT_LT(limit.slowdown(), 0.01);
}

// A trainer whose steps suffer in proportion to what goes above a rate that it does not feel.
TEST(StepLimit, ConvergesOnTheRateThatTrainingDoesNotFeel) {
  for (const double unfelt : {300.0, 800.0, 1500.0}) {  // MiB/s
    StepLimit limit;
    const double link = 4000.0 * kMiB;
    Random random(static_cast<std::uint64_t>(unfelt));
    double sum = 0, worst = 0;
    int counted = 0;
    for (int i = 0; i < 3000; ++i) {
      const std::uint64_t bytes = i < 10 ? 0 : 50 * kMiB;  // a fifth of a second's floor
      const double rate = std::min(link, limit.rate());
      const double above = std::max(0.0, rate - unfelt * kMiB) / link;
      const double noise = 0.002 * (static_cast<double>(random.Below(1000)) / 1000 - 0.5);
      limit.OnStep({.step_s = 0.5 * (1 + (bytes == 0 ? 0 : above) + noise),
                    .bytes = bytes,
                    .busy_s = static_cast<double>(bytes) / rate});
      if (i < 1000) continue;
      sum += std::min(link, limit.rate()) / kMiB;
      worst = std::max(worst, above);
      ++counted;
    }
    const double mean = sum / counted;
    EXPECT_GT(mean, 0.5 * unfelt) << unfelt;
    EXPECT_LT(mean, unfelt + 0.05 * 4000 + 16) << unfelt;  // the tolerance is what may be felt
    EXPECT_LT(worst, 0.08) << unfelt;
    EXPECT_GT(limit.backoffs(), 1u);
  }
}

TEST(Pacer, AHigherClassGoesFirst) {
  Pacer pacer;
  pacer.Begin(TrafficClass::kCommit);
  const auto held = pacer.Ask(TrafficClass::kScrub, kMiB, 1'000'000);
  EXPECT_FALSE(held.go);
  EXPECT_STREQ(held.reason, "class");
  EXPECT_GT(held.at_ns, 1'000'000);
  EXPECT_TRUE(pacer.Ask(TrafficClass::kCommit, kMiB, 1'000'000).go);
  pacer.End(TrafficClass::kCommit);
  EXPECT_TRUE(pacer.Ask(TrafficClass::kScrub, kMiB, 2'000'000).go);
  EXPECT_EQ(pacer.bytes(TrafficClass::kScrub), kMiB);
  EXPECT_EQ(pacer.held_class(), 1u);
}

// Whoever asks as told sends no more than the rate allows, and all of it.
TEST(Pacer, KeepsTheRateThatTheLimitSays) {
  Pacer pacer;
  std::int64_t now = 1'000'000'000;
  const auto slow_step = [&](double step_s, int chunks) {
    for (int i = 0; i < chunks; ++i) {
      PaceDecision d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
      while (!d.go) {
        now = d.at_ns;
        d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
      }
      now += 100'000;
    }
    pacer.OnStep(step_s, now);
  };
  for (int i = 0; i < 10; ++i) pacer.OnStep(0.1, now += 100'000'000);
  for (std::size_t i = 0; i < 2 * StepLimit::kSettle; ++i) slow_step(0.2, 10);
  const double rate = pacer.limit().rate();
  ASSERT_FALSE(std::isinf(rate));
  const std::int64_t began = now;
  const std::uint64_t before = pacer.bytes(TrafficClass::kCommit);
  for (int i = 0; i < 500; ++i) {
    PaceDecision d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
    if (!d.go) {
      EXPECT_STREQ(d.reason, "rate");
      ASSERT_GT(d.at_ns, now);
      now = d.at_ns;
      d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
    }
    ASSERT_TRUE(d.go);
  }
  const double sent = static_cast<double>(pacer.bytes(TrafficClass::kCommit) - before);
  EXPECT_EQ(sent, 500.0 * kMiB);
  const double seconds = static_cast<double>(now - began) / 1e9;
  EXPECT_LE(sent, rate * (seconds + 0.006) + kMiB);
  EXPECT_GT(pacer.held_rate(), 0u);
}

// busy 20 ms, idle 30 ms, busy 40 ms, idle 10 ms; 1 MiB takes 1 ms.
TEST(Pacer, FillsTheIdleSpansOfAGapTraceAndNeverTheBusyOnes) {
  PacerOptions options;
  options.busy_then_idle_s = {0.020, 0.030, 0.040, 0.010};
  options.safety = 0.8;
  options.link = {.alpha_s = 0, .bytes_per_s = 1000.0 * kMiB};
  Pacer pacer(options);
  const std::int64_t start = 5'000'000'000;
  pacer.OnStep(0.1, start);
  int first = 0, second = 0, behind = 0;
  std::int64_t now = start;
  for (int i = 0; i < 100; ++i) {
    PaceDecision d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
    for (int asked = 0; !d.go; ++asked) {
      ASSERT_LT(asked, 10) << "asks for ever at " << now;
      EXPECT_STREQ(d.reason, "span");
      ASSERT_GT(d.at_ns, now);
      now = d.at_ns;
      d = pacer.Ask(TrafficClass::kCommit, kMiB, now);
    }
    const double at_ms = static_cast<double>(now - start) / 1e6;
    if (at_ms >= 99.9) {
      ++behind;
    } else if (at_ms >= 90) {
      ++second;
    } else {
      ASSERT_GE(at_ms, 20);
      ASSERT_LT(at_ms, 50);
      ++first;
    }
    now += 1'000'000;  // it is on the wire
  }
  EXPECT_EQ(first, 24);
  EXPECT_EQ(second, 8);
  EXPECT_EQ(behind, 68);
  pacer.OnStep(0.1, now);
  EXPECT_FALSE(pacer.Ask(TrafficClass::kCommit, kMiB, now + 1).go) << "the next iteration is busy";
}

TEST(GapTrace, IsReadAndRefusedByLine) {
  PacerOptions options;
  EXPECT_EQ(ParseGapTrace("# of step 20\nlink 25 12.5\nlayer 40 20\n12.5 3.2  # forward\n8 0.4\n",
                          &options),
            "");
  ASSERT_EQ(options.busy_then_idle_s.size(), 4u);
  EXPECT_DOUBLE_EQ(options.busy_then_idle_s[1], 0.0032);
  EXPECT_DOUBLE_EQ(options.link.alpha_s, 25e-6);
  EXPECT_DOUBLE_EQ(options.link.bytes_per_s, 12.5e9);
  EXPECT_EQ(options.in_flight_bytes, 12'500'000u);  // 5 % of 20 ms at 12.5 GB/s
  for (const char* bad : {"1", "1 2 3", "-1 2", "1 x", "link 1 0", "nan 1", "1e9 1", "layer 1"}) {
    PacerOptions kept = options;
    EXPECT_EQ(ParseGapTrace(std::string("1 1\n") + bad, &kept).substr(0, 7), "line 2:") << bad;
    EXPECT_EQ(kept.busy_then_idle_s, options.busy_then_idle_s) << bad;
  }
  EXPECT_EQ(ParseGapTrace("", &options), "");
  EXPECT_EQ(options.in_flight_bytes, kUsualInFlight);
}

}  // namespace
}  // namespace everstep::checkpoint
