// Virtual time and the one queue of everything that is still to happen. Nothing in a simulated
// world runs but from here, so a seed fixes the whole run.
//
// Single-threaded. Events of one instant run in an order drawn from the seed, so that a run
// explores interleavings a first-in-first-out queue would never show; it is still the same order
// each time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>

#include "proto/base/random.h"
#include "proto/base/time.h"
#include "tests/sim/kernel/digest.h"

namespace everstep::sim {

using EventId = std::uint64_t;  // 0: none

class Timeline {
 public:
  // Called for each event just before it runs; `label` is what the caller gave.
  using Tracer = std::function<void(Timestamp now, const std::string& label)>;

  // `max_events` bounds a run: a world that schedules for ever at one instant stops there, and
  // exhausted() tells.
  explicit Timeline(std::uint64_t seed, Timestamp start = {},
                    std::uint64_t max_events = 50'000'000);
  Timeline(const Timeline&) = delete;
  Timeline& operator=(const Timeline&) = delete;

  Timestamp now() const { return now_; }
  Random& random() { return random_; }
  Digest& digest() { return digest_; }
  std::uint64_t events_run() const { return events_run_; }
  bool exhausted() const { return events_run_ >= max_events_; }
  bool idle() const { return queue_.empty(); }

  // Schedules `action`. A time in the past is now. `label` enters the digest when the event runs.
  EventId At(Timestamp when, std::string label, std::function<void()> action);
  EventId After(Duration delay, std::string label, std::function<void()> action);

  // True when the event was still waiting; it will not run.
  bool Cancel(EventId id);

  // Runs the next event. False when nothing waits or the bound on events is reached.
  bool RunOne();

  // Runs every event up to and including `deadline`, then sets the clock to it. Stops early when
  // `done` (asked after each event) is true. Returns what `done` last said; false without one.
  bool RunUntil(Timestamp deadline, const std::function<bool()>& done = nullptr);

  void set_tracer(Tracer tracer) { tracer_ = std::move(tracer); }

 private:
  // time, tie drawn from the seed, id
  using Key = std::tuple<std::int64_t, std::uint64_t, EventId>;
  struct Entry {
    std::string label;
    std::function<void()> action;
  };

  Random random_;
  Random ties_;
  Timestamp now_;
  std::uint64_t max_events_;
  std::uint64_t events_run_ = 0;
  EventId next_id_ = 1;
  Digest digest_;
  std::map<Key, Entry> queue_;
  std::map<EventId, Key> keys_;
  Tracer tracer_;
};

}  // namespace everstep::sim
