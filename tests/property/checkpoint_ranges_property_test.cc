// Ranges of shards into a new state: every wanted byte from its place, once; nothing is read that
// holds none. Brute force: a map from each byte of the new state to where it comes from.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/core/range_plan.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint32_t kChunk = 64;  // small, so that runs cross many

struct Case {
  std::vector<RangeShard> shards;
  std::vector<WantedRange> wanted;
  std::uint64_t dest_bytes = 0;
};

// Blocks of the new state one after the other, some bytes apart; each from anywhere.
Case Draw(Random* random) {
  Case c;
  const std::uint64_t count = 1 + random->Below(6);
  for (std::uint64_t i = 0; i < count; ++i) {
    c.shards.push_back({.payload_bytes = 1 + random->Below(900),
                        .tier = static_cast<ShardTier>(random->Below(3))});
  }
  for (std::uint64_t n = random->Below(12); n > 0; --n) {
    WantedRange w;
    w.rank = static_cast<std::int32_t>(random->Below(count));
    const std::uint64_t size = c.shards[static_cast<std::size_t>(w.rank)].payload_bytes;
    w.bytes = 1 + random->Below(size);
    w.source = random->Below(size - w.bytes + 1);
    w.source_stride = random->Below(9);
    const std::uint64_t room = size - w.source - w.bytes;
    w.count = static_cast<std::uint32_t>(
        1 + random->Below(
                std::min<std::uint64_t>(5, w.source_stride == 0 ? 5 : room / w.source_stride + 1)));
    w.dest = c.dest_bytes + random->Below(3);
    w.dest_stride = w.bytes + random->Below(4);
    c.dest_bytes = w.dest + (w.count - 1) * w.dest_stride + w.bytes;
    c.wanted.push_back(w);
  }
  c.dest_bytes += random->Below(40);
  return c;
}

TEST(RangePlan, BringsEveryWantedByteOnceFromItsPlace) {
  for (std::uint64_t seed = 0; seed < 20'000; ++seed) {
    Random random(seed);
    Case c = Draw(&random);
    const auto reader = static_cast<Rank>(random.Below(9));
    std::map<std::uint64_t, std::pair<Rank, std::uint64_t>> truth;
    for (const WantedRange& w : c.wanted) {
      for (std::uint64_t run = 0; run < w.count; ++run) {
        for (std::uint64_t i = 0; i < w.bytes; ++i) {
          truth[w.dest + run * w.dest_stride + i] = {w.rank, w.source + run * w.source_stride + i};
        }
      }
    }
    const RangePlan plan = PlanRanges(c.wanted, c.shards, c.dest_bytes, kChunk, reader);
    ASSERT_EQ(plan.error, "") << "seed " << seed;
    ASSERT_EQ(plan.bytes, truth.size());
    std::map<std::uint64_t, std::pair<Rank, std::uint64_t>> got;
    for (const ShardReads& reads : plan.shards) {
      std::size_t pieces = 0;
      for (const std::uint32_t chunk : reads.chunks) {
        const auto of = PiecesOf(reads, chunk, kChunk);
        ASSERT_FALSE(of.empty()) << "seed " << seed << ": a chunk is read for nothing";
        pieces += of.size();
        for (const RangePiece& p : of) {
          ASSERT_EQ(p.source / kChunk, chunk);
          ASSERT_EQ((p.source + p.bytes - 1) / kChunk, chunk);
          for (std::uint64_t i = 0; i < p.bytes; ++i) {
            ASSERT_TRUE(got.emplace(p.dest + i, std::pair(reads.rank, p.source + i)).second);
          }
        }
      }
      ASSERT_EQ(pieces, reads.pieces.size());
      ASSERT_TRUE(std::is_sorted(reads.chunks.begin(), reads.chunks.end()));
    }
    ASSERT_EQ(got, truth) << "seed " << seed;
    std::uint64_t gaps = 0;
    for (const auto& [from, to] : plan.gaps) {
      for (std::uint64_t at = from; at < to; ++at, ++gaps) ASSERT_EQ(truth.count(at), 0u);
    }
    ASSERT_EQ(gaps + truth.size(), c.dest_bytes);
  }
}

TEST(RangePlan, ReadsTheCheapestFirstAndEachReaderBeginsWithAnother) {
  const std::vector<RangeShard> shards(4, {.payload_bytes = 100, .tier = ShardTier::kPeer});
  std::vector<WantedRange> wanted;
  wanted.reserve(4);
  for (int rank = 0; rank < 4; ++rank) {
    wanted.push_back({.rank = rank, .dest = static_cast<std::uint64_t>(rank) * 10, .bytes = 10});
  }
  std::set<Rank> first;
  for (Rank reader = 0; reader < 4; ++reader) {
    first.insert(PlanRanges(wanted, shards, 40, kChunk, reader).shards.front().rank);
  }
  EXPECT_EQ(first.size(), 4u);
  std::vector<RangeShard> mixed = shards;
  mixed[3].tier = ShardTier::kLocal;
  mixed[1].tier = ShardTier::kFile;
  const RangePlan plan = PlanRanges(wanted, mixed, 40, kChunk, 2);
  EXPECT_EQ(plan.shards.front().rank, 3);
  EXPECT_EQ(plan.shards.back().rank, 1);
}

TEST(RangePlan, RefusesWhatMakesNoSense) {
  const std::vector<RangeShard> shards(2, {.payload_bytes = 100});
  const auto error = [&](WantedRange w, WantedRange other = {.bytes = 1}) {
    return PlanRanges(std::vector{w, other}, shards, 50, kChunk, 0).error;
  };
  EXPECT_EQ(error({.dest = 1, .bytes = 49}), "");
  EXPECT_NE(error({.dest = 1, .bytes = 50}), "");
  EXPECT_NE(error({.source = 99, .dest = 1, .bytes = 2}), "");
  EXPECT_NE(error({.rank = 2, .dest = 1, .bytes = 1}), "");
  EXPECT_NE(error({.rank = -1, .dest = 1, .bytes = 1}), "");
  EXPECT_NE(error({.dest = 1, .bytes = 0}), "");
  EXPECT_NE(error({.count = 0, .dest = 1, .bytes = 1}), "");
  EXPECT_NE(error({.dest = 0, .bytes = 1}), "") << "a byte from two places";
  EXPECT_NE(
      error({.count = 3, .source_stride = ~0ull / 2, .dest = 1, .dest_stride = 1, .bytes = 1}), "");
  EXPECT_NE(error({.source = ~0ull, .dest = 1, .bytes = 1}), "");
  EXPECT_NE(error({.count = ~0u, .dest = 1, .dest_stride = 0, .bytes = 1}), "");
}

}  // namespace
}  // namespace everstep::checkpoint
