// The simulated controller's store: a log of batches on a simulated disk. A batch is as many writes
// as it has records; after a crash any of the unsynced writes may be missing, and a batch counts
// only when it is whole and all before it are. That is what RocksDB's log promises (checksummed, in
// order).
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "controller/store/record_store.h"
#include "tests/sim/kernel/disk.h"

namespace everstep::sim {

class SimStore {
 public:
  // The batch lies in the disk's cache; it is durable after Sync.
  void Append(std::span<const controller::Record> records,
              std::span<const controller::Deletion> deletions);
  void Sync();
  // The process died: each unsynced write survives with keep_per_mille / 1000.
  void Crash(Random* random, std::uint32_t keep_per_mille);

  std::vector<controller::Record> Load() const;
  std::uint64_t syncs() const { return disk_.syncs(); }
  std::uint64_t torn() const { return torn_; }

 private:
  struct Frame {
    std::uint64_t batch = 0;
    std::size_t of = 0;                                // frames in the batch
    std::shared_ptr<const controller::Record> record;  // none: `deletion`
    controller::Deletion deletion;
  };
  void Fold();

  Disk<Frame> disk_;
  std::map<controller::RecordKey, std::shared_ptr<const controller::Record>> table_;
  std::uint64_t batches_ = 0;
  std::uint64_t folded_ = 0;  // newest batch in the table
  std::uint64_t torn_ = 0;    // batches a crash left incomplete
};

}  // namespace everstep::sim
