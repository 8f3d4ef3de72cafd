// What one agent's data plane knows of each job: its key, its fence, its newest commit.
// Thread-safe.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "checkpoint/transfer/siphash.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

struct JobFacts {
  SipKey key{};
  Generation generation = 0;  // pushes and fetches of older ones are refused
  Generation committed_generation = 0;
  Step committed_step = kNoStep;
};

class JobTable {
 public:
  // Only forward: an older generation changes nothing. An empty key keeps the one known.
  void Begin(const JobId& job, Generation generation, const std::string& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    JobFacts& facts = jobs_[job];
    if (generation > facts.generation) facts.generation = generation;
    if (!key.empty() || !keyed_[job]) facts.key = DeriveKey(key);
    keyed_[job] = keyed_[job] || !key.empty();
  }
  // The controller's last word counts: a job that went back to what an older generation had
  // captured has a newest commit of that one.
  void Committed(const JobId& job, Generation generation, Step step) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = jobs_.find(job);
    if (it == jobs_.end()) return;
    it->second.committed_generation = generation;
    it->second.committed_step = step;
  }
  std::optional<JobFacts> Find(const JobId& job) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = jobs_.find(job);
    if (it == jobs_.end()) return std::nullopt;
    return it->second;
  }
  void Erase(const JobId& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.erase(job);
    keyed_.erase(job);
  }

 private:
  mutable std::mutex mutex_;
  std::map<JobId, JobFacts> jobs_;
  std::map<JobId, bool> keyed_;
};

}  // namespace everstep::checkpoint
