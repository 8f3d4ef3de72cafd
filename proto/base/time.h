// Time as a value. Cores take `now` as an argument and never read a clock; shells own a Clock.
#pragma once

#include <chrono>
#include <cstdint>

namespace everstep {

using Duration = std::chrono::nanoseconds;

// Nanoseconds since the Unix epoch on a clock that never jumps inside one process: the wall time at
// the process's start plus the monotonic time since. Comparable across processes only to within
// clock skew, so no decision compares timestamps of two machines.
struct Timestamp {
  std::int64_t ns = 0;

  friend constexpr auto operator<=>(const Timestamp&, const Timestamp&) = default;
  friend constexpr Timestamp operator+(Timestamp t, Duration d) { return {t.ns + d.count()}; }
  friend constexpr Timestamp operator-(Timestamp t, Duration d) { return {t.ns - d.count()}; }
  friend constexpr Duration operator-(Timestamp a, Timestamp b) { return Duration(a.ns - b.ns); }
};

constexpr Duration Milliseconds(std::int64_t n) {
  return std::chrono::milliseconds(n);
}
constexpr Duration Seconds(std::int64_t n) {
  return std::chrono::seconds(n);
}
constexpr std::int64_t ToMilliseconds(Duration d) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(d).count();
}
constexpr double ToSeconds(Duration d) {
  return std::chrono::duration<double>(d).count();
}

}  // namespace everstep
