// When the checkpoint plane's bytes may go, so that training does not feel them. Pure: time is an
// argument (nanoseconds of a monotonic clock), the shell (checkpoint/transfer/traffic.h) waits.
//
//   gap trace known     GEMINI's Algorithm 2: chunks fill the iteration's idle spans, the rest goes
//                       behind the last one
//   none                chunks go at any time, and few enough bytes at once that a collective never
//                       waits long behind them (head-of-line bound)
//   always              a rate that halves when steps get slower and climbs while they do not
//   (AIMD)
//
// And between the classes of traffic strictly: commit, repair, persist, scrub.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/base/ids.h"

namespace everstep::checkpoint {

enum class TrafficClass : std::uint8_t { kCommit = 0, kRepair = 1, kPersist = 2, kScrub = 3 };
inline constexpr std::size_t kTrafficClasses = 4;
const char* TrafficClassName(TrafficClass traffic);

// f(s) = alpha + s / bandwidth: what s bytes cost on the link.
struct LinkModel {
  double alpha_s = 0;
  double bytes_per_s = 1e9;
  double Seconds(double bytes) const { return alpha_s + bytes / bytes_per_s; }
};

// --- GEMINI, Algorithm 2 (SOSP 2023, section 5.3) ---
struct SpanRequest {
  std::vector<double> idle_s;     // idle network spans of one iteration, in order
  double safety = 0.9;            // gamma: the part of a span that is used
  std::uint64_t bytes = 0;        // of one copy
  int copies = 1;                 // to other nodes
  std::uint64_t chunk_bytes = 1;  // the most that goes at once (the paper's R / p)
  LinkModel link;
};
struct SpanChunk {
  std::size_t span = 0;  // idle_s.size(): behind the last one
  std::uint64_t bytes = 0;
  int copy = 0;
};
// Every byte of every copy, in the order in which they go. No span gets more than safety times its
// length. We differ from the paper's text in a span's last chunk: (span - alpha) * bandwidth bytes
// fit it, not span - alpha * bandwidth; and a span in which nothing more fits is left.
std::vector<SpanChunk> FillSpans(const SpanRequest& request);

// --- head-of-line bound (lm-resiliency's rule) ---
inline constexpr std::uint64_t kLeastInFlight = 64u << 10;
inline constexpr std::uint64_t kMostInFlight = 64u << 20;
inline constexpr std::uint64_t kUsualInFlight = 16u << 20;  // nothing is known of the layers
// Bytes that may be under way at once, so that a collective of a layer that takes `layer_s`, of
// them `collective_s` on the network, waits at most `fraction` of its slack. 0 seconds: not known.
std::uint64_t InFlightBytes(double layer_s, double collective_s, double bytes_per_s,
                            double fraction = 0.05);

// --- adaptive limit (AIMD on the step's time) ---
struct StepLimitOptions {
  double tolerance = 0.05;                     // a step may be so much longer than without traffic
  double smoothing = 0.25;                     // weight of the newest step
  std::uint64_t chunk_bytes = kUsualInFlight;  // the rate climbs by one a second and step
  double backoff = 0.5;
  double floor_bytes_per_s = 64.0 * (1 << 20);
};
struct StepSample {
  double step_s = 0;        // one step, waiting for a commit left out
  std::uint64_t bytes = 0;  // that went meanwhile
  double busy_s = 0;        // time in which they went; 0 with no bytes
};
class StepLimit {
 public:
  static constexpr std::size_t kLearn = 8;   // steps before anything is concluded
  static constexpr std::size_t kSettle = 3;  // steps at a rate before it is judged

  explicit StepLimit(const StepLimitOptions& options = {}) : options_(options) {}

  void OnStep(const StepSample& sample);
  // Bytes per second; infinity: no limit. Never so low that the bytes of a full step take longer
  // than a step, even where others have less to send (chunks that did not change): a push that
  // drags on makes captures wait for its commit, which costs more than it spares.
  double rate() const;
  // A step without traffic: the mean of quiet ones, or the fastest tenth where none is quiet. 0:
  // not known yet.
  double baseline_s() const { return baseline_s_; }
  double step_s() const { return step_s_; }  // smoothed, with traffic; 0: none yet
  // What traffic costs: 0.02 is 2 %. 0 while not known.
  double slowdown() const;
  std::uint64_t backoffs() const { return backoffs_; }

 private:
  static constexpr std::size_t kWindow = 128;
  static constexpr double kFade = 0.99;  // of a greatest value, for each step since
  double FastestTenth() const;

  StepLimitOptions options_;
  double rate_ = 0;
  bool limited_ = false;
  double peak_rate_ = 0;   // measured
  double most_bytes_ = 0;  // of a step
  double quiet_s_ = 0;
  double step_s_ = 0;
  double baseline_s_ = 0;
  std::array<double, kWindow> recent_{};
  std::size_t seen_ = 0;
  std::size_t since_ = 0;  // steps with traffic since the rate was cut
  std::uint64_t backoffs_ = 0;
};

// --- all of it, for one node ---
struct PacerOptions {
  std::vector<double> busy_then_idle_s;  // a gap trace: busy, idle, busy, idle ... of one iteration
  double safety = 0.9;
  LinkModel link;
  std::uint64_t in_flight_bytes = kUsualInFlight;  // of one connection
  StepLimitOptions limit;
};
struct PaceDecision {
  bool go = false;
  std::int64_t at_ns = 0;   // not go: ask again then
  const char* reason = "";  // stable words: "go", "rate", "span", "class"
};
class Pacer {
 public:
  explicit Pacer(const PacerOptions& options = {});

  // A class has begun or ended to have something to send; calls nest.
  void Begin(TrafficClass traffic);
  void End(TrafficClass traffic);
  // May `bytes` go now? With go they count as gone.
  PaceDecision Ask(TrafficClass traffic, std::uint64_t bytes, std::int64_t now_ns);
  // A step ended at now_ns; the next iteration begins.
  void OnStep(double step_s, std::int64_t now_ns);

  const StepLimit& limit() const { return limit_; }
  std::uint64_t bytes(TrafficClass traffic) const {
    return bytes_[static_cast<std::size_t>(traffic)];
  }
  // Why asking was answered with "not now", counted.
  std::uint64_t held_rate() const { return held_rate_; }
  std::uint64_t held_span() const { return held_span_; }
  std::uint64_t held_class() const { return held_class_; }

 private:
  std::int64_t SpanOpens(std::uint64_t bytes, std::int64_t now_ns);

  PacerOptions options_;
  StepLimit limit_;
  std::array<int, kTrafficClasses> active_{};
  std::array<std::uint64_t, kTrafficClasses> bytes_{};
  std::int64_t next_ns_ = 0;       // the token bucket: the earliest time of the next bytes
  std::int64_t iteration_ns_ = 0;  // when the running iteration began; 0: no step yet
  std::size_t span_ = 0;           // of the running iteration, and what of it is used
  double span_used_s_ = 0;
  std::uint64_t step_bytes_ = 0;
  double step_busy_s_ = 0;
  std::int64_t last_ns_ = 0;
  std::uint64_t held_rate_ = 0, held_span_ = 0, held_class_ = 0;
};

}  // namespace everstep::checkpoint
