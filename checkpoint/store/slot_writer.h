// Fills one slot of an arena. From Begin to Publish the slot is torn (odd sequence): whoever dies
// in between leaves the other slot, which is whole.
//
// Two ways to fill: Append (the trainer; bytes come in order, copied and checksummed in one pass),
// or chunk by chunk (the agent; bytes come from a peer straight into Chunk(i)).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "checkpoint/store/arena.h"

namespace everstep::checkpoint {

// The memory of a slot is all taken before a call returns. When it comes into this process's page
// tables: then, too, or chunk by chunk (TouchChunk), each in the thread that is to fill it.
// kByWrite: what lacks is taken as it is filled, by Write, which does not clear it first; that
// there is so much was looked at.
enum class Touch : std::uint8_t { kNow, kByChunk, kByWrite };

class SlotWriter {
 public:
  // Gives the slot room for `payload_bytes` (and, when it must grow, a little more) and takes that
  // memory now. A slot with content keeps it; only one that must grow loses it. kNoMemory when the
  // machine has not got it.
  // REQUIRES: the caller is the arena's one writer, and the slot may be overwritten when it is too
  // small.
  static Outcome Reserve(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes,
                         Touch touch = Touch::kNow);

  // The mapping of a slot's extent in this process, if Begin for `payload_bytes` (after Trim, with
  // `trimmed`) would leave it where it is; else empty.
  static std::span<unsigned char> Mapped(const Arena& arena, std::uint32_t slot,
                                         std::uint64_t payload_bytes, bool trimmed);

  // Tears the slot and gives it room for `payload_bytes`. `arena` must outlive the writer.
  static Result<SlotWriter> Begin(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes,
                                  Touch touch = Touch::kNow);
  // Gives back what a slot has beyond twice the memory for `payload_bytes`; tears it then.
  static void Trim(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes);

  // Tells in the arena's header what is being captured and, from here on, how far it is
  // (capture_word.h). `fields`: as for Finish, captured_ns with them. REQUIRES: nothing appended
  // yet.
  void Announce(SlotFields fields, std::uint64_t payload_bytes);
  // It will not be finished. Finish does this by itself.
  void Withdraw();

  // --- in order ---
  // kInvalid when the bytes do not fit.
  Outcome Append(const void* data, std::uint64_t size);
  // As Append of bytes that lie at their place already: Beginning(), a device's copies into it.
  Outcome Adopt(std::uint64_t size);
  // Zero bytes up to a multiple of kTensorAlignment.
  Outcome Align();
  std::uint64_t offset() const { return offset_; }
  // Ends the payload here; its last `table_bytes` are the table. `fields`: what the caller knows
  // (generation, step, rank, world_size, flags, captured_ns); the rest is filled in.
  Result<SlotView> Finish(SlotFields fields, std::uint64_t table_bytes);

  // --- by chunk ---
  unsigned char* Chunk(std::uint64_t chunk) { return data_ + chunk * kChunkBytes; }
  // Before it is filled, after Touch::kByChunk: one call in place of a fault for each page.
  void TouchChunk(std::uint64_t chunk);
  // After Touch::kByWrite: the slot has memory to take still.
  bool fresh() const { return fresh_; }
  // Fills bytes of the payload; new pages that it fills whole cost half of what they cost by Chunk.
  // Several threads may, each other bytes. kNoMemory: there is no more.
  Outcome Write(std::uint64_t offset, const void* from, std::uint64_t bytes);
  // The chunk's memory is there, and in this process's page tables: for stores by Chunk.
  Outcome TakeChunk(std::uint64_t chunk);
  void SetChunkCrc(std::uint64_t chunk, std::uint32_t crc) { crcs_[chunk] = crc; }
  std::uint32_t ChunkCrc(std::uint64_t chunk) const { return crcs_[chunk]; }
  // kCorrupt when the chunk CRCs and `fields` do not give `crc_root`; the slot stays torn.
  Result<SlotView> Publish(const SlotFields& fields, std::uint32_t crc_root);

  std::uint32_t slot() const { return slot_; }
  std::uint64_t capacity() const { return capacity_; }
  // Where the payload begins, mapped here. What is written there counts once it is adopted.
  unsigned char* Beginning() const { return data_; }

 private:
  SlotWriter(Arena* arena, std::uint32_t slot, unsigned char* data, std::uint64_t capacity,
             std::uint32_t* crcs)
      : arena_(arena), slot_(slot), data_(data), capacity_(capacity), crcs_(crcs) {}
  // Append, or with `from` null Adopt.
  Outcome Take(const unsigned char* from, std::uint64_t size);
  SlotView Expose(const SlotFields& fields, std::uint32_t crc_root);

  Arena* arena_;
  std::uint32_t slot_;
  unsigned char* data_;
  std::uint64_t capacity_;
  std::uint32_t* crcs_;
  std::uint64_t offset_ = 0;
  std::uint32_t chunk_crc_ = 0;  // of the chunk that offset_ is in
  bool announced_ = false;
  bool fresh_ = false;
};

}  // namespace everstep::checkpoint
