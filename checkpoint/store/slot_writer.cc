#include "checkpoint/store/slot_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "checkpoint/store/fence.h"
#include "checkpoint/store/memory_limit.h"
#include "checkpoint/store/mend.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace everstep::checkpoint {
namespace {

constexpr std::uint64_t kHugePage = 2u << 20;

Error System(const Arena& arena, const char* what) {
  const ErrorCode code =
      errno == ENOMEM || errno == ENOSPC ? ErrorCode::kNoMemory : ErrorCode::kInternal;
  return Error{code, fmt::format("{}: {}: {}", arena.Name(), what, ErrnoText(errno))};
}

// Room beside what was asked for, so that a state that grows by a few bytes each step (a longer
// number in its table) does not need a new extent each step.
constexpr std::uint64_t Slack(std::uint64_t payload_bytes) {
  return payload_bytes / 128 + kPageBytes;
}

// Bytes of [offset, offset + bytes) that have no memory yet.
std::uint64_t Missing(int fd, std::uint64_t offset, std::uint64_t bytes) {
  std::uint64_t missing = 0;
  std::uint64_t at = offset;
  const std::uint64_t end = offset + bytes;
  while (at < end) {
    const off_t hole = lseek(fd, static_cast<off_t>(at), SEEK_HOLE);
    if (hole < 0 || static_cast<std::uint64_t>(hole) >= end) break;
    const off_t data = lseek(fd, hole, SEEK_DATA);
    const std::uint64_t until = data < 0 ? end : std::min(end, static_cast<std::uint64_t>(data));
    missing += until - static_cast<std::uint64_t>(hole);
    at = until;
  }
  return missing;
}

// Takes the memory of a mapping now, so that no later store can fail or stall.
Outcome Populate(const Arena& arena, unsigned char* data, std::uint64_t offset,
                 std::uint64_t bytes) {
  const std::uint64_t missing = Missing(arena.fd(), offset, bytes);
  if (missing > 0) {
    if (auto ok = CheckMemory(missing, arena.Name()); !ok.ok()) return ok;
  }
  int result;
  do {
    result = madvise(data, bytes, MADV_POPULATE_WRITE);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  if (result == 0) return Done{};
  if (errno != EINVAL) return System(arena, "taking the memory of a slot");
  // Before Linux 5.14: the memory is taken, the page tables fill at the first touch.
  if (fallocate(arena.fd(), 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    return System(arena, "taking the memory of a slot");
  }
  return Done{};
}

}  // namespace

Outcome SlotWriter::Reserve(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes) {
  SlotHeader& h = arena->header()->slot[slot];
  struct stat st {};
  if (fstat(arena->fd(), &st) != 0) return System(*arena, "fstat");
  const auto file = static_cast<std::uint64_t>(st.st_size);
  const bool sane = h.extent_offset >= kArenaHeaderBytes && h.extent_offset % kPageBytes == 0 &&
                    h.extent_offset <= file && h.extent_bytes <= file - h.extent_offset &&
                    h.extent_bytes % kPageBytes == 0;
  if (!sane || ExtentCapacity(h.extent_bytes) < payload_bytes) {
    const std::uint64_t bytes = ExtentBytes(payload_bytes + Slack(payload_bytes));
    const std::uint64_t freed = sane ? h.extent_bytes : 0;
    if (bytes > freed) {
      if (auto ok = CheckMemory(bytes - freed, arena->Name()); !ok.ok()) return ok;
    }
    const std::uint64_t offset = RoundUp(file, bytes >= kHugePage ? kHugePage : kPageBytes);
    if (ftruncate(arena->fd(), static_cast<off_t>(offset + bytes)) != 0) {
      return System(*arena, "growing the memfd");
    }
    KillPoint("slot.file_grown");
    // Torn first: no reader follows an extent that is on the move.
    const std::uint64_t seq = h.seq.load(std::memory_order_relaxed);
    if (seq != 0 || h.extent_bytes != 0) h.seq.store(seq | 1, std::memory_order_seq_cst);
    AwaitMender(&h, seq);
    StoreFence();
    KillPoint("slot.torn_to_move");
    const std::uint64_t old_offset = h.extent_offset;
    StoreWords(&h.extent_offset, &offset, 8);
    KillPoint("slot.extent_half_moved");
    StoreWords(&h.extent_bytes, &bytes, 8);
    KillPoint("slot.extent_moved");
    if (freed > 0) {
      fallocate(arena->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(old_offset), static_cast<off_t>(freed));
    }
  }
  const bool mapped =
      arena->mappings_[slot].data != nullptr && arena->mappings_[slot].offset == h.extent_offset &&
      arena->mappings_[slot].bytes == h.extent_bytes && arena->populated_[slot] == h.extent_offset;
  if (mapped) return Done{};
  unsigned char* data = arena->Map(slot, h.extent_offset, h.extent_bytes);
  if (data == nullptr) return System(*arena, "mapping a slot");
  if (auto ok = Populate(*arena, data, h.extent_offset, h.extent_bytes); !ok.ok()) return ok;
  KillPoint("slot.memory_taken");
  arena->populated_[slot] = h.extent_offset;
  return Done{};
}

Result<SlotWriter> SlotWriter::Begin(Arena* arena, std::uint32_t slot,
                                     std::uint64_t payload_bytes) {
  if (slot >= kSlots || payload_bytes > kMaxPayloadBytes) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}: slot {} with {} bytes", arena->Name(), slot, payload_bytes)};
  }
  if (auto ok = Reserve(arena, slot, payload_bytes); !ok.ok()) return ok.error();
  SlotHeader& h = arena->header()->slot[slot];
  const std::uint64_t was = h.seq.load(std::memory_order_relaxed);
  h.seq.store(was | 1, std::memory_order_seq_cst);
  AwaitMender(&h, was);
  StoreFence();
  KillPoint("slot.torn");
  const std::uint64_t capacity = ExtentCapacity(h.extent_bytes);
  unsigned char* data = arena->mappings_[slot].data;
  return SlotWriter(arena, slot, data, capacity, reinterpret_cast<std::uint32_t*>(data + capacity));
}

Outcome SlotWriter::Append(const void* data, std::uint64_t size) {
  if (size > capacity_ - offset_) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {} bytes at {} do not fit in a slot of {}",
                                                  arena_->Name(), size, offset_, capacity_)};
  }
  const auto* from = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const std::uint64_t chunk = offset_ / kChunkBytes;
    const std::uint64_t room = (chunk + 1) * kChunkBytes - offset_;
    const std::uint64_t n = std::min(room, size);
    chunk_crc_ = Crc32cCopy(chunk_crc_, data_ + offset_, from, n);
    offset_ += n;
    from += n;
    size -= n;
    crcs_[chunk] = chunk_crc_;
    KillPoint("slot.bytes_copied");
    if (offset_ % kChunkBytes == 0) chunk_crc_ = 0;
  }
  return Done{};
}

Outcome SlotWriter::Align() {
  static const unsigned char zeros[kTensorAlignment] = {};
  return Append(zeros, RoundUp(offset_, kTensorAlignment) - offset_);
}

Result<SlotView> SlotWriter::Finish(SlotFields fields, std::uint64_t table_bytes) {
  const ArenaHeader& header = *arena_->header();
  fields.chunk_bytes = kChunkBytes;
  fields.payload_bytes = offset_;
  fields.table_bytes = table_bytes;
  fields.table_offset = offset_ - table_bytes;
  fields.job_crc = Crc32c(header.job, strnlen(header.job, sizeof header.job));
  if (auto ok = CheckFields(fields); !ok.ok()) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {}", arena_->Name(), ok.error().message)};
  }
  return Expose(fields, CrcRoot(fields, crcs_));
}

Result<SlotView> SlotWriter::Publish(const SlotFields& fields, std::uint32_t crc_root) {
  if (auto ok = CheckFields(fields); !ok.ok()) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {}", arena_->Name(), ok.error().message)};
  }
  if (fields.payload_bytes > capacity_) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {} bytes in a slot of {}", arena_->Name(),
                                                  fields.payload_bytes, capacity_)};
  }
  const std::uint32_t root = CrcRoot(fields, crcs_);
  if (root != crc_root) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: step {} has checksum {:08x}, not {:08x} as announced",
                             arena_->Name(), fields.step, root, crc_root)};
  }
  return Expose(fields, root);
}

SlotView SlotWriter::Expose(const SlotFields& fields, std::uint32_t crc_root) {
  SlotHeader& h = arena_->header()->slot[slot_];
  StoreWords(&h.fields, &fields, sizeof fields);
  KillPoint("slot.fields_written");
  const std::uint64_t root = crc_root;
  StoreWords(&h.crc_root, &root, 8);
  KillPoint("slot.root_written");
  StoreFence();
  const std::uint64_t seq = h.seq.load(std::memory_order_relaxed) + 1;
  h.seq.store(seq, std::memory_order_release);
  KillPoint("slot.closed");
  return {slot_, seq, h.extent_offset, h.extent_bytes, fields, crc_root};
}

}  // namespace everstep::checkpoint
