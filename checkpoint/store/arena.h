// An arena as one process sees it: making the memfd, mapping it, looking at its slots, checking
// them. SlotWriter (slot_writer.h) fills them.
//
// Rules that all processes keep (docs/internals/lifecycle.md, "Checkpoints"):
//  - one writer of slots at a time: the agent until it has set the restore word, then the trainer;
//  - a slot is chosen by a finished (even) sequence only, and trusted after Verify only;
//  - the header comes from memory that a trainer can write: nothing in it is used as an offset or a
//    length before it was checked against the file's size.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "checkpoint/store/arena_layout.h"
#include "checkpoint/store/result.h"
#include "proto/base/ids.h"
#include "proto/base/plan.h"

namespace everstep::checkpoint {

struct ArenaSpec {
  JobId job;
  Rank rank = 0;
  bool replica = false;
  std::uint64_t slot_bytes = 0;  // first room for one slot's payload; an arena grows when it must
};

// A new memfd with its header written; sealed against shrinking. Takes no memory for the slots yet
// (the process that fills one does, SlotWriter::Reserve), so it returns at once; but refuses with
// kNoMemory what this machine or control group has not got.
Result<int> CreateArenaFd(const ArenaSpec& spec);

// Where slots of `slot_bytes` payload end: for KeeperArenaReply.total_bytes.
std::uint64_t ArenaFileBytes(std::uint64_t slot_bytes);

// One finished content of a slot. Plain facts: valid for ever, current only while Arena::Current.
struct SlotView {
  std::uint32_t slot = 0;
  std::uint64_t seq = 0;
  std::uint64_t extent_offset = 0;
  std::uint64_t extent_bytes = 0;
  SlotFields fields;
  std::uint32_t crc_root = 0;

  Step step() const { return fields.step; }
  // Names this content within its arena (sequences count per slot).
  std::uint64_t content() const { return seq * kSlots + slot; }
  bool replicated_layout() const { return (fields.flags & kFlagReplicatedLayout) != 0; }
  bool share() const { return (fields.flags & kFlagShare) != 0; }
  std::uint64_t chunks() const { return ChunkCount(fields.payload_bytes); }
  std::uint32_t chunk_size(std::uint64_t chunk) const {
    const std::uint64_t left = fields.payload_bytes - chunk * kChunkBytes;
    return left < kChunkBytes ? static_cast<std::uint32_t>(left) : kChunkBytes;
  }
};
HeldShard ToShard(const SlotView& view, bool replica);

// CRC32C of `fields`, then of the chunk CRCs.
std::uint32_t CrcRoot(const SlotFields& fields, const std::uint32_t* chunk_crcs);
// Fields that a peer or a header claims: kInvalid with what is wrong, or Done.
Outcome CheckFields(const SlotFields& fields);

struct RestoreView {
  Generation generation = 0;
  RestoreState state = RestoreState::kNone;
  std::uint32_t slot = 0;
  std::uint64_t slot_seq = 0;  // kPending: payload bytes on their way
  Step step = kNoStep;
  std::string message;
};

// Where some bytes of a payload are to go.
struct LoadTarget {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  void* to = nullptr;
};

// Owns the descriptor and the mappings. One thread at a time, but several Arena objects (and
// processes) may map the same memfd. Movable.
class Arena {
 public:
  Arena() = default;
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  // Takes `fd`, also on failure. A file without a header (all zero) is formatted as `blank` says,
  // when given. kInvalid: not an arena, or of another format version.
  static Result<Arena> Open(int fd, const ArenaSpec* blank = nullptr);

  bool open() const { return header_ != nullptr; }
  int fd() const { return fd_; }
  ArenaHeader* header() const { return header_; }
  std::string Name() const;  // "arena of job demo rank 3"

  // The finished content of a slot; none: never written, being written, its facts cannot be, or it
  // is no state but an exchange.
  std::optional<SlotView> Look(std::uint32_t slot) const;
  // The finished exchange of this kind (kFlagCatalog, kFlagRequest, kFlagAssembled) in a slot.
  std::optional<SlotView> LookExchange(std::uint32_t slot, std::uint32_t flag) const;
  // As Look, for who was told of the slot by a RestoreWord: also what was put together for this
  // rank alone.
  std::optional<SlotView> LookRestored(std::uint32_t slot) const;
  // The finished slot with the greatest (step, generation) among steps <= max_step; not verified.
  std::optional<SlotView> Newest(Step max_step = INT64_MAX) const;
  // The slot was not touched since the view was taken.
  bool Current(const SlotView& view) const;
  // Every chunk and the root, by `threads` threads at most (a caller that has nothing better to do
  // takes several). kCorrupt names the first bad chunk; kStale: overwritten meanwhile. Leaves its
  // finding in the slot, for Damaged.
  Outcome Verify(const SlotView& view, unsigned threads = 1);
  // The same for those chunks alone in which `bytes` from `offset` of the payload lie.
  Outcome VerifyRange(const SlotView& view, std::uint64_t offset, std::uint64_t bytes);
  // As Verify, and copies `targets` in the same pass over the slot's memory. On an error what they
  // hold is undefined. kInvalid: they are not in ascending order, overlap, or leave the payload.
  Outcome Load(const SlotView& view, std::span<const LoadTarget> targets, unsigned threads);
  // Somebody found these very bytes damaged: by Verify, or while they were copied or sent.
  bool Damaged(const SlotView& view) const;
  void MarkDamaged(const SlotView& view) const;

  // Mapped bytes of a view; null when they cannot be mapped. Valid until the slot's extent moves.
  const unsigned char* Payload(const SlotView& view);
  const std::uint32_t* ChunkCrcs(const SlotView& view);

  RestoreView Restore() const;
  void SetRestore(const RestoreView& view);  // the agent only

 private:
  friend class SlotWriter;
  struct Mapping {
    unsigned char* data = nullptr;
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
  };
  Outcome Check(const SlotView& view, std::uint64_t first, std::uint64_t end,
                std::span<const LoadTarget> targets, unsigned threads);
  Outcome Noted(const SlotView& view, Outcome found, bool all) const;
  std::optional<SlotView> LookAny(std::uint32_t slot) const;
  unsigned char* Map(std::uint32_t slot, std::uint64_t offset, std::uint64_t bytes);
  void Close();

  int fd_ = -1;
  ArenaHeader* header_ = nullptr;
  std::array<Mapping, kSlots> mappings_{};
  // Offset of the extent; 0: none.
  std::array<std::uint64_t, kSlots> populated_{};  // ... that lies in this process's page tables
  std::array<std::uint64_t, kSlots> taken_{};      // ... that has all its memory
};

// Copies shared words that another process may be changing (seqlock readers and writers).
// REQUIRES: 8-byte alignment, bytes a multiple of 8.
void LoadWords(void* to, const void* from, std::size_t bytes);
void StoreWords(void* to, const void* from, std::size_t bytes);

}  // namespace everstep::checkpoint
