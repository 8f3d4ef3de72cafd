// The file tier: checkpoints in a directory, local or shared by the nodes of a job.
//
//   DIR/step-000000001240.gen-7/rank-00000-of-00004.safetensors   each written beside, synced,
//   renamed
//                              /rank-00001-of-00004.safetensors
//                              /...
//                              /manifest.json                     last, by whoever finds all ranks
//                              /damaged                           text: a file failed its checksum
//                              /given-up                          text: a roll-back went behind it
//                              /verified                          it stays whatever the retention
//
// A folder without a manifest is not a checkpoint; whoever writes its last shard seals it, so that
// no node has to wait for another or for a controller. All of it is idempotent: the same shard
// written twice, by two nodes even, is the same file. One FileTier is used by one thread at a time;
// several processes and nodes may use one directory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/files/disk.h"
#include "checkpoint/files/manifest.h"
#include "checkpoint/files/shard_file.h"

namespace everstep::checkpoint {

struct FileCheckpoint {
  enum class State {
    kComplete,    // sealed; its files have the sizes that the manifest says
    kIncomplete,  // no manifest yet (or never: its writers are gone)
    kGivenUp,     // marked: a roll-back went behind it; never restored from
    kDamaged,     // a manifest that cannot be read, a file of another size, or marked
  };
  std::string name;  // "step-000000001240.gen-7"
  Step step = kNoStep;
  Generation generation = 0;
  State state = State::kIncomplete;
  std::string why;    // not complete: what is wrong or missing
  Manifest manifest;  // of a complete one
  bool verified = false;
};
const char* FileStateName(FileCheckpoint::State state);  // "complete"

struct Damage {
  std::string file;
  std::string what;
};

class FileTier {
 public:
  // `disk` must outlive it.
  FileTier(Disk* disk, std::string directory) : disk_(disk), directory_(std::move(directory)) {}
  const std::string& directory() const { return directory_; }

  // Makes the slot's content durable. A file that has this very content already stays. The slot's
  // memory must not change meanwhile: kCorrupt when it does not give its checksums.
  // *written: bytes that went to the disk.
  Outcome WriteShard(const SlotContent& slot, std::uint64_t* written);

  // True: the checkpoint is sealed now (or was). False: not every rank's file is there; *missing
  // says which are. An error: a file that is there cannot belong to it, or the disk refused.
  Result<bool> Seal(Step step, Generation generation, std::uint64_t now_ns,
                    const std::string& writer, std::string* missing = nullptr);

  // Newest first, (step, generation). kNotFound: no such directory.
  Result<std::vector<FileCheckpoint>> List();
  Result<FileCheckpoint> Look(const std::string& name);

  // The head of one rank's file, checked against the manifest.
  Result<ShardHead> ReadHead(const FileCheckpoint& checkpoint, Rank rank);
  // Fills `payload` (head.fields.payload_bytes) and checks it chunk by chunk. kCorrupt names the
  // file and the tensor; nothing of the payload may be used then. kStale: *over was set, which is
  // looked at before each MiB.
  Outcome ReadPayload(const FileCheckpoint& checkpoint, Rank rank, const ShardHead& head,
                      unsigned char* payload, const std::atomic<bool>* over = nullptr);
  // Only these chunks of the payload, each checked and handed to `take`, which ends it with false
  // (kStale); memory for one. kCorrupt as ReadPayload.
  Outcome ReadChunks(const FileCheckpoint& checkpoint, Rank rank, const ShardHead& head,
                     const std::vector<std::uint32_t>& chunks,
                     const std::function<bool(std::uint32_t chunk, const unsigned char* data,
                                              std::uint32_t bytes)>& take);
  // Reads every byte of every file. Empty: it is whole. `progress`: bytes read so far, may be null.
  std::vector<Damage> Verify(const FileCheckpoint& checkpoint,
                             const std::function<void(std::uint64_t)>& progress = nullptr);
  // Writes the mark that keeps it from being restored from or counted as good.
  Outcome MarkDamaged(const std::string& name, const std::string& why);

  Outcome MarkGivenUp(const std::string& name, const std::string& why);
  // kNotFound: there is no such checkpoint (any more).
  Outcome MarkVerified(const std::string& name);

  // Removes complete checkpoints beyond the newest `keep` (at least 1) but for the newest verified
  // one, and what is incomplete or
  // damaged and older than a complete one. The newest complete one always stays, and nothing goes
  // while there is none whose files are there with their sizes and readable heads. *removed:
  // names. What is newer than the newest complete one is left alone: somebody may be writing it.
  Outcome Prune(std::size_t keep, std::vector<std::string>* removed, bool dry_run = false);

 private:
  std::string Folder(const std::string& name) const { return directory_ + "/" + name; }
  Outcome Replace(const std::string& folder, const std::string& name,
                  const std::function<Outcome(DiskWriter*)>& write);
  Result<ShardHead> ReadHeadAt(const std::string& path);
  Outcome Mark(const std::string& name, const char* mark, const std::string& why);
  Outcome RemoveFolder(const std::string& name);

  Disk* const disk_;
  const std::string directory_;
};

std::string CheckpointName(Step step, Generation generation);
bool ParseCheckpointName(const std::string& name, Step* step, Generation* generation);
std::string ShardFileName(Rank rank, std::int32_t world_size);

}  // namespace everstep::checkpoint
