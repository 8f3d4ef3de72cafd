// The node's checkpoint traffic: who may send now, and what became of everything that was sent.
// The shell around checkpoint/core/pacing.h; whoever moves checkpoint bytes asks here first
// (pushes, repairs, the file tier, the scrubber).
//
// Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/core/pacing.h"
#include "checkpoint/store/result.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

// What became of a conversation with a peer. Each has one counter and one explanation.
enum class PeerOutcome : std::uint8_t {
  kDone = 0,    // the bytes are there, verified
  kOvertaken,   // the peer or this node has something newer
  kUnknownJob,  // the peer does not know the job or slot (yet)
  kWrongKey,    // one of both does not know the job's key
  kFull,        // the peer has no memory for it
  kCorrupt,     // bytes changed on the way, or lie
  kNonsense,    // frames that make no sense, or come a second time
  kSlow,        // no byte moved in time, or too few
  kBroken,      // closed, reset or not reachable
  kInternal,
};
inline constexpr std::size_t kPeerOutcomes = 10;
const char* PeerOutcomeName(PeerOutcome outcome);         // "wrong_key"
const char* PeerOutcomeExplanation(PeerOutcome outcome);  // for a person, with what happens next
PeerOutcome OutcomeOf(const Error& error);

// Counts since the service started; seconds.
struct TrafficReport {
  std::array<std::uint64_t, kTrafficClasses> sent_bytes{};
  // Not sent: the peer had them in an older slot, or what is made of them.
  std::uint64_t unchanged_bytes = 0;
  std::uint64_t resumed_bytes = 0;                      // not sent again after a connection broke
  std::array<std::uint64_t, kPeerOutcomes> pushes{};    // by PeerOutcome
  std::array<std::uint64_t, kPeerOutcomes> arrivals{};  // of peers' slots here, likewise
  double push_s = 0;                                    // of the pushes that were done, in all
  double limit_bytes_per_s = 0;                         // 0: none
  double baseline_step_s = 0;                           // 0: not known yet
  double step_s = 0;
  double slowdown = 0;
  std::uint64_t backoffs = 0;
  std::uint64_t held_rate = 0, held_span = 0, held_class = 0;
};

class Traffic {
 public:
  explicit Traffic(const PacerOptions& options)
      : pacer_(options), in_flight_bytes_(options.in_flight_bytes) {}

  // The most that one connection may have under way (head-of-line bound).
  std::uint64_t in_flight_bytes() const { return in_flight_bytes_; }

  // Something of the class is to be sent, as long as this lives: lower classes wait.
  class Turn {
   public:
    Turn(Traffic* traffic, TrafficClass of);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Traffic* traffic_;
    TrafficClass of_;
  };

  // Waits until the bytes may go. False: *cancel was set meanwhile (looked at every 50 ms).
  bool Admit(TrafficClass traffic, std::uint64_t bytes, const std::atomic<bool>* cancel);

  // A rank of the job ended a step: `ended_ns` on any clock that all of its calls share,
  // `waited_ns` its counter of time spent waiting for commits. Ranks go together: a job's first
  // word of a step counts.
  void OnStep(const JobId& job, Generation generation, Rank rank, Step step, std::int64_t ended_ns,
              std::uint64_t waited_ns);

  // The job is over: its last step is forgotten.
  void Forget(const JobId& job);

  void Pushed(PeerOutcome outcome, double seconds, std::uint64_t unchanged_bytes,
              std::uint64_t resumed_bytes);
  void Arrived(PeerOutcome outcome);
  // Bytes that a parity made here needed no more: they are as they were in an older one.
  void Spared(std::uint64_t bytes);

  TrafficReport Report() const;

 private:
  struct LastStep {
    Generation generation = 0;
    Rank rank = 0;
    Step step = kNoStep;
    std::int64_t ended_ns = 0;
    std::uint64_t waited_ns = 0;
  };

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Pacer pacer_;
  const std::uint64_t in_flight_bytes_;
  TrafficReport counts_;
  std::map<JobId, LastStep> steps_;
};

}  // namespace everstep::checkpoint
