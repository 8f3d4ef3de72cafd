// CRC32C against published vectors, and every implementation against every other.
#include "proto/base/crc32c.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checkpoint/store/fence.h"
#include "proto/base/random.h"

namespace everstep {
namespace {

std::vector<unsigned char> RandomBytes(std::size_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<unsigned char> out(n);
  for (auto& b : out) b = static_cast<unsigned char>(random.Next());
  return out;
}

// RFC 3720, section B.4, and the check value of the polynomial's catalogue entry.
TEST(Crc32c, AgreesWithPublishedVectors) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(Crc32cExtend(Crc32c("12345"), "6789"), 0xE3069283u);
  EXPECT_EQ(Crc32c("", 0), 0u);
  const std::string zeros(32, '\0'), ones(32, '\xff');
  EXPECT_EQ(Crc32c(zeros.data(), 32), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(ones.data(), 32), 0x62A8AB43u);
  std::string up(32, '\0'), down(32, '\0');
  for (int i = 0; i < 32; ++i) {
    up[static_cast<std::size_t>(i)] = static_cast<char>(i);
    down[static_cast<std::size_t>(i)] = static_cast<char>(31 - i);
  }
  EXPECT_EQ(Crc32c(up.data(), 32), 0x46DD794Eu);
  EXPECT_EQ(Crc32c(down.data(), 32), 0x113FDB5Cu);
}

// Sizes around each path's limits: one, three streams of the crc32 instruction; one, four streams
// of 512-bit words; one and two rounds of each.
TEST(Crc32c, AllWaysAgreeAtEveryLengthAndAlignment) {
  const auto bytes = RandomBytes(200'000, 1);
  std::vector<unsigned char> copy(bytes.size() + 128);
  std::vector<std::size_t> sizes;
  for (std::size_t n = 0; n < 80; ++n) sizes.push_back(n);
  for (std::size_t n : {255,    256,    511,    512,    513,    575,     576,     767,     768,
                        769,    1024,   8191,   24'575, 24'576, 24'577,  65'000,  65'535,  65'536,
                        65'537, 65'600, 66'000, 98'304, 98'305, 131'072, 131'136, 131'999, 199'000})
    sizes.push_back(n);
  const auto copies_of = [&](auto function, std::size_t size, std::size_t from, std::size_t to) {
    std::fill(copy.begin(), copy.end(), 0xEE);
    const std::uint32_t crc = function(0, copy.data() + to, bytes.data() + from, size);
    checkpoint::StoreFence();
    EXPECT_TRUE(std::equal(copy.begin() + static_cast<long>(to),
                           copy.begin() + static_cast<long>(to + size),
                           bytes.begin() + static_cast<long>(from)))
        << size << "+" << from << " to " << to;
    EXPECT_EQ(copy[to + size], 0xEE) << "wrote past the end";
    EXPECT_TRUE(to == 0 || copy[to - 1] == 0xEE) << "wrote before the beginning";
    return crc;
  };
  for (std::size_t size : sizes) {
    for (std::size_t from : {0, 1, 7, 8, 63}) {
      const std::uint32_t expected = internal::Crc32cTable(0, bytes.data() + from, size);
      EXPECT_EQ(Crc32c(bytes.data() + from, size), expected) << size << "+" << from;
      for (std::size_t to : {std::size_t{0}, (from * 3) % 64}) {
        EXPECT_EQ(copies_of(Crc32cCopy, size, from, to), expected) << size << "+" << from;
        EXPECT_EQ(copies_of(internal::Crc32cCopyNarrow, size, from, to), expected);
      }
    }
  }
  for (std::size_t at = 0; at < 64; ++at) {  // every alignment of either side
    const std::uint32_t expected = internal::Crc32cTable(0, bytes.data() + at, 70'000);
    EXPECT_EQ(copies_of(Crc32cCopy, 70'000, at, 0), expected) << "from " << at;
    EXPECT_EQ(copies_of(Crc32cCopy, 70'000, at, 63 - at), expected) << "from " << at;
  }
}

TEST(Crc32c, ExtendsAndCombinesAtAnyCut) {
  const auto bytes = RandomBytes(30'000, 2);
  const std::uint32_t whole = Crc32c(bytes.data(), bytes.size());
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    const std::size_t cut = random.Below(bytes.size() + 1);
    const std::uint32_t a = Crc32c(bytes.data(), cut);
    const std::uint32_t b = Crc32c(bytes.data() + cut, bytes.size() - cut);
    EXPECT_EQ(Crc32cExtend(a, bytes.data() + cut, bytes.size() - cut), whole);
    EXPECT_EQ(Crc32cCombine(a, b, bytes.size() - cut), whole);
  }
}

TEST(Crc32c, EverySingleBitFlipIsSeen) {
  auto bytes = RandomBytes(300, 4);
  const std::uint32_t good = Crc32c(bytes.data(), bytes.size());
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
    EXPECT_NE(Crc32c(bytes.data(), bytes.size()), good);
    bytes[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
  }
}

}  // namespace
}  // namespace everstep
