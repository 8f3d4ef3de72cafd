// /metrics in Prometheus' text format, version 0.0.4. One table of families in metrics.cc names,
// types and explains everything that is served; docs/reference/metrics.md is made from it
// (MetricsMarkdown), and a test holds the two together.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "controller/core/state.h"

namespace everstep::controller {

// Durations in fixed buckets. Thread-safe: one writer or many, any reader.
class Histogram {
 public:
  // Upper bounds in microseconds; the last bucket is everything above.
  static constexpr std::array<std::int64_t, 12> kBoundsMicros = {
      10, 50, 100, 250, 500, 1'000, 2'500, 5'000, 10'000, 50'000, 250'000, 1'000'000};

  void Observe(Duration d);
  // Cumulative, as Prometheus wants it: [i] counts what took at most kBoundsMicros[i]; last: all.
  std::array<std::uint64_t, kBoundsMicros.size() + 1> Cumulative() const;
  std::uint64_t count() const;
  double sum_seconds() const { return static_cast<double>(nanos_.load()) / 1e9; }

 private:
  std::array<std::atomic<std::uint64_t>, kBoundsMicros.size() + 1> buckets_{};
  std::atomic<std::uint64_t> nanos_{0};
};

// What the shell counts. Thread-safe; grows only.
struct Counters {
  Histogram decision;                             // one Controller::Step
  Histogram store_write;                          // one synced batch
  std::atomic<std::uint64_t> events{0};           // handed to the core
  std::atomic<std::uint64_t> records{0};          // written to the store
  std::atomic<std::uint64_t> requests{0};         // of the admin service
  std::atomic<std::uint64_t> mailbox_refused{0};  // nothing was free in the mailbox
  std::atomic<std::uint64_t> slow_readers{0};     // streams that were cut off
  std::atomic<std::uint64_t> agents_refused{0};   // registrations that were not let in
  std::atomic<std::uint64_t> log_bytes_relayed{0};
};

// The rest of what the shell knows at the moment of the scrape.
struct Figures {
  std::string cluster;
  std::string version;
  Timestamp started;
  std::uint64_t store_starts = 0;
  std::size_t mailbox_depth = 0;
  std::size_t sessions = 0;  // agents' streams that are registered
  std::size_t watchers = 0;  // open streams of the admin service
};

// `state` on the thread that owns it.
std::string MetricsText(const ClusterState& state, const Counters& counters, const Figures& figures,
                        Timestamp now);

// The reference page's tables.
std::string MetricsMarkdown();

}  // namespace everstep::controller
