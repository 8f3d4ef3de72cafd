#include "checkpoint/transfer/traffic.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace everstep::checkpoint {
namespace {

std::int64_t Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
constexpr std::int64_t kLookForCancelNs = 50'000'000;

}  // namespace

const char* PeerOutcomeName(PeerOutcome outcome) {
  switch (outcome) {
    case PeerOutcome::kDone: return "done";
    case PeerOutcome::kOvertaken: return "overtaken";
    case PeerOutcome::kUnknownJob: return "unknown_job";
    case PeerOutcome::kWrongKey: return "wrong_key";
    case PeerOutcome::kFull: return "full";
    case PeerOutcome::kCorrupt: return "corrupt";
    case PeerOutcome::kNonsense: return "nonsense";
    case PeerOutcome::kSlow: return "slow";
    case PeerOutcome::kBroken: return "broken";
    case PeerOutcome::kInternal: return "internal";
  }
  return "internal";
}

const char* PeerOutcomeExplanation(PeerOutcome outcome) {
  switch (outcome) {
    case PeerOutcome::kDone: return "the peer holds the bytes, verified";
    case PeerOutcome::kOvertaken: return "a newer step or generation took its place";
    case PeerOutcome::kUnknownJob: return "the peer does not know the job (yet); tried again";
    case PeerOutcome::kWrongKey: return "one side does not know the job's key; nothing was taken";
    case PeerOutcome::kFull:
      return "the peer has no memory for the slot; given up until a newer one";
    case PeerOutcome::kCorrupt:
      return "a chunk failed its checksum and was not taken; sent again, the third time the "
             "sender's "
             "memory is the suspect";
    case PeerOutcome::kNonsense: return "frames that make no sense; the connection was ended";
    case PeerOutcome::kSlow: return "no byte moved in time; resumed behind what had arrived";
    case PeerOutcome::kBroken: return "the connection broke; resumed behind what had arrived";
    case PeerOutcome::kInternal: return "the operating system refused; see the agent's log";
  }
  return "";
}

PeerOutcome OutcomeOf(const Error& error) {
  switch (error.code) {
    case ErrorCode::kInvalid: return PeerOutcome::kNonsense;
    case ErrorCode::kNotFound: return PeerOutcome::kUnknownJob;
    case ErrorCode::kNoMemory: return PeerOutcome::kFull;
    case ErrorCode::kCorrupt: return PeerOutcome::kCorrupt;
    case ErrorCode::kStale: return PeerOutcome::kOvertaken;
    case ErrorCode::kUnavailable: return PeerOutcome::kBroken;
    case ErrorCode::kTimedOut: return PeerOutcome::kSlow;
    case ErrorCode::kRefused: return PeerOutcome::kWrongKey;
    case ErrorCode::kInternal: break;
  }
  return PeerOutcome::kInternal;
}

Traffic::Turn::Turn(Traffic* traffic, TrafficClass of) : traffic_(traffic), of_(of) {
  std::lock_guard<std::mutex> lock(traffic_->mutex_);
  traffic_->pacer_.Begin(of_);
}
Traffic::Turn::~Turn() {
  std::lock_guard<std::mutex> lock(traffic_->mutex_);
  traffic_->pacer_.End(of_);
  traffic_->changed_.notify_all();
}

bool Traffic::Admit(TrafficClass traffic, std::uint64_t bytes, const std::atomic<bool>* cancel) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (cancel != nullptr && cancel->load(std::memory_order_relaxed)) return false;
    const std::int64_t now = Now();
    const PaceDecision decision = pacer_.Ask(traffic, bytes, now);
    if (decision.go) return true;
    const std::int64_t wait = std::clamp<std::int64_t>(decision.at_ns - now, 1, kLookForCancelNs);
    changed_.wait_for(lock, std::chrono::nanoseconds(wait));
  }
}

void Traffic::OnStep(const JobId& job, Generation generation, Rank rank, Step step,
                     std::int64_t ended_ns, std::uint64_t waited_ns) {
  std::lock_guard<std::mutex> lock(mutex_);
  LastStep& last = steps_[job];
  const bool follows = last.generation == generation && last.rank == rank && step > last.step &&
                       last.step != kNoStep && ended_ns > last.ended_ns &&
                       waited_ns >= last.waited_ns;
  if (last.generation == generation && last.rank != rank) return;  // one rank of a job is enough
  if (follows) {
    const auto all = static_cast<double>(ended_ns - last.ended_ns);
    const double waited = std::min(all, static_cast<double>(waited_ns - last.waited_ns));
    pacer_.OnStep((all - waited) / 1e9 / static_cast<double>(step - last.step), Now());
    changed_.notify_all();
  }
  if (follows || step != last.step || generation != last.generation) {
    last = {generation, rank, step, ended_ns, waited_ns};
  }
}

void Traffic::Forget(const JobId& job) {
  std::lock_guard<std::mutex> lock(mutex_);
  steps_.erase(job);
}

void Traffic::Pushed(PeerOutcome outcome, double seconds, std::uint64_t unchanged_bytes,
                     std::uint64_t resumed_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counts_.pushes[static_cast<std::size_t>(outcome)];
  if (outcome == PeerOutcome::kDone) counts_.push_s += seconds;
  counts_.unchanged_bytes += unchanged_bytes;
  counts_.resumed_bytes += resumed_bytes;
}

void Traffic::Spared(std::uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  counts_.unchanged_bytes += bytes;
}

void Traffic::Arrived(PeerOutcome outcome) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counts_.arrivals[static_cast<std::size_t>(outcome)];
}

TrafficReport Traffic::Report() const {
  std::lock_guard<std::mutex> lock(mutex_);
  TrafficReport out = counts_;
  for (std::size_t i = 0; i < kTrafficClasses; ++i) {
    out.sent_bytes[i] = pacer_.bytes(static_cast<TrafficClass>(i));
  }
  const StepLimit& limit = pacer_.limit();
  out.limit_bytes_per_s = std::isinf(limit.rate()) ? 0 : limit.rate();
  out.baseline_step_s = limit.baseline_s();
  out.step_s = limit.step_s();
  out.slowdown = limit.slowdown();
  out.backoffs = limit.backoffs();
  out.held_rate = pacer_.held_rate();
  out.held_span = pacer_.held_span();
  out.held_class = pacer_.held_class();
  return out;
}

}  // namespace everstep::checkpoint
