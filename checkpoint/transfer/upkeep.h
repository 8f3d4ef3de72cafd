// What a node does for the copies in its memory beside moving them: looks them over (scrubber.h),
// remembers which are damaged, mends them from another node's (mender.h), says what is whole, and
// tears what a roll-back gave up. Owned by the transfer service; thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/scrubber.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

class Upkeep {
 public:
  // All must outlive it; `pool` runs the mends and is stopped first.
  Upkeep(const TransferOptions& options, ArenaHost* host, Listener* listener, const JobTable* jobs,
         Traffic* traffic, TaskPool* pool)
      : options_(options),
        host_(host),
        listener_(listener),
        jobs_(jobs),
        traffic_(traffic),
        pool_(pool) {}

  void Start(std::function<std::vector<JobId>()> jobs);  // the scrubber; once
  void Stop();  // ends the scrubber, mends that run end soon

  // What lies verified in this node's memory of the job; what does not verify is told as damaged.
  std::vector<HeldShard> Survey(const JobId& job);
  // TransferService::Mend.
  void Mend(const JobId& job, const HeldShard& shard, const std::string& source_address);
  // Tears every slot of the job, own and kept for peers, that lies beyond a cut.
  void GiveUp(const JobId& job, const std::vector<Cut>& given_up);

  // Counts it once and tells the listener each time.
  void Damaged(const JobId& job, const HeldShard& shard, std::int64_t chunk, const char* by);
  void Mended(const JobId& job, const HeldShard& shard);
  bool KnownDamaged(const JobId& job, const HeldShard& shard) const;
  ScrubReport report() const;  // REQUIRES: started

 private:
  using DamageKey = std::tuple<JobId, Rank, bool, Generation, Step>;
  static DamageKey KeyOf(const JobId& job, const HeldShard& s) {
    return {job, s.rank, s.replica, s.generation, s.step};
  }
  void RunMend(const JobId& job, const HeldShard& shard, const std::string& source_address);
  void MendIn(const PeerTask& task, Arena* arena, const HeldShard& shard);

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  const JobTable* const jobs_;
  Traffic* const traffic_;
  TaskPool* const pool_;
  std::atomic<bool> ending_{false};

  mutable std::mutex mutex_;
  std::set<DamageKey> damaged_;  // found, and not mended yet
  std::uint64_t found_ = 0;
  std::uint64_t mended_ = 0;

  std::unique_ptr<Scrubber> scrubber_;  // last: its thread uses the others
};

}  // namespace everstep::checkpoint
