#include "checkpoint/store/slot_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "checkpoint/store/capture_word.h"
#include "checkpoint/store/fence.h"
#include "checkpoint/store/memory_limit.h"
#include "checkpoint/store/mend.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
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

bool IsSane(const SlotHeader& h, std::uint64_t file) {
  return h.extent_offset >= kArenaHeaderBytes && h.extent_offset % kPageBytes == 0 &&
         h.extent_offset <= file && h.extent_bytes <= file - h.extent_offset &&
         h.extent_bytes % kPageBytes == 0;
}

// Both extents have all their memory: by the file's count of it, where going through the pages
// costs a fiftieth of filling them. False: perhaps not.
bool AllTaken(const Arena& arena) {
  struct stat st {};
  if (fstat(arena.fd(), &st) != 0) return false;
  std::uint64_t bytes = RoundUp(sizeof(ArenaHeader), kPageBytes);  // what is used of the header
  for (const SlotHeader& h : arena.header()->slot) bytes += h.extent_bytes;
  return static_cast<std::uint64_t>(st.st_blocks) * 512 >= bytes;
}

// madvise until it has done all, or failed for good.
int Advise(unsigned char* data, std::uint64_t bytes, int advice) {
  int result;
  do {
    result = madvise(data, bytes, advice);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  return result;
}

Outcome TakeMemory(const Arena& arena, std::uint64_t offset, std::uint64_t bytes) {
  int result;
  do {
    result = fallocate(arena.fd(), 0, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result == 0) return Done{};
  return System(arena, "taking the memory of a slot");
}

}  // namespace

Outcome SlotWriter::Reserve(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes,
                            Touch touch) {
  SlotHeader& h = arena->header()->slot[slot];
  struct stat st {};
  if (fstat(arena->fd(), &st) != 0) return System(*arena, "fstat");
  const auto file = static_cast<std::uint64_t>(st.st_size);
  const bool sane = IsSane(h, file);
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
  // No later store can fail for want of memory, and after Touch::kNow none stalls.
  std::uint64_t missing = 0;
  if (arena->taken_[slot] != h.extent_offset && !AllTaken(*arena)) {
    missing = Missing(arena->fd(), h.extent_offset, h.extent_bytes);
    if (missing > 0) {
      if (auto ok = CheckMemory(missing, arena->Name()); !ok.ok()) return ok;
    }
  }
  if (touch == Touch::kNow) {
    // What is there a reader's fault maps sixteen pages at a time, and writable: the file is shared
    // memory.
    const int advice = missing > 0 ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    if (Advise(data, h.extent_bytes, advice) == 0) {
      missing = 0;
    } else if (errno != EINVAL) {  // it is before Linux 5.14: the tables fill at the first touch
      return System(*arena, "taking the memory of a slot");
    }
    arena->populated_[slot] = h.extent_offset;
  }
  if (missing > 0) {
    // What is not payload nobody writes.
    const bool later = touch == Touch::kByWrite && missing > h.extent_bytes / 2;
    const std::uint64_t from = later ? payload_bytes / kPageBytes * kPageBytes : 0;
    const auto taken = TakeMemory(*arena, h.extent_offset + from, h.extent_bytes - from);
    if (!taken.ok()) return taken;
    if (!later) missing = 0;
  }
  if (missing == 0) arena->taken_[slot] = h.extent_offset;
  KillPoint("slot.memory_taken");
  return Done{};
}

std::span<unsigned char> SlotWriter::Mapped(const Arena& arena, std::uint32_t slot,
                                            std::uint64_t payload_bytes, bool trimmed) {
  const SlotHeader& h = arena.header()->slot[slot];
  struct stat st {};
  if (fstat(arena.fd(), &st) != 0 || !IsSane(h, static_cast<std::uint64_t>(st.st_size)) ||
      ExtentCapacity(h.extent_bytes) < payload_bytes) {
    return {};
  }
  if (trimmed && h.extent_bytes / 2 >= ExtentBytes(payload_bytes + Slack(payload_bytes))) return {};
  const Arena::Mapping& m = arena.mappings_[slot];
  if (m.data == nullptr || m.offset != h.extent_offset || m.bytes != h.extent_bytes) return {};
  return {m.data, m.bytes};
}

void SlotWriter::Trim(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes) {
  SlotHeader& h = arena->header()->slot[slot];
  struct stat st {};
  if (fstat(arena->fd(), &st) != 0 || !IsSane(h, static_cast<std::uint64_t>(st.st_size))) return;
  const std::uint64_t bytes = ExtentBytes(payload_bytes + Slack(payload_bytes));
  const std::uint64_t had = h.extent_bytes;
  if (had / 2 < bytes) return;
  const std::uint64_t seq = h.seq.load(std::memory_order_relaxed);
  h.seq.store(seq | 1, std::memory_order_seq_cst);
  AwaitMender(&h, seq);
  StoreFence();
  StoreWords(&h.extent_bytes, &bytes, 8);
  fallocate(arena->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(h.extent_offset + bytes), static_cast<off_t>(had - bytes));
}

Result<SlotWriter> SlotWriter::Begin(Arena* arena, std::uint32_t slot, std::uint64_t payload_bytes,
                                     Touch touch) {
  if (slot >= kSlots || payload_bytes > kMaxPayloadBytes) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}: slot {} with {} bytes", arena->Name(), slot, payload_bytes)};
  }
  if (auto ok = Reserve(arena, slot, payload_bytes, touch); !ok.ok()) return ok.error();
  SlotHeader& h = arena->header()->slot[slot];
  const std::uint64_t was = h.seq.load(std::memory_order_relaxed);
  h.seq.store(was | 1, std::memory_order_seq_cst);
  AwaitMender(&h, was);
  StoreFence();
  CaptureWordOf(arena->header(), slot)->id.store(0, std::memory_order_relaxed);
  StoreFence();
  KillPoint("slot.torn");
  const std::uint64_t capacity = ExtentCapacity(h.extent_bytes);
  unsigned char* data = arena->mappings_[slot].data;
  SlotWriter writer(arena, slot, data, capacity, reinterpret_cast<std::uint32_t*>(data + capacity));
  writer.fresh_ = touch == Touch::kByWrite && arena->taken_[slot] != h.extent_offset;
  return writer;
}

Outcome SlotWriter::Write(std::uint64_t offset, const void* from, std::uint64_t bytes) {
  const std::uint64_t at = arena_->header()->slot[slot_].extent_offset + offset;
  const auto* data = static_cast<const char*>(from);
  for (std::uint64_t done = 0; done < bytes;) {
    const ssize_t n =
        pwrite(arena_->fd(), data + done, bytes - done, static_cast<off_t>(at + done));
    if (n > 0) done += static_cast<std::uint64_t>(n);
    if (n == 0) errno = ENOSPC;
    if (n == 0 || (n < 0 && errno != EINTR)) return System(*arena_, "writing into a slot");
  }
  return Done{};
}

Outcome SlotWriter::TakeChunk(std::uint64_t chunk) {
  const std::uint64_t at = chunk * kChunkBytes;
  if (fresh_) {
    const std::uint64_t offset = arena_->header()->slot[slot_].extent_offset;
    const std::uint64_t bytes = std::min<std::uint64_t>(kChunkBytes, capacity_ - at);
    if (auto ok = TakeMemory(*arena_, offset + at, bytes); !ok.ok()) return ok;
  }
  TouchChunk(chunk);
  return Done{};
}

void SlotWriter::TouchChunk(std::uint64_t chunk) {
  if (arena_->populated_[slot_] != 0) return;
  const std::uint64_t bytes = std::min<std::uint64_t>(kChunkBytes, capacity_ - chunk * kChunkBytes);
  madvise(Chunk(chunk), bytes, MADV_POPULATE_READ);  // a wish: the first store does it else
}

void SlotWriter::Announce(SlotFields fields, std::uint64_t payload_bytes) {
  const ArenaHeader& header = *arena_->header();
  fields.chunk_bytes = kChunkBytes;
  fields.payload_bytes = payload_bytes;
  fields.table_bytes = 0;
  fields.table_offset = payload_bytes;
  fields.job_crc = Crc32c(header.job, strnlen(header.job, sizeof header.job));
  CaptureWord& word = *CaptureWordOf(arena_->header(), slot_);
  word.id.store(0, std::memory_order_seq_cst);  // of a capture that was never finished
  StoreFence();
  word.written.store(0, std::memory_order_relaxed);
  StoreWords(&word.fields, &fields, sizeof fields);
  word.id.store(fields.captured_ns, std::memory_order_release);
  announced_ = true;
  KillPoint("capture.announced");
}

void SlotWriter::Withdraw() {
  if (!announced_) return;
  CaptureWordOf(arena_->header(), slot_)->id.store(0, std::memory_order_release);
  announced_ = false;
}

Outcome SlotWriter::Append(const void* data, std::uint64_t size) {
  return size == 0 ? Outcome(Done{}) : Take(static_cast<const unsigned char*>(data), size);
}

Outcome SlotWriter::Adopt(std::uint64_t size) {
  return Take(nullptr, size);
}

Outcome SlotWriter::Take(const unsigned char* from, std::uint64_t size) {
  if (size > capacity_ - offset_) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {} bytes at {} do not fit in a slot of {}",
                                                  arena_->Name(), size, offset_, capacity_)};
  }
  while (size > 0) {
    const std::uint64_t chunk = offset_ / kChunkBytes;
    const std::uint64_t room = (chunk + 1) * kChunkBytes - offset_;
    const std::uint64_t n = std::min(room, size);
    if (from != nullptr) {
      chunk_crc_ = Crc32cCopy(chunk_crc_, data_ + offset_, from, n);
      from += n;
    } else {
      chunk_crc_ = Crc32cExtend(chunk_crc_, data_ + offset_, n);
    }
    offset_ += n;
    size -= n;
    crcs_[chunk] = chunk_crc_;
    KillPoint("slot.bytes_copied");
    if (offset_ % kChunkBytes != 0) continue;
    chunk_crc_ = 0;
    if (!announced_) continue;
    StoreFence();  // the chunk went past the cache
    CaptureWordOf(arena_->header(), slot_)->written.store(offset_, std::memory_order_release);
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
  Withdraw();
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
