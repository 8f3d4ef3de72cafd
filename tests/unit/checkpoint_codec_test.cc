// Every loss that a code promises to undo is undone, to the last byte; the arithmetic is that of a
// textbook.
#include "checkpoint/codec/parity_code.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

using Bytes = std::vector<std::byte>;

// Long multiplication of polynomials, reduced by 0x11d.
std::uint8_t Textbook(std::uint8_t a, std::uint8_t b) {
  unsigned product = 0;
  for (unsigned bit = 0; bit < 8; ++bit) {
    if ((b >> bit & 1) != 0) product ^= unsigned{a} << bit;
  }
  for (unsigned bit = 15; bit >= 8; --bit) {
    if ((product >> bit & 1) != 0) product ^= 0x11dU << (bit - 8);
  }
  return static_cast<std::uint8_t>(product);
}

Bytes Draw(std::size_t size, Random* random) {
  Bytes out(size);
  for (std::byte& b : out) b = static_cast<std::byte>(random->Below(256));
  return out;
}

// Shards of different lengths, and their parities.
struct Coded {
  ParityCode code;
  std::vector<Bytes> shards, parities;

  Coded(std::uint32_t k, std::uint32_t r, const std::vector<std::size_t>& sizes, Random* random)
      : code(k, r) {
    for (std::uint32_t j = 0; j < k; ++j) {
      shards.push_back(Draw(sizes[j % sizes.size()], random));
    }
    const std::size_t longest = *std::max_element(sizes.begin(), sizes.end());
    parities.assign(r, Bytes(longest));
    for (std::uint32_t p = 0; p < r; ++p) {
      for (std::uint32_t j = 0; j < k; ++j) code.Add(p, j, shards[j], parities[p].data());
    }
  }

  // The l-th lost shard out of what is left.
  Bytes Bring(const ParityDecoder& decoder, std::uint32_t l) const {
    Bytes out(parities.front().size());
    for (std::uint32_t j = 0; j < code.shards(); ++j) {
      const auto& lost = decoder.lost();
      if (std::find(lost.begin(), lost.end(), j) != lost.end()) continue;
      decoder.AddShard(l, j, shards[j], out.data());
    }
    for (const std::uint32_t p : decoder.parities()) {
      decoder.AddParity(l, p, parities[p], out.data());
    }
    return out;
  }

  // Loses what `mask` says (shards, then parities) and compares what comes back.
  void LoseAndBring(std::uint32_t mask) const {
    std::vector<std::uint32_t> lost, left;
    for (std::uint32_t j = 0; j < code.shards(); ++j) {
      if ((mask >> j & 1) != 0) lost.push_back(j);
    }
    for (std::uint32_t p = 0; p < code.parity(); ++p) {
      if ((mask >> (code.shards() + p) & 1) == 0) left.push_back(p);
    }
    const auto decoder = ParityDecoder::Make(code, lost, left);
    ASSERT_EQ(decoder.has_value(), lost.size() <= left.size());
    if (!decoder) return;
    for (std::uint32_t l = 0; l < lost.size(); ++l) {
      const Bytes& want = shards[lost[l]];
      const Bytes got = Bring(*decoder, l);
      ASSERT_TRUE(std::equal(want.begin(), want.end(), got.begin())) << "shard " << lost[l];
      ASSERT_TRUE(std::all_of(got.begin() + static_cast<std::ptrdiff_t>(want.size()), got.end(),
                              [](std::byte b) { return b == std::byte{0}; }))
          << "padding of shard " << lost[l];
    }
  }
};

TEST(ParityCode, MultipliesAsATextbookDoes) {
  Bytes all(256);
  for (unsigned i = 0; i < 256; ++i) all[i] = static_cast<std::byte>(i);
  for (unsigned f = 0; f < 256; ++f) {
    const Factor factor(static_cast<std::uint8_t>(f));
    Bytes out(256, std::byte{0x5a});
    MultiplyAdd(factor, all, out.data());
    for (unsigned i = 0; i < 256; ++i) {
      const auto want = static_cast<std::uint8_t>(
          0x5a ^ Textbook(static_cast<std::uint8_t>(f), static_cast<std::uint8_t>(i)));
      ASSERT_EQ(std::to_integer<unsigned>(out[i]), want) << f << " * " << i;
    }
  }
}

TEST(ParityCode, AnyLengthAndAlignmentAndNotAByteBeyond) {
  Random random(1);
  const Bytes from = Draw(400, &random), before = Draw(400, &random);
  const Factor factor(0x8e);
  for (std::size_t length = 0; length <= 200; ++length) {
    for (const std::size_t at : {0U, 1U, 7U, 31U, 33U}) {
      Bytes into = before;
      MultiplyAdd(factor, std::span(from).subspan(at + 3, length), into.data() + at);
      for (std::size_t i = 0; i < into.size(); ++i) {
        std::byte want = before[i];
        if (i >= at && i < at + length) {
          want ^= std::byte{Textbook(0x8e, std::to_integer<std::uint8_t>(from[i + 3]))};
        }
        ASSERT_EQ(into[i], want) << length << " bytes at " << at << ", byte " << i;
      }
    }
  }
}

TEST(ParityCode, OneParityIsPlainXor) {
  Random random(2);
  const Coded c(5, 1, {100}, &random);
  for (std::size_t i = 0; i < 100; ++i) {
    std::byte sum{0};
    for (const Bytes& shard : c.shards) sum ^= shard[i];
    ASSERT_EQ(c.parities[0][i], sum);
  }
}

TEST(ParityCode, UndoesEveryLossOfUpToRAndRefusesMore) {
  Random random(3);
  std::uint64_t looked = 0;
  for (std::uint32_t k = 1; k <= 8; ++k) {
    for (std::uint32_t r = 1; r <= 4; ++r) {
      // Lengths that end within a vector, at its edge, and nowhere.
      const Coded c(k, r, {129, 64, 0, 1, 97, 31, 128}, &random);
      for (std::uint32_t mask = 0; mask < std::uint32_t{1} << (k + r); ++mask) {
        if (std::popcount(mask) > static_cast<int>(r) + 1) continue;
        ASSERT_NO_FATAL_FAILURE(c.LoseAndBring(mask)) << k << "+" << r << " lost " << mask;
        ++looked;
      }
    }
  }
  EXPECT_GT(looked, 5'000U);
}

TEST(ParityCode, TheWidestCodesUndoLossesDrawnAtRandom) {
  Random random(4);
  const Coded c(24, 8, {70, 33, 64}, &random);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::uint32_t> all(32);
    std::iota(all.begin(), all.end(), 0U);
    std::uint32_t mask = 0;
    for (std::uint32_t i = 0; i < 8; ++i) {
      std::swap(all[i], all[i + random.Below(32 - i)]);
      mask |= std::uint32_t{1} << all[i];
    }
    ASSERT_NO_FATAL_FAILURE(c.LoseAndBring(mask)) << mask;
  }
}

// Chunks come from several nodes, in whatever order; the holder has one buffer.
TEST(ParityCode, PiecesAreAddedInAnyOrder) {
  Random random(5);
  const Coded c(6, 2, {1000, 777}, &random);
  struct Piece {
    std::uint32_t shard;
    std::size_t from, size;
  };
  std::vector<Piece> pieces;
  for (std::uint32_t j = 0; j < 6; ++j) {
    for (std::size_t at = 0; at < c.shards[j].size();) {
      const std::size_t size =
          std::min<std::size_t>(1 + random.Below(150), c.shards[j].size() - at);
      pieces.push_back({j, at, size});
      at += size;
    }
  }
  for (std::size_t i = pieces.size(); i > 1; --i) std::swap(pieces[i - 1], pieces[random.Below(i)]);
  for (std::uint32_t p = 0; p < 2; ++p) {
    Bytes sum(1000);
    for (const Piece& piece : pieces) {
      c.code.Add(p, piece.shard, std::span(c.shards[piece.shard]).subspan(piece.from, piece.size),
                 sum.data() + piece.from);
    }
    ASSERT_EQ(sum, c.parities[p]);
    // What was added once too often is taken out by adding it again.
    c.code.Add(p, 3, c.shards[3], sum.data());
    ASSERT_NE(sum, c.parities[p]);
    c.code.Add(p, 3, c.shards[3], sum.data());
    ASSERT_EQ(sum, c.parities[p]);
  }
}

TEST(ParityCode, NothingLostNeedsNothing) {
  const ParityCode code(4, 2);
  const auto decoder = ParityDecoder::Make(code, {}, {0, 1});
  ASSERT_TRUE(decoder.has_value());
  EXPECT_TRUE(decoder->parities().empty());
  EXPECT_FALSE(ParityDecoder::Make(code, {0}, {}).has_value());
}

}  // namespace
}  // namespace everstep::checkpoint
