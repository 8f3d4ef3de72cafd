// When the keeper tells its agent of something that stays true: at once, and again until it is
// over, after 2 s, 4 s, ... 60 s. The word may be lost on its way: no agent is attached, or the
// agent has no controller. A value; not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>

namespace everstep::keeper {

class Telling {
 public:
  bool told() const { return pause_ns_ != 0; }
  // When it is due again, monotonic; meaningful once told.
  std::int64_t again_ns() const { return again_ns_; }
  bool Due(std::int64_t now) const { return !told() || now >= again_ns_; }
  void Told(std::int64_t now) {
    pause_ns_ = told() ? std::min(2 * pause_ns_, kLongestNs) : kFirstNs;
    again_ns_ = now + pause_ns_;
  }
  void Reset() { *this = {}; }

 private:
  static constexpr std::int64_t kFirstNs = 2'000'000'000;
  static constexpr std::int64_t kLongestNs = 60'000'000'000;
  std::int64_t pause_ns_ = 0;
  std::int64_t again_ns_ = 0;
};

}  // namespace everstep::keeper
