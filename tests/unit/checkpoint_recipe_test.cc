// What a shard is made of: for every loss that a group bears, the recipe's sums give back the very
// bytes; orders and tables from elsewhere that make no sense are refused.
#include "checkpoint/codec/shard_recipe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>

#include "checkpoint/core/parity_ranks.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

using Bytes = std::vector<std::byte>;

// A payload of `recipe` out of `payloads`, by rank.
Bytes Cook(const ShardRecipe& recipe, const std::map<Rank, Bytes>& payloads) {
  Bytes out(recipe.payload_bytes());
  for (std::size_t s = 0; s < recipe.sources().size(); ++s) {
    const ShardRecipe::Source& source = recipe.sources()[s];
    const Bytes& from = payloads.at(source.shard.rank);
    for (const std::uint32_t chunk : source.chunks) {
      const std::size_t at = std::size_t{chunk} * kChunkBytes;
      recipe.Add(s, chunk,
                 std::span(from).subspan(at, std::min<std::size_t>(kChunkBytes, from.size() - at)),
                 out.data());
    }
  }
  return out;
}

struct World {
  std::vector<Rank> group;
  std::uint32_t parity = 0;
  std::map<Rank, Bytes> payloads;  // parities behind the ranks
  static constexpr std::int32_t kSize = 10;

  ShardBuild Order(Rank rank) const {
    ShardBuild build{.shard = {.rank = rank, .world_size = kSize, .generation = 1, .step = 3},
                     .parity = parity,
                     .group = group,
                     .sources = {}};
    if (payloads.count(rank) > 0) build.shard.bytes = payloads.at(rank).size();
    for (const auto& [held, payload] : payloads) {
      if (held != rank) {
        build.sources.push_back(
            {.rank = held, .crc_root = 1, .bytes = payload.size(), .holders = {{"n", "a:1"}}});
      }
    }
    return build;
  }
};

World Draw(Random* random, std::uint32_t n, std::uint32_t parity) {
  World world{.parity = parity};
  for (std::uint32_t i = 0; i < n; ++i) world.group.push_back(static_cast<Rank>(i));
  for (std::size_t i = n; i > 1; --i) std::swap(world.group[i - 1], world.group[random->Below(i)]);
  for (const Rank rank : world.group) {
    Bytes payload(1 + random->Below(3 * kChunkBytes));
    if (random->Below(4) == 0) payload.resize(kChunkBytes * (1 + random->Below(3)));
    for (std::byte& b : payload) b = static_cast<std::byte>(random->Next());
    world.payloads[rank] = std::move(payload);
  }
  std::map<Rank, Bytes> parities;
  for (const Codeword& word : CodewordsOf(world.group, parity, World::kSize)) {
    for (const Rank p : word.parities) {
      const auto recipe = ShardRecipe::Of(world.Order(p));
      EXPECT_TRUE(recipe.ok()) << recipe.error().message;
      EXPECT_TRUE(recipe.value().makes_parity());
      Bytes payload = Cook(recipe.value(), world.payloads);
      // Where a table will lie; it is no part of any sum.
      for (std::size_t i = recipe.value().data_bytes(); i < payload.size(); ++i) {
        payload[i] = static_cast<std::byte>(random->Next());
      }
      parities[p] = std::move(payload);
    }
  }
  world.payloads.merge(parities);
  return world;
}

TEST(ShardRecipe, WhateverAGroupBearsComesBackBitForBit) {
  Random random(1);
  for (const auto& [n, r] : {std::pair{2u, 1u}, {3u, 1u}, {4u, 2u}, {5u, 3u}}) {
    const World world = Draw(&random, n, r);
    for (std::uint32_t lost = 1; lost < 1u << n; ++lost) {
      World left = world;
      for (std::uint32_t i = 0; i < n; ++i) {
        if ((lost >> i & 1) == 0) continue;
        left.payloads.erase(static_cast<Rank>(i));
        for (std::uint32_t p = 0; p < r; ++p) {
          left.payloads.erase(ParityRank(static_cast<Rank>(i), p, World::kSize));
        }
      }
      for (std::uint32_t i = 0; i < n; ++i) {
        if ((lost >> i & 1) == 0) continue;
        const auto rank = static_cast<Rank>(i);
        ShardBuild order = left.Order(rank);
        order.shard.bytes = world.payloads.at(rank).size();
        const auto recipe = ShardRecipe::Of(order);
        ASSERT_EQ(recipe.ok(), std::popcount(lost) <= static_cast<int>(r))
            << n << " ranks, " << r << " parities, lost " << lost;
        if (!recipe.ok()) {
          EXPECT_EQ(recipe.error().code, ErrorCode::kNotFound);
          continue;
        }
        ASSERT_TRUE(IsParity(recipe.value().sources()[recipe.value().table_source()].shard.rank,
                             World::kSize));
        ASSERT_EQ(Cook(recipe.value(), left.payloads), world.payloads.at(rank))
            << n << " ranks, " << r << " parities, lost " << lost << ", rank " << rank;
      }
    }
  }
}

TEST(ShardRecipe, AParityIsAPieceLongAndALostShardReadsEachSourceOnce) {
  World world{.group = {0, 1, 2, 3, 4}, .parity = 1};
  for (const Rank rank : world.group) world.payloads[rank] = Bytes(8u * kChunkBytes);
  const auto parity = ShardRecipe::Of(world.Order(ParityRank(2, 0, World::kSize)));
  ASSERT_TRUE(parity.ok());
  EXPECT_EQ(parity.value().data_bytes(), 2u * kChunkBytes);
  ASSERT_EQ(parity.value().sources().size(), 4u);
  for (const auto& s : parity.value().sources()) EXPECT_EQ(s.chunks.size(), 2u);
}

TEST(ShardRecipe, OrdersWithoutSenseAreRefused) {
  World world{.group = {0, 1, 2}, .parity = 1};
  for (const Rank rank : world.group) world.payloads[rank] = Bytes(10);
  const auto refused = [&](const std::function<void(ShardBuild*)>& spoil) {
    ShardBuild order = world.Order(ParityRank(0, 0, World::kSize));
    EXPECT_TRUE(ShardRecipe::Of(order).ok());
    spoil(&order);
    return !ShardRecipe::Of(order).ok();
  };
  EXPECT_TRUE(refused([](ShardBuild* b) { b->parity = 0; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->parity = 3; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->group = {0, 1, 1}; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->group = {0, 1, 99}; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->group.clear(); }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->shard.rank = 55; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->shard.rank = -1; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->sources[1].holders.clear(); }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->sources[1].bytes = UINT64_MAX; }));
  EXPECT_TRUE(refused([](ShardBuild* b) { b->sources.clear(); }));
  // Its parities' numbers would not fit.
  ShardBuild wide = world.Order(ParityRank(0, 0, World::kSize));
  wide.shard.rank = 0;
  wide.shard.world_size = INT32_MAX;
  std::erase_if(wide.sources, [](const CutShard& s) { return s.rank == 0; });
  const auto recipe = ShardRecipe::Of(wide);
  ASSERT_FALSE(recipe.ok());
  EXPECT_EQ(recipe.error().code, ErrorCode::kInvalid) << recipe.error().message;
}

TEST(ParityTable, IsReadAsItWasWrittenAndNothingElseIs) {
  std::vector<ParityMember> members(3);
  for (std::uint32_t i = 0; i < 3; ++i) {
    members[i].fields.rank = static_cast<Rank>(i);
    members[i].crc_root = 77 + i;
  }
  std::vector<unsigned char> bytes = PrintParityTable(members);
  const auto read = ReadParityTable(bytes);
  ASSERT_TRUE(read.ok());
  ASSERT_EQ(read.value().size(), 3u);
  EXPECT_EQ(std::memcmp(read.value().data(), members.data(), 3 * sizeof members[0]), 0);
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    std::vector<unsigned char> spoiled = bytes;
    spoiled.resize(random.Below(bytes.size() + 20));
    if (!spoiled.empty() && random.Below(2) == 0) spoiled[random.Below(spoiled.size())] ^= 0x81;
    const auto got = ReadParityTable(spoiled);
    ASSERT_TRUE(!got.ok() || spoiled.size() == bytes.size());
  }
  bytes[0] ^= 1;
  EXPECT_FALSE(ReadParityTable(bytes).ok());
  EXPECT_FALSE(ReadParityTable({}).ok());
}

}  // namespace
}  // namespace everstep::checkpoint
