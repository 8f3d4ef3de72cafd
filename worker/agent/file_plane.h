// The agent's side of the file tier: copies a committed slot out of its arena, writes it to the
// job's checkpoint directory, says what lies there, and brings it back into an arena before a
// worker starts.
//
//   arena --Copy--> memory --Write--> DIR/step-N.gen-G/   Survey, Load: the way back
//
// A slot lives for a step or two only, a disk may take minutes: so the slot is copied first (one
// rank's size of memory each, given back when it is written), and the trainer goes on. Methods
// block; each says on what. One thread for each of Copy, Write, Survey and Load; the others are
// thread-safe.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/files/file_tier.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "checkpoint/transfer/transfer_service.h"
#include "worker/agent/core/event.h"

namespace everstep::agent {

struct CheckpointDir {
  std::string path;        // empty: the job has none
  std::uint32_t keep = 0;  // complete checkpoints kept; 0: all
};

// A slot's bytes in memory of the agent's own.
struct SlotCopy {
  std::vector<std::uint32_t> chunk_crcs;
  checkpoint::SlotContent content;
  std::unique_ptr<unsigned char[]> payload;
};

class FilePlane final : public checkpoint::ShardFiles {
 public:
  static constexpr std::size_t kNewest = 4;  // checkpoints of which a survey tells
  static constexpr int kAttempts = 3;        // of one write, when the disk refuses
  static constexpr int kBadReads = 2;        // then a checkpoint is passed over on this node

  // Both must outlive it.
  FilePlane(checkpoint::Disk* disk, checkpoint::ArenaHost* host) : disk_(disk), host_(host) {}

  // The shards of (generation, step) of these ranks, from this node's arenas, whole and checked
  // against overwriting. Blocks for memory copies. False with *error: which is not there and why.
  bool Copy(const JobId& job, Generation generation, Step step, const std::vector<Rank>& ranks,
            std::vector<SlotCopy>* out, std::string* error);

  // Writes them, seals the checkpoint when all ranks' files are there, marks the verified one (step
  // kNoStep: none), prunes. Blocks on the disk.
  // The answer lacks only `took`.
  Persisted Write(const CheckpointDir& dir, const JobId& job, Generation generation, Step step,
                  std::vector<SlotCopy> slots, const Cut& verified);

  // What the directory holds, newest complete checkpoints first, as shards of `job`; heads are
  // looked at, not the data. What lies beyond a cut is marked as given up, for this job and whoever
  // comes after it, and not told of. Blocks on the disk.
  std::vector<HeldShard> Survey(const CheckpointDir& dir, const JobId& job,
                                const std::vector<Cut>& given_up);

  // Brings every file source of this node's part into its rank's arena, verified. Blocks on the
  // disk. False with *error; a checkpoint that fails its checksums is marked, so that no survey
  // names it again. Ends soon, between two reads of a MiB, once a later generation has begun.
  bool Load(const CheckpointDir& dir, const Activate& activate, std::string* error);

  // Loads of the job's earlier generations are over: what they would write to belongs to this one.
  void Begin(const JobId& job, Generation generation);
  // Blocks until none of them writes any more. False with *error: the disk has kept one of them in
  // a read for longer than `patience`.
  bool AwaitEarlier(const JobId& job, Generation generation, std::chrono::milliseconds patience,
                    std::string* error);
  void Forget(const JobId& job);

  // For restores by ranges, which the data plane carries out: from its own threads, several at
  // once. A file that fails its checksum marks its checkpoint, as Load does.
  checkpoint::Outcome Read(const std::string& directory, const checkpoint::SlotName& name,
                           checkpoint::ChunkTaker* taker) override;

 private:
  bool CopyOne(const JobId& job, Generation generation, Step step, Rank rank, SlotCopy* out,
               std::string* error);
  // A read of the checkpoint failed: it is not to be tried again, or not often.
  void Refused(checkpoint::FileTier* tier, const std::string& name, const checkpoint::Error& error);
  checkpoint::Outcome LoadOne(checkpoint::FileTier* tier, const JobId& job,
                              const WorkerPlan& worker, const std::atomic<bool>& over);
  bool LoadAll(const CheckpointDir& dir, const Activate& activate, const std::atomic<bool>& over,
               std::string* error);

  checkpoint::Disk* const disk_;
  checkpoint::ArenaHost* const host_;
  struct Loading {
    JobId job;
    Generation generation = 0;
    std::atomic<bool> over{false};
  };

  std::mutex mutex_;
  std::map<std::string, int> bad_;  // path of a checkpoint -> reads that the disk refused
  std::map<JobId, Generation> begun_;
  std::list<Loading> loading_;
  std::condition_variable load_ended_;
};

}  // namespace everstep::agent
