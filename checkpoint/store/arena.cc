#include "checkpoint/store/arena.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/store/fence.h"
#include "checkpoint/store/memory_limit.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace everstep::checkpoint {
namespace {

Error System(const std::string& who, const char* what) {
  return Error{ErrorCode::kInternal, fmt::format("{}: {}: {}", who, what, ErrnoText(errno))};
}

std::uint64_t FileBytes(int fd) {
  struct stat st {};
  return fstat(fd, &st) == 0 ? static_cast<std::uint64_t>(st.st_size) : 0;
}

// The first extents lie one after the other behind the header.
void Format(ArenaHeader* header, const ArenaSpec& spec) {
  header->version = kArenaVersion;
  header->header_bytes = kArenaHeaderBytes;
  std::memset(header->job, 0, sizeof header->job);
  std::memcpy(header->job, spec.job.data(), std::min(spec.job.size(), sizeof header->job - 1));
  header->rank = spec.rank;
  header->replica = spec.replica ? 1 : 0;
  header->agent.committed_step.store(kNoStep, std::memory_order_relaxed);
  header->agent.released_step.store(kNoStep, std::memory_order_relaxed);
  header->trainer.step.store(kNoStep, std::memory_order_relaxed);
  if (spec.slot_bytes > 0) {
    std::uint64_t at = kArenaHeaderBytes;
    for (SlotHeader& slot : header->slot) {
      slot.extent_offset = at;
      slot.extent_bytes = ExtentBytes(spec.slot_bytes);
      at += slot.extent_bytes;
    }
  }
  StoreFence();
  __atomic_store_n(&header->magic, kArenaMagic, __ATOMIC_RELEASE);
}

Outcome CheckSpec(const ArenaSpec& spec) {
  if (spec.job.empty() || spec.job.size() > 128) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("arena of job '{}': a job's id has 1 to 128 characters", spec.job)};
  }
  if (spec.slot_bytes > kMaxPayloadBytes) {
    return Error{
        ErrorCode::kInvalid,
        fmt::format("arena of job {} rank {}: {} for one slot is more than the format's {}",
                    spec.job, spec.rank, HumanBytes(spec.slot_bytes),
                    HumanBytes(kMaxPayloadBytes))};
  }
  return Done{};
}

// The CRC of `size` bytes at `offset` of a payload; what targets want of them is copied on the way.
std::uint32_t CopyOut(const unsigned char* data, std::uint64_t offset, std::uint64_t size,
                      std::span<const LoadTarget> targets) {
  const std::uint64_t end = offset + size;
  auto target = std::partition_point(targets.begin(), targets.end(), [&](const LoadTarget& t) {
    return t.offset + t.bytes <= offset;
  });
  std::uint32_t crc = 0;
  while (offset < end) {
    const bool none = target == targets.end() || target->offset >= end;
    if (none || target->offset > offset) {
      const std::uint64_t gap = (none ? end : target->offset) - offset;
      crc = Crc32cExtend(crc, data + offset, gap);
      offset += gap;
      continue;
    }
    const std::uint64_t past = offset - target->offset;
    const std::uint64_t bytes = std::min(end - offset, target->bytes - past);
    crc = Crc32cCopy(crc, static_cast<unsigned char*>(target->to) + past, data + offset, bytes);
    offset += bytes;
    if (past + bytes == target->bytes) ++target;
  }
  return crc;
}

}  // namespace

void LoadWords(void* to, const void* from, std::size_t bytes) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const std::uint64_t*>(from);
  for (std::size_t i = 0; i < bytes / 8; ++i) {
    const std::uint64_t word = __atomic_load_n(in + i, __ATOMIC_RELAXED);
    std::memcpy(out + 8 * i, &word, 8);
  }
}

void StoreWords(void* to, const void* from, std::size_t bytes) {
  auto* out = static_cast<std::uint64_t*>(to);
  const auto* in = static_cast<const char*>(from);
  for (std::size_t i = 0; i < bytes / 8; ++i) {
    std::uint64_t word;
    std::memcpy(&word, in + 8 * i, 8);
    __atomic_store_n(out + i, word, __ATOMIC_RELAXED);
  }
}

std::uint64_t ArenaFileBytes(std::uint64_t slot_bytes) {
  return kArenaHeaderBytes + (slot_bytes == 0 ? 0 : kSlots * ExtentBytes(slot_bytes));
}

Result<int> CreateArenaFd(const ArenaSpec& spec) {
  if (auto ok = CheckSpec(spec); !ok.ok()) return ok.error();
  const std::string who = fmt::format("arena of job {} rank {}{}", spec.job, spec.rank,
                                      spec.replica ? " (replica)" : "");
  const std::uint64_t bytes = ArenaFileBytes(spec.slot_bytes);
  if (auto ok = CheckMemory(bytes, who); !ok.ok()) return ok.error();
  const std::string name =
      fmt::format("everstep-{}-{}{}", spec.job, spec.rank, spec.replica ? "-replica" : "");
  const int fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return System(who, "memfd_create");
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    Error error = System(who, "sizing the memfd");
    close(fd);
    return error;
  }
  void* map = mmap(nullptr, kArenaHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) {
    Error error = System(who, "mapping the header");
    close(fd);
    return error;
  }
  Format(static_cast<ArenaHeader*>(map), spec);
  munmap(map, kArenaHeaderBytes);
  return fd;
}

HeldShard ToShard(const SlotView& view, bool replica) {
  return {.rank = view.fields.rank,
          .world_size = view.fields.world_size,
          .generation = view.fields.generation,
          .step = view.fields.step,
          .crc_root = view.crc_root,
          .bytes = view.fields.payload_bytes,
          .replica = replica,
          .replicated_layout = view.replicated_layout(),
          .share = view.share(),
          .built = view.fields.built};
}

std::uint32_t CrcRoot(const SlotFields& fields, const std::uint32_t* chunk_crcs) {
  const std::uint32_t crc = Crc32c(&fields, sizeof fields);
  return Crc32cExtend(crc, chunk_crcs, 4 * ChunkCount(fields.payload_bytes));
}

Outcome CheckFields(const SlotFields& f) {
  const auto wrong = [](std::string what) { return Error{ErrorCode::kInvalid, std::move(what)}; };
  if (f.chunk_bytes != kChunkBytes) {
    return wrong(
        fmt::format("chunks of {} bytes; this build knows {}", f.chunk_bytes, kChunkBytes));
  }
  if (f.payload_bytes > kMaxPayloadBytes) {
    return wrong(fmt::format("a payload of {} bytes; the format's limit is {}", f.payload_bytes,
                             kMaxPayloadBytes));
  }
  if (f.table_bytes > f.payload_bytes || f.table_offset != f.payload_bytes - f.table_bytes) {
    return wrong(fmt::format("a table at {} of {} bytes does not end a payload of {}",
                             f.table_offset, f.table_bytes, f.payload_bytes));
  }
  // Parities are numbered behind the world's ranks (checkpoint/core/parity_ranks.h).
  if (f.step < 0 || f.rank < 0 || (f.world_size <= f.rank) != (f.built != 0)) {
    return wrong(fmt::format("step {}, rank {} of {}", f.step, f.rank, f.world_size));
  }
  return Done{};
}

Arena::Arena(Arena&& other) noexcept {
  *this = std::move(other);
}
Arena& Arena::operator=(Arena&& other) noexcept {
  if (this != &other) {
    Close();
    fd_ = std::exchange(other.fd_, -1);
    header_ = std::exchange(other.header_, nullptr);
    mappings_ = std::exchange(other.mappings_, {});
    populated_ = std::exchange(other.populated_, {});
    taken_ = std::exchange(other.taken_, {});
  }
  return *this;
}
Arena::~Arena() {
  Close();
}

void Arena::Close() {
  for (Mapping& m : mappings_) {
    if (m.data != nullptr) munmap(m.data, m.bytes);
    m = {};
  }
  if (header_ != nullptr) munmap(header_, kArenaHeaderBytes);
  header_ = nullptr;
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Result<Arena> Arena::Open(int fd, const ArenaSpec* blank) {
  Arena arena;
  arena.fd_ = fd;
  std::uint64_t bytes = FileBytes(fd);
  if (bytes < kArenaHeaderBytes && blank != nullptr) {
    if (ftruncate(fd, static_cast<off_t>(kArenaHeaderBytes)) != 0) {
      return System("arena", "sizing the memfd");
    }
    bytes = kArenaHeaderBytes;
  }
  if (bytes < kArenaHeaderBytes) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("arena: the file has {} bytes, a header alone has {}", bytes,
                             kArenaHeaderBytes)};
  }
  void* map = mmap(nullptr, kArenaHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) return System("arena", "mapping the header");
  arena.header_ = static_cast<ArenaHeader*>(map);
  if (arena.header_->magic == 0 && blank != nullptr) {
    if (auto ok = CheckSpec(*blank); !ok.ok()) return ok.error();
    ArenaSpec spec = *blank;
    if (ArenaFileBytes(spec.slot_bytes) > bytes) spec.slot_bytes = 0;  // the writer grows it
    Format(arena.header_, spec);
  }
  if (__atomic_load_n(&arena.header_->magic, __ATOMIC_ACQUIRE) != kArenaMagic) {
    return Error{ErrorCode::kInvalid, "arena: the file does not begin as an arena does"};
  }
  if (arena.header_->version != kArenaVersion) {
    return Error{
        ErrorCode::kInvalid,
        fmt::format("arena: format version {}, this build knows {}; restart the node's keeper "
                    "with the same release as the job's",
                    arena.header_->version, kArenaVersion)};
  }
  return arena;
}

std::string Arena::Name() const {
  if (header_ == nullptr) return "arena (closed)";
  return fmt::format("arena of job {} rank {}{}",
                     std::string(header_->job, strnlen(header_->job, sizeof header_->job)),
                     header_->rank, header_->replica != 0 ? " (replica)" : "");
}

std::optional<SlotView> Arena::Look(std::uint32_t slot) const {
  auto view = LookAny(slot);
  if (view && (view->fields.flags & kFlagsExchange) != 0) return std::nullopt;
  return view;
}

std::optional<SlotView> Arena::LookExchange(std::uint32_t slot, std::uint32_t flag) const {
  auto view = LookAny(slot);
  if (!view || (view->fields.flags & kFlagsExchange) != flag) return std::nullopt;
  return view;
}

std::optional<SlotView> Arena::LookRestored(std::uint32_t slot) const {
  auto view = Look(slot);
  return view ? view : LookExchange(slot, kFlagAssembled);
}

std::optional<SlotView> Arena::LookAny(std::uint32_t slot) const {
  const SlotHeader& h = header_->slot[slot];
  for (int attempt = 0; attempt < 4; ++attempt) {
    SlotView view;
    view.slot = slot;
    view.seq = h.seq.load(std::memory_order_acquire);
    if (view.seq == 0 || (view.seq & 1) != 0) return std::nullopt;
    std::uint64_t words[1];
    LoadWords(&view.extent_offset, &h.extent_offset, 8);
    LoadWords(&view.extent_bytes, &h.extent_bytes, 8);
    LoadWords(&view.fields, &h.fields, sizeof view.fields);
    LoadWords(words, &h.crc_root, 8);
    LoadFence();
    if (h.seq.load(std::memory_order_relaxed) != view.seq) continue;
    view.crc_root = static_cast<std::uint32_t>(words[0]);
    if (!CheckFields(view.fields).ok()) return std::nullopt;
    if (view.fields.payload_bytes > ExtentCapacity(view.extent_bytes) ||
        view.extent_offset % kPageBytes != 0 || view.extent_bytes % kPageBytes != 0 ||
        view.extent_offset < kArenaHeaderBytes) {
      return std::nullopt;
    }
    const std::uint64_t file = FileBytes(fd_);
    if (view.extent_offset > file || view.extent_bytes > file - view.extent_offset) {
      return std::nullopt;
    }
    return view;
  }
  return std::nullopt;
}

std::optional<SlotView> Arena::Newest(Step max_step) const {
  std::optional<SlotView> best;
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    auto view = Look(i);
    if (!view || view->step() > max_step) continue;
    if (!best || std::pair(view->step(), view->fields.generation) >
                     std::pair(best->step(), best->fields.generation)) {
      best = view;
    }
  }
  return best;
}

bool Arena::Current(const SlotView& view) const {
  LoadFence();
  return header_->slot[view.slot].seq.load(std::memory_order_relaxed) == view.seq;
}

unsigned char* Arena::Map(std::uint32_t slot, std::uint64_t offset, std::uint64_t bytes) {
  Mapping& m = mappings_[slot];
  if (m.data != nullptr && m.offset == offset && m.bytes == bytes) return m.data;
  if (m.data != nullptr) munmap(m.data, m.bytes);
  m = {};
  void* map =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(offset));
  if (map == MAP_FAILED) return nullptr;
  madvise(map, bytes, MADV_HUGEPAGE);  // a wish; most systems keep shared memory in small pages
  m = {static_cast<unsigned char*>(map), offset, bytes};
  return m.data;
}

const unsigned char* Arena::Payload(const SlotView& view) {
  return Map(view.slot, view.extent_offset, view.extent_bytes);
}

const std::uint32_t* Arena::ChunkCrcs(const SlotView& view) {
  const unsigned char* data = Payload(view);
  if (data == nullptr) return nullptr;
  return reinterpret_cast<const std::uint32_t*>(data + ExtentCapacity(view.extent_bytes));
}

bool Arena::Damaged(const SlotView& view) const {
  return header_->slot[view.slot].damaged_seq.load(std::memory_order_acquire) == view.seq;
}

void Arena::MarkDamaged(const SlotView& view) const {
  if (!Current(view)) return;
  header_->slot[view.slot].damaged_seq.store(view.seq, std::memory_order_release);
}

Outcome Arena::Noted(const SlotView& view, Outcome found, bool all) const {
  if (!found.ok() && found.error().code == ErrorCode::kCorrupt) MarkDamaged(view);
  if (found.ok() && all && Damaged(view)) {  // put right since
    header_->slot[view.slot].damaged_seq.store(0, std::memory_order_release);
  }
  return found;
}

Outcome Arena::Verify(const SlotView& view, unsigned threads) {
  return Noted(view, Check(view, 0, view.chunks(), {}, threads), true);
}

Outcome Arena::VerifyRange(const SlotView& view, std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t size = view.fields.payload_bytes;
  if (offset > size || bytes > size - offset) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}: {} bytes at {} of a payload of {}", Name(), bytes, offset, size)};
  }
  return Noted(view, Check(view, offset / kChunkBytes, ChunkCount(offset + bytes), {}, 1), false);
}

Outcome Arena::Load(const SlotView& view, std::span<const LoadTarget> targets, unsigned threads) {
  std::uint64_t end = 0;
  for (const LoadTarget& t : targets) {
    const std::uint64_t size = view.fields.payload_bytes;
    if (t.offset < end || t.offset > size || t.bytes > size - t.offset) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("{}: a target of {} bytes at {}, after one that ends at {}, of a "
                               "payload of {}",
                               Name(), t.bytes, t.offset, end, size)};
    }
    end = t.offset + t.bytes;
  }
  return Noted(view, Check(view, 0, view.chunks(), targets, threads), true);
}

// Chunks [first, end) of the slot, and its root.
Outcome Arena::Check(const SlotView& view, std::uint64_t first, std::uint64_t end,
                     std::span<const LoadTarget> targets, unsigned threads) {
  const unsigned char* data = Payload(view);
  const std::uint32_t* crcs = ChunkCrcs(view);
  if (data == nullptr) return System(Name(), "mapping a slot");
  const auto corrupt = [&](std::string what) -> Outcome {
    if (!Current(view)) {
      return Error{ErrorCode::kStale, fmt::format("{}: step {} was overwritten while it was read",
                                                  Name(), view.step())};
    }
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: slot {}, step {}: {}", Name(), view.slot, view.step(), what)};
  };
  if (CrcRoot(view.fields, crcs) != view.crc_root) return corrupt("its header fails its checksum");
  constexpr std::uint64_t kRound = 16;  // chunks that a thread takes at a time
  std::atomic<std::uint64_t> next{first}, bad{end};
  const auto check = [&] {
    for (;;) {
      const std::uint64_t from = next.fetch_add(kRound, std::memory_order_relaxed);
      const std::uint64_t to = std::min(from + kRound, end);
      if (from >= to || from >= bad.load(std::memory_order_relaxed)) return StoreFence();
      // The pages are there; entering them into this process at once is quicker than one by one.
      madvise(const_cast<unsigned char*>(data) + from * kChunkBytes, (to - from) * kChunkBytes,
              MADV_POPULATE_READ);
      for (std::uint64_t i = from; i < to; ++i) {
        if (CopyOut(data, i * kChunkBytes, view.chunk_size(i), targets) == crcs[i]) continue;
        std::uint64_t least = bad.load(std::memory_order_relaxed);
        while (i < least && !bad.compare_exchange_weak(least, i, std::memory_order_relaxed)) {
        }
        return StoreFence();
      }
    }
  };
  std::vector<std::thread> helpers;
  const std::uint64_t rounds = (end - first + kRound - 1) / kRound;
  for (std::uint64_t i = 1; i < std::min<std::uint64_t>(threads, rounds); ++i) {
    try {
      helpers.emplace_back(check);
    } catch (const std::system_error&) {  // the limit of threads is reached: it takes longer
      break;
    }
  }
  check();
  for (std::thread& t : helpers) t.join();
  if (const std::uint64_t i = bad; i < end) {
    return corrupt(fmt::format("chunk {} of {} has CRC {:08x}, not {:08x}", i, view.chunks(),
                               Crc32c(data + i * kChunkBytes, view.chunk_size(i)), crcs[i]));
  }
  if (!Current(view)) return corrupt("");
  return Done{};
}

RestoreView Arena::Restore() const {
  const RestoreWord& w = header_->restore;
  for (int attempt = 0; attempt < 1000; ++attempt) {
    const std::uint64_t seq = w.seq.load(std::memory_order_acquire);
    if (seq == 0) return {};
    if ((seq & 1) != 0) continue;
    struct alignas(8) Copy {
      std::uint64_t generation;
      std::uint32_t state;
      std::uint32_t slot;
      std::uint64_t slot_seq;
      std::int64_t step;
      char message[sizeof w.message];
    } copy;
    static_assert(sizeof copy == sizeof(RestoreWord) - 8);
    LoadWords(&copy, &w.generation, sizeof copy);
    LoadFence();
    if (w.seq.load(std::memory_order_relaxed) != seq) continue;
    return {copy.generation, static_cast<RestoreState>(copy.state),
            copy.slot,       copy.slot_seq,
            copy.step,       std::string(copy.message, strnlen(copy.message, sizeof copy.message))};
  }
  return {};  // its writer died in the middle; the next agent sets it again
}

void Arena::SetRestore(const RestoreView& view) {
  RestoreWord& w = header_->restore;
  const std::uint64_t seq = w.seq.load(std::memory_order_relaxed) | 1;
  w.seq.store(seq, std::memory_order_relaxed);
  StoreFence();
  KillPoint("restore.word_torn");
  RestoreWord fresh{};
  fresh.generation = view.generation;
  fresh.state = static_cast<std::uint32_t>(view.state);
  fresh.slot = view.slot;
  fresh.slot_seq = view.slot_seq;
  fresh.step = view.step;
  std::memcpy(fresh.message, view.message.data(),
              std::min(view.message.size(), sizeof fresh.message - 1));
  StoreWords(&w.generation, &fresh.generation, sizeof(RestoreWord) - 8);
  KillPoint("restore.word_written");
  w.seq.store(seq + 1, std::memory_order_release);
}

}  // namespace everstep::checkpoint
