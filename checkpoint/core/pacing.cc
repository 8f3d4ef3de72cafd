#include "checkpoint/core/pacing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace everstep::checkpoint {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr std::int64_t kAskAgainNs = 5'000'000;  // another class must end first: nobody knows when
constexpr double kTogetherS = 0.05;              // bytes closer than this went in one go
constexpr double kRounding = 1e-9;

std::int64_t Nanos(double seconds) {
  return static_cast<std::int64_t>(std::min(seconds, 3600.0) * 1e9);
}

}  // namespace

const char* TrafficClassName(TrafficClass traffic) {
  switch (traffic) {
    case TrafficClass::kCommit: return "commit";
    case TrafficClass::kRepair: return "repair";
    case TrafficClass::kPersist: return "persist";
    case TrafficClass::kScrub: return "scrub";
  }
  return "unknown";
}

std::vector<SpanChunk> FillSpans(const SpanRequest& request) {
  std::vector<SpanChunk> chunks;
  if (request.bytes == 0 || request.copies <= 0) return chunks;
  const std::uint64_t most = std::max<std::uint64_t>(1, request.chunk_bytes);
  std::uint64_t left = request.bytes;
  int copy = 0;
  for (std::size_t i = 0; i <= request.idle_s.size(); ++i) {
    double span = i < request.idle_s.size() ? request.safety * request.idle_s[i] : kNever;
    while (span > 0) {
      std::uint64_t size = most;
      if (span < request.link.Seconds(static_cast<double>(most))) {
        const double fits = (span - request.link.alpha_s) * request.link.bytes_per_s;
        size = fits < 1 ? 0 : static_cast<std::uint64_t>(fits);
      }
      size = std::min(size, left);
      if (size == 0) break;  // nothing more fits this span
      left -= size;
      span -= request.link.Seconds(static_cast<double>(size));
      chunks.push_back({.span = i, .bytes = size, .copy = copy});
      if (left > 0) continue;
      if (++copy == request.copies) return chunks;
      left = request.bytes;
    }
  }
  return chunks;
}

std::uint64_t InFlightBytes(double layer_s, double collective_s, double bytes_per_s,
                            double fraction) {
  if (layer_s <= 0 || bytes_per_s <= 0) return kUsualInFlight;
  const double bytes = fraction * std::max(0.0, layer_s - collective_s) * bytes_per_s;
  return static_cast<std::uint64_t>(
      std::clamp(bytes, static_cast<double>(kLeastInFlight), static_cast<double>(kMostInFlight)));
}

void StepLimit::OnStep(const StepSample& sample) {
  if (!(sample.step_s > 0) || sample.step_s == kNever) return;
  const bool quiet = sample.bytes == 0;
  const double w = options_.smoothing;
  recent_[seen_ % kWindow] = sample.step_s;
  ++seen_;
  if (quiet) {
    quiet_s_ = quiet_s_ == 0 ? sample.step_s : quiet_s_ + w * (sample.step_s - quiet_s_);
  } else {
    step_s_ = since_ == 0 ? sample.step_s : step_s_ + w * (sample.step_s - step_s_);
    ++since_;
    most_bytes_ = std::max(most_bytes_ * kFade, static_cast<double>(sample.bytes));
    if (sample.busy_s > 0) {
      peak_rate_ = std::max(peak_rate_ * kFade, static_cast<double>(sample.bytes) / sample.busy_s);
    }
  }
  if (seen_ < kLearn) return;
  baseline_s_ = quiet_s_ > 0 ? quiet_s_ : FastestTenth();
  if (quiet || baseline_s_ <= 0 || since_ < kSettle) return;

  const double now = limited_ ? rate_ : peak_rate_;
  const double floor = std::max(options_.floor_bytes_per_s, most_bytes_ / baseline_s_);
  if (step_s_ > baseline_s_ * (1 + options_.tolerance)) {
    if (now <= floor) return;
    rate_ = std::max(floor, now * options_.backoff);
    limited_ = true;
    since_ = 0;  // what was slow before says nothing of the new rate
    ++backoffs_;
  } else if (limited_) {
    rate_ = now + static_cast<double>(options_.chunk_bytes);
    if (rate_ > 2 * peak_rate_) limited_ = false;  // the link is slower than that anyway
  }
  if (limited_) rate_ = std::max(rate_, floor);
}

double StepLimit::FastestTenth() const {
  std::vector<double> times(
      recent_.begin(), recent_.begin() + static_cast<std::ptrdiff_t>(std::min(seen_, kWindow)));
  const auto nth = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 10);
  std::nth_element(times.begin(), nth, times.end());
  return *nth;
}

double StepLimit::rate() const {
  return limited_ ? rate_ : kNever;
}

double StepLimit::slowdown() const {
  if (baseline_s_ <= 0 || step_s_ <= 0) return 0;
  return std::max(0.0, step_s_ / baseline_s_ - 1);
}

Pacer::Pacer(const PacerOptions& options) : options_(options), limit_(options.limit) {}

void Pacer::Begin(TrafficClass traffic) {
  ++active_[static_cast<std::size_t>(traffic)];
}
void Pacer::End(TrafficClass traffic) {
  int& n = active_[static_cast<std::size_t>(traffic)];
  if (n > 0) --n;
}

// When the gap trace lets `bytes` go: now_ns or before, or the begin of a later span. Counts
// nothing.
std::int64_t Pacer::SpanOpens(std::uint64_t bytes, std::int64_t now_ns) {
  const std::vector<double>& trace = options_.busy_then_idle_s;
  if (trace.size() < 2 || iteration_ns_ == 0) return now_ns;
  const double now_s = static_cast<double>(now_ns - iteration_ns_) / 1e9;
  const double cost_s = options_.link.Seconds(static_cast<double>(bytes));
  double begin_s = 0;
  for (std::size_t i = 0; 2 * i + 1 < trace.size(); ++i) {
    begin_s += trace[2 * i];
    const double idle_s = trace[2 * i + 1];
    const double end_s = begin_s + idle_s;
    const double used_s = i == span_ ? span_used_s_ : 0;
    const double from_s = std::max(now_s, begin_s);
    // It fits the safe part of the span, and ends within it.
    if (i >= span_ && used_s + cost_s <= options_.safety * idle_s + kRounding &&
        from_s + cost_s <= end_s + kRounding) {
      if (i != span_) span_used_s_ = 0;
      span_ = i;
      return from_s <= now_s ? now_ns : iteration_ns_ + Nanos(from_s);
    }
    begin_s = end_s;
  }
  span_ = trace.size() / 2;  // behind the last one: what is left goes until the iteration's end
  return now_s >= begin_s ? now_ns : iteration_ns_ + Nanos(begin_s);
}

PaceDecision Pacer::Ask(TrafficClass traffic, std::uint64_t bytes, std::int64_t now_ns) {
  const auto mine = static_cast<std::size_t>(traffic);
  for (std::size_t i = 0; i < mine; ++i) {
    if (active_[i] > 0) {
      ++held_class_;
      return {false, now_ns + kAskAgainNs, "class"};
    }
  }
  if (next_ns_ > now_ns) {
    ++held_rate_;
    return {false, next_ns_, "rate"};
  }
  const std::int64_t opens = SpanOpens(bytes, now_ns);
  if (opens > now_ns) {
    ++held_span_;
    return {false, opens, "span"};
  }
  bytes_[mine] += bytes;
  step_bytes_ += bytes;
  span_used_s_ += options_.link.Seconds(static_cast<double>(bytes));
  const double since_s = static_cast<double>(now_ns - last_ns_) / 1e9;
  if (last_ns_ != 0 && since_s < kTogetherS) step_busy_s_ += since_s;
  last_ns_ = now_ns;
  const double rate = limit_.rate();
  next_ns_ = rate != kNever ? std::max(next_ns_, now_ns - kAskAgainNs) +
                                  Nanos(static_cast<double>(bytes) / rate)
                            : 0;
  return {true, now_ns, "go"};
}

void Pacer::OnStep(double step_s, std::int64_t now_ns) {
  limit_.OnStep({.step_s = step_s, .bytes = step_bytes_, .busy_s = step_busy_s_});
  step_bytes_ = 0;
  step_busy_s_ = 0;
  iteration_ns_ = now_ns;
  span_ = 0;
  span_used_s_ = 0;
}

}  // namespace everstep::checkpoint
