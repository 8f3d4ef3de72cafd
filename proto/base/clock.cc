#include "proto/base/clock.h"

#include <ctime>

#include <fmt/format.h>

namespace everstep {
namespace {

std::int64_t ReadClock(clockid_t id) {
  timespec ts{};
  clock_gettime(id, &ts);
  return static_cast<std::int64_t>(ts.tv_sec) * 1'000'000'000 + ts.tv_nsec;
}

}  // namespace

std::int64_t MonotonicNanos() {
  return ReadClock(CLOCK_MONOTONIC);
}

RealClock::RealClock() : offset_ns_(ReadClock(CLOCK_REALTIME) - MonotonicNanos()) {}

Timestamp RealClock::Now() const {
  return {offset_ns_ + MonotonicNanos()};
}

std::string FormatTimestamp(Timestamp t) {
  const std::time_t seconds = static_cast<std::time_t>(t.ns / 1'000'000'000);
  const int millis = static_cast<int>(t.ns / 1'000'000 % 1000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", utc.tm_year + 1900,
                     utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec, millis);
}

}  // namespace everstep
