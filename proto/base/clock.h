// The one seam to the operating system's clocks. RealClock for processes, ManualClock for tests.
#pragma once

#include <string>

#include "proto/base/time.h"

namespace everstep {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual Timestamp Now() const = 0;
};

// Wall time at construction plus CLOCK_MONOTONIC since: never jumps. Thread-safe.
class RealClock final : public Clock {
 public:
  RealClock();
  Timestamp Now() const override;

 private:
  std::int64_t offset_ns_;  // wall minus monotonic, at construction
};

// Moves only when told. Not thread-safe.
class ManualClock final : public Clock {
 public:
  explicit ManualClock(Timestamp start = {}) : now_(start) {}
  Timestamp Now() const override { return now_; }
  void Advance(Duration d) { now_ = now_ + d; }
  void Set(Timestamp t) { now_ = t; }

 private:
  Timestamp now_;
};

// CLOCK_MONOTONIC in nanoseconds: the same on every process of one machine.
std::int64_t MonotonicNanos();

// RFC 3339 UTC with milliseconds, e.g. "2026-01-31T14:02:11.482Z".
std::string FormatTimestamp(Timestamp t);

}  // namespace everstep
