// A seeded generator whose sequence is fixed by this file alone (std distributions are not
// portable). SplitMix64 (Steele, Lea, Flood 2014). For simulation, jitter and sampling; never for
// secrets.
#pragma once

#include <cstdint>

#include "proto/base/check.h"

namespace everstep {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t Next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }

  // Uniform in [0, bound). REQUIRES bound > 0. The modulo bias is below 2^-32 for bound < 2^32.
  std::uint64_t Below(std::uint64_t bound) {
    EVERSTEP_CHECK(bound > 0);
    return Next() % bound;
  }

  // Uniform in [low, high], both included.
  std::int64_t Between(std::int64_t low, std::int64_t high) {
    EVERSTEP_CHECK(low <= high);
    return low + static_cast<std::int64_t>(Below(static_cast<std::uint64_t>(high - low) + 1));
  }

  // True with probability per_mille / 1000.
  bool Chance(std::uint32_t per_mille) { return Below(1000) < per_mille; }

  // An independent stream; the parent advances by one.
  Random Fork() { return Random(Next()); }

 private:
  std::uint64_t state_;
};

}  // namespace everstep
