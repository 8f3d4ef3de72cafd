// The jobs' checkpoint directories: one disk that every node sees and that outlives them all. A
// checkpoint is there for a reader once each rank's file is (checkpoint/files seals it by its
// manifest); what a roll-back went behind is marked; the newest few are kept.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "controller/core/types.h"

namespace everstep::sim {

class Files {
 public:
  static constexpr std::size_t kTold = 4;  // checkpoints of which a survey tells
  static constexpr int kBadReads = 2;      // then a checkpoint is passed over

  // One rank's file. False: the disk refuses.
  bool Write(Timestamp now, const JobId& job, const HeldShard& shard);
  // True: every rank's file is there (now, or was).
  bool Seal(Timestamp now, const JobId& job, Generation generation, Step step);
  // All but the `keep` newest sealed ones go, never `verified`.
  void Prune(const JobId& job, std::size_t keep, const Cut& verified);

  // Newest first. Those beyond a cut are marked, and not told of any more.
  std::vector<HeldShard> Survey(const JobId& job, const std::vector<Cut>& given_up);
  // The bytes of one rank's file. None: it is not there, damaged, or of other bytes.
  std::optional<HeldShard> Read(const JobId& job, Generation generation, Step step, Rank rank,
                                std::uint32_t crc_root);

  // --- faults ---
  void FailUntil(Timestamp until) { fails_until_ = until; }
  // The newest sealed checkpoint of `job` cannot be read any more. False: there is none.
  bool Damage(const JobId& job);

  // For checkers: the newest that was sealed before `when` and could be read all the time since.
  std::optional<HeldShard> Newest(const JobId& job, Timestamp when,
                                  const std::vector<Cut>& given_up) const;

 private:
  struct Checkpoint {
    std::map<Rank, HeldShard> ranks;
    bool sealed = false;
    bool given_up = false;
    bool damaged = false;
    int bad_reads = 0;
    Timestamp sealed_at;
  };
  using Name = std::pair<Step, Generation>;

  std::map<JobId, std::map<Name, Checkpoint>> jobs_;
  Timestamp fails_until_;
};

}  // namespace everstep::sim
