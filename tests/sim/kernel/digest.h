// A running hash of everything that happened in a simulated world, in order. Two runs of one seed
// must end with equal digests; that is how determinism itself is tested. FNV-1a, 64 bits: fixed by
// this file, so a digest printed on one machine can be compared with one printed on another.
#pragma once

#include <cstdint>
#include <string_view>

namespace everstep::sim {

class Digest {
 public:
  void Add(std::uint64_t value) {
    for (int i = 0; i < 8; ++i) {
      Byte(static_cast<unsigned char>(value & 0xFFU));
      value >>= 8;
    }
  }
  // The length is hashed too: Add("ab"), Add("c") differs from Add("a"), Add("bc").
  void Add(std::string_view text) {
    Add(static_cast<std::uint64_t>(text.size()));
    for (const char c : text) Byte(static_cast<unsigned char>(c));
  }
  std::uint64_t value() const { return value_; }

 private:
  void Byte(unsigned char b) {
    value_ ^= b;
    value_ *= 0x100000001B3ULL;
  }
  std::uint64_t value_ = 0xCBF29CE484222325ULL;
};

}  // namespace everstep::sim
