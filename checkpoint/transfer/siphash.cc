#include "checkpoint/transfer/siphash.h"

#include <bit>
#include <cstring>

namespace everstep::checkpoint {
namespace {

struct State {
  std::uint64_t a, b, c, d;
  void Round() {
    a += b;
    b = std::rotl(b, 13) ^ a;
    a = std::rotl(a, 32);
    c += d;
    d = std::rotl(d, 16) ^ c;
    a += d;
    d = std::rotl(d, 21) ^ a;
    c += b;
    b = std::rotl(b, 17) ^ c;
    c = std::rotl(c, 32);
  }
};

}  // namespace

std::uint64_t SipHash(const SipKey& key, const void* data, std::size_t size) {
  State s{key[0] ^ 0x736f6d6570736575, key[1] ^ 0x646f72616e646f6d, key[0] ^ 0x6c7967656e657261,
          key[1] ^ 0x7465646279746573};
  const auto absorb = [&s](std::uint64_t m) {
    s.d ^= m;
    s.Round();
    s.Round();
    s.a ^= m;
  };
  const auto* p = static_cast<const unsigned char*>(data);
  std::size_t left = size;
  for (; left >= 8; left -= 8, p += 8) {
    std::uint64_t m;
    std::memcpy(&m, p, 8);
    absorb(m);
  }
  std::uint64_t last = static_cast<std::uint64_t>(size) << 56;
  for (std::size_t i = 0; i < left; ++i) last |= std::uint64_t{p[i]} << (8 * i);
  absorb(last);
  s.c ^= 0xff;
  for (int i = 0; i < 4; ++i) s.Round();
  return s.a ^ s.b ^ s.c ^ s.d;
}

SipKey DeriveKey(std::string_view secret) {
  return {SipHash({0x65766572737465ull, 1}, secret.data(), secret.size()),
          SipHash({0x65766572737465ull, 2}, secret.data(), secret.size())};
}

bool SameTag(std::uint64_t a, std::uint64_t b) {
  volatile std::uint64_t difference = a ^ b;
  return difference == 0;
}

}  // namespace everstep::checkpoint
