#include "checkpoint/transfer/range_restorer.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "checkpoint/store/memory_limit.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/for_each.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/peer_task.h"
#include "checkpoint/transfer/replica_store.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kReaders = 4;  // shards that one rank reads at a time
constexpr int kGoneTries = 5;        // a holder that just started may not know the job yet
constexpr int kCorruptTries = 3;     // once may be the wire

class CutReader {
 public:
  CutReader(const RangeSources& sources, const LocalRank& local)
      : sources_(sources),
        local_(local),
        deadline_(std::chrono::steady_clock::now() + sources.options.restore_timeout) {}

  // From the cheapest holder that has it. *tier: which kind that was.
  Outcome Read(const CutShard& shard, ChunkTaker* taker, ShardTier* tier) const;

 private:
  SlotName Name(const CutShard& shard) const;
  Outcome FromArenas(const SlotName& name, ChunkTaker* taker) const;
  Outcome FromPeers(const CutShard& shard, const SlotName& name, ChunkTaker* taker) const;

  const RangeSources& sources_;
  const LocalRank& local_;
  const SteadyTime deadline_;
};

SlotName CutReader::Name(const CutShard& shard) const {
  const RestoreCut& cut = local_.restore.cut != nullptr ? *local_.restore.cut : RestoreCut{};
  SlotName name{.job = local_.job, .fields = {}, .crc_root = shard.crc_root};
  name.fields.step = cut.step;
  name.fields.generation = cut.generation;
  name.fields.rank = shard.rank;
  name.fields.world_size = cut.world_size;
  name.fields.payload_bytes = shard.bytes;
  return name;
}

Outcome CutReader::FromArenas(const SlotName& name, ChunkTaker* taker) const {
  Error why{ErrorCode::kNotFound, "not in this node's memory"};
  const auto read = [&](const ArenaName&, Arena* arena) {
    auto done = ReadChunks(arena, name, taker);
    if (!done.ok() && done.error().code != ErrorCode::kNotFound) why = done.error();
    return done.ok();
  };
  if (SearchShard(sources_.host, local_.job, name.fields.rank, read)) return Done{};
  return why;
}

// Holders take turns, each rank and shard beginning with another one; rounds until the deadline.
Outcome CutReader::FromPeers(const CutShard& shard, const SlotName& name, ChunkTaker* taker) const {
  struct Holder {
    std::string address;
    int gone = 0, corrupt = 0;
    bool out = false;
    std::string why;
  };
  std::vector<Holder> holders;
  for (const CutHolder& h : shard.holders) {
    if (h.address.empty() || h.address == sources_.own_address) continue;
    holders.push_back({.address = h.address, .why = {}});
  }
  if (holders.empty()) return Error{ErrorCode::kNotFound, "in no peer's memory"};
  const std::size_t first = static_cast<std::size_t>(local_.rank + shard.rank) % holders.size();
  PeerTask task = TaskFor(sources_.options, local_.job, sources_.facts, local_.generation,
                          TrafficClass::kRepair, &local_.cancel);
  auto pause = sources_.options.retry_first;
  for (;;) {
    for (std::size_t i = 0; i < holders.size(); ++i) {
      Holder& holder = holders[(first + i) % holders.size()];
      if (holder.out) continue;
      task.address = holder.address;
      auto picked = PickChunks(task, name, taker);
      if (picked.ok() || local_.cancel) return picked;
      holder.why = picked.error().message;
      switch (picked.error().code) {
        case ErrorCode::kNotFound: holder.out = ++holder.gone >= kGoneTries; break;
        case ErrorCode::kCorrupt: holder.out = ++holder.corrupt >= kCorruptTries; break;
        case ErrorCode::kInvalid:
        case ErrorCode::kNoMemory:
        case ErrorCode::kStale: holder.out = true; break;
        default: break;  // it may come back
      }
    }
    const bool all_out =
        std::all_of(holders.begin(), holders.end(), [](const Holder& h) { return h.out; });
    // A file is slower than a peer, and quicker than one that does not answer.
    if (all_out || shard.file || std::chrono::steady_clock::now() + pause >= deadline_) {
      std::string why;
      for (const Holder& h : holders) {
        fmt::format_to(std::back_inserter(why), "{}{}", why.empty() ? "" : "; ", h.why);
      }
      return Error{ErrorCode::kUnavailable, why};
    }
    for (auto slept = pause * 0; slept < pause && !local_.cancel;
         slept += std::chrono::milliseconds(20)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    if (local_.cancel) return Error{ErrorCode::kStale, "the generation is over"};
    pause = std::min(pause * 2, sources_.options.retry_last);
  }
}

Outcome CutReader::Read(const CutShard& shard, ChunkTaker* taker, ShardTier* tier) const {
  const SlotName name = Name(shard);
  *tier = ShardTier::kLocal;
  auto here = FromArenas(name, taker);
  if (here.ok() || local_.cancel) return here;
  *tier = ShardTier::kPeer;
  auto peers = FromPeers(shard, name, taker);
  if (peers.ok() || local_.cancel) return peers;
  std::string why =
      fmt::format("{}: {}; {}", name.Text(), here.error().message, peers.error().message);
  if (shard.file && sources_.files != nullptr && !local_.restore.directory.empty()) {
    *tier = ShardTier::kFile;
    auto read = sources_.files->Read(local_.restore.directory, name, taker);
    if (read.ok()) return read;
    fmt::format_to(std::back_inserter(why), "; {}", read.error().message);
  }
  return Error{peers.error().code, why};
}

class TableTaker final : public ChunkTaker {
 public:
  explicit TableTaker(const std::atomic<bool>* cancel) : cancel_(cancel) {}
  std::vector<std::uint32_t> Lacks(const SlotFields& fields) override {
    offset_ = fields.table_offset;
    table_.resize(fields.table_bytes);
    std::vector<std::uint32_t> chunks;
    if (fields.table_bytes == 0) return chunks;
    const std::uint64_t end = ChunkCount(fields.payload_bytes);
    for (std::uint64_t i = offset_ / kChunkBytes; i < end; ++i) {
      chunks.push_back(static_cast<std::uint32_t>(i));
    }
    return chunks;
  }
  bool Take(std::uint32_t chunk, const unsigned char* data, std::uint32_t bytes) override {
    if (*cancel_) return false;
    const std::uint64_t begin = std::uint64_t{chunk} * kChunkBytes;
    const std::uint64_t from = std::max(begin, offset_);
    const std::uint64_t to = std::min(begin + bytes, offset_ + table_.size());
    if (from < to) std::memcpy(table_.data() + (from - offset_), data + (from - begin), to - from);
    return true;
  }
  const std::string& table() const { return table_; }

 private:
  const std::atomic<bool>* cancel_;
  std::uint64_t offset_ = 0;
  std::string table_;
};

// The slot that is put together by several readers, each other bytes; whoever brings the last ones
// of a chunk takes its checksum.
class Target {
 public:
  // `bytes`: how many will be put in all, each once.
  Target(SlotWriter* writer, std::uint64_t bytes)
      : writer_(writer),
        bytes_(bytes),
        touched_(ChunkCount(bytes)),
        left_(ChunkCount(bytes)),
        crcs_(ChunkCount(bytes)) {
    for (std::uint64_t i = 0; i < left_.size(); ++i) left_[i] = Size(i);
  }

  // False: there is no memory for it, which why() says; nothing is put any more.
  bool Put(std::uint64_t dest, const unsigned char* from, std::uint64_t bytes) {
    if (bytes == 0) return true;
    if (failed_) return false;
    if (auto ok = Store(dest, from, bytes); !ok.ok()) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failed_.exchange(true)) why_ = ok.error();
      return false;
    }
    const std::uint64_t end = dest + bytes;
    for (std::uint64_t i = dest / kChunkBytes; i <= (end - 1) / kChunkBytes; ++i) {
      const std::uint64_t begin = i * kChunkBytes;
      const auto here =
          static_cast<std::uint32_t>(std::min(end, begin + Size(i)) - std::max(dest, begin));
      if (left_[i].fetch_sub(here, std::memory_order_acq_rel) == here) Seal(i);
    }
    return true;
  }
  void Clear(std::uint64_t from, std::uint64_t to) {
    static const unsigned char zeros[64u << 10] = {};
    for (std::uint64_t n; from < to; from += n) {
      n = std::min<std::uint64_t>(sizeof zeros, to - from);
      if (!Put(from, zeros, n)) return;
    }
  }
  bool failed() const { return failed_; }
  // Every byte is there; why not, else.
  Outcome Whole() const {
    if (failed_) return why_;
    if (std::all_of(left_.begin(), left_.end(), [](const auto& left) { return left == 0; })) {
      return Done{};
    }
    return Error{ErrorCode::kInternal, "some bytes of the state were brought by nobody"};
  }
  const std::vector<std::uint32_t>& crcs() const { return crcs_; }  // REQUIRES Whole()

 private:
  std::uint32_t Size(std::uint64_t chunk) const {
    return static_cast<std::uint32_t>(
        std::min<std::uint64_t>(kChunkBytes, bytes_ - chunk * kChunkBytes));
  }
  Outcome Store(std::uint64_t dest, const unsigned char* from, std::uint64_t bytes) {
    if (writer_->fresh() && bytes >= kPageBytes) return writer_->Write(dest, from, bytes);
    for (std::uint64_t i = dest / kChunkBytes; i <= (dest + bytes - 1) / kChunkBytes; ++i) {
      if (touched_[i].exchange(true, std::memory_order_relaxed)) continue;
      if (auto ok = writer_->TakeChunk(i); !ok.ok()) return ok;
    }
    std::memcpy(writer_->Chunk(0) + dest, from, bytes);
    return Done{};
  }
  void Seal(std::uint64_t chunk) {
    if (!touched_[chunk].exchange(true, std::memory_order_relaxed)) writer_->TouchChunk(chunk);
    crcs_[chunk] = Crc32c(writer_->Chunk(chunk), Size(chunk));
    writer_->SetChunkCrc(chunk, crcs_[chunk]);
  }

  SlotWriter* const writer_;
  const std::uint64_t bytes_;
  std::vector<std::atomic<bool>> touched_;        // by chunk: in this process's page tables
  std::vector<std::atomic<std::uint32_t>> left_;  // bytes to come
  std::vector<std::uint32_t> crcs_;
  std::mutex mutex_;  // guards why_ until the readers have ended
  std::atomic<bool> failed_{false};
  Error why_;
};

class PieceTaker final : public ChunkTaker {
 public:
  PieceTaker(const ShardReads& reads, Target* target, const std::atomic<bool>* cancel)
      : reads_(reads), target_(target), cancel_(cancel), taken_(reads.chunks.size()) {}
  std::vector<std::uint32_t> Lacks(const SlotFields&) override {
    std::vector<std::uint32_t> chunks;
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      if (taken_[i] == 0) chunks.push_back(reads_.chunks[i]);
    }
    return chunks;
  }
  // The arena may be another generation's once this one is given up: nothing is written then.
  bool Take(std::uint32_t chunk, const unsigned char* data, std::uint32_t) override {
    if (*cancel_) return false;
    KillPoint("ranges.chunk_taken");
    const std::uint64_t begin = std::uint64_t{chunk} * kChunkBytes;
    for (const RangePiece& piece : PiecesOf(reads_, chunk, kChunkBytes)) {
      if (!target_->Put(piece.dest, data + (piece.source - begin), piece.bytes)) return false;
    }
    const auto at = std::lower_bound(reads_.chunks.begin(), reads_.chunks.end(), chunk);
    taken_[static_cast<std::size_t>(at - reads_.chunks.begin())] = 1;
    return true;
  }

 private:
  const ShardReads& reads_;
  Target* const target_;
  const std::atomic<bool>* const cancel_;
  std::vector<std::uint8_t> taken_;
};

Result<Arena> Reopen(const Arena& arena) {
  const int fd = fcntl(arena.fd(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return Error{ErrorCode::kInternal, arena.Name() + ": no descriptor is free"};
  return Arena::Open(fd);
}

// Never the slot that holds this rank's part of the cut: others read it.
std::uint32_t ExchangeSlot(const Arena& arena, const RestoreCut& cut, const JobFacts& facts) {
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (view && view->fields.step == cut.step && view->fields.generation == cut.generation) {
      return 1 - i;
    }
  }
  return ChooseSlot(arena, facts.committed_generation, facts.committed_step);
}

SlotFields FieldsOf(const LocalRank& local, Generation generation, std::uint32_t flags) {
  SlotFields fields;
  fields.generation = generation;
  fields.step = local.restore.cut->step;
  fields.rank = local.rank;
  fields.world_size = local.restore.world_size;
  fields.flags = flags;
  fields.captured_ns =
      static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::system_clock::now().time_since_epoch())
                                     .count());
  return fields;
}

}  // namespace

Result<SlotView> BringCatalog(const RangeSources& sources, const LocalRank& local,
                              std::vector<ShardTier>* tiers) {
  const RestoreCut& cut = *local.restore.cut;
  const CutReader reader(sources, local);
  std::vector<TableTaker> tables(cut.shards.size(), TableTaker(&local.cancel));
  tiers->assign(cut.shards.size(), ShardTier::kPeer);
  const auto read = ForEach(cut.shards.size(), kReaders, [&](std::size_t i) {
    auto table = reader.Read(cut.shards[i], &tables[i], &(*tiers)[i]);
    KillPoint("ranges.table_read");
    return table;
  });
  if (!read.ok()) return read.error();
  std::vector<CatalogEntry> entries;
  entries.reserve(cut.shards.size());
  std::uint64_t at = sizeof(CatalogHead) + cut.shards.size() * sizeof(CatalogEntry);
  for (std::size_t i = 0; i < cut.shards.size(); ++i) {
    entries.push_back({.rank = cut.shards[i].rank,
                       .tier = (*tiers)[i],
                       .payload_bytes = cut.shards[i].bytes,
                       .table_at = at,
                       .table_bytes = tables[i].table().size()});
    at += tables[i].table().size();
  }
  if (at > kMaxCatalogBytes) {
    return Error{ErrorCode::kNoMemory,
                 fmt::format("the tables of {} shards have {}, the limit for all is {}",
                             cut.shards.size(), HumanBytes(at), HumanBytes(kMaxCatalogBytes))};
  }
  auto target = Reopen(local.arena);
  if (!target.ok()) return target.error();
  Arena& arena = target.value();
  auto writer = SlotWriter::Begin(&arena, ExchangeSlot(arena, cut, sources.facts), at);
  if (!writer.ok()) return writer.error();
  const CatalogHead head{.shards = static_cast<std::uint32_t>(entries.size()),
                         .step = cut.step,
                         .generation = cut.generation};
  auto ok = writer.value().Append(&head, sizeof head);
  if (ok.ok()) ok = writer.value().Append(entries.data(), entries.size() * sizeof(CatalogEntry));
  for (const TableTaker& table : tables) {
    if (ok.ok()) ok = writer.value().Append(table.table().data(), table.table().size());
  }
  if (!ok.ok()) return ok.error();
  auto catalog = writer.value().Finish(FieldsOf(local, cut.generation, kFlagCatalog), 0);
  KillPoint("ranges.catalog_written");
  return catalog;
}

Result<SlotView> BringRanges(const RangeSources& sources, const LocalRank& local,
                             const SlotView& request, const std::vector<ShardTier>& tiers,
                             Arena* memory) {
  const RestoreCut& cut = *local.restore.cut;
  auto opened = Reopen(local.arena);
  if (!opened.ok()) return opened.error();
  *memory = std::move(opened.value());
  Arena& arena = *memory;
  if (auto ok = arena.Verify(request); !ok.ok()) return ok.error();
  const auto read = ReadRequest(arena.Payload(request), request.fields.payload_bytes);
  if (!read.ok()) return read.error();
  const RangeRequest& wants = read.value();
  std::vector<RangeShard> shards;
  shards.reserve(cut.shards.size());
  for (std::size_t i = 0; i < cut.shards.size(); ++i) {
    shards.push_back({.payload_bytes = cut.shards[i].bytes,
                      .tier = i < tiers.size() ? tiers[i] : ShardTier::kPeer});
  }
  const std::uint64_t data_bytes = wants.head.data_bytes;
  if (data_bytes > kMaxPayloadBytes) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("a request for a state of {}, the limit is {}", HumanBytes(data_bytes),
                             HumanBytes(kMaxPayloadBytes))};
  }
  KillPoint("ranges.request_read");
  const RangePlan plan = PlanRanges(wants.ranges, shards, data_bytes, kChunkBytes, local.rank);
  if (!plan.error.empty()) {
    return Error{ErrorCode::kInvalid, "the trainer's request for ranges: " + plan.error};
  }
  const std::uint64_t bytes = data_bytes + wants.table.size();
  auto begun = SlotWriter::Begin(&arena, request.slot, bytes, Touch::kByWrite);
  if (!begun.ok()) return begun.error();
  SlotWriter& writer = begun.value();
  Target target(&writer, bytes);
  for (const auto& [from, to] : plan.gaps) target.Clear(from, to);
  target.Put(data_bytes, reinterpret_cast<const unsigned char*>(wants.table.data()),
             wants.table.size());
  const CutReader reader(sources, local);
  const auto brought = ForEach(plan.shards.size(), kReaders, [&](std::size_t i) {
    PieceTaker taker(plan.shards[i], &target, &local.cancel);
    ShardTier tier = ShardTier::kPeer;
    return reader.Read(cut.shards[static_cast<std::size_t>(plan.shards[i].rank)], &taker, &tier);
  });
  if (!brought.ok() && !target.failed()) return brought.error();
  if (auto ok = target.Whole(); !ok.ok()) return ok.error();
  SlotFields fields = FieldsOf(local, local.generation,
                               wants.head.flags & (kFlagReplicatedLayout | kFlagAssembled));
  fields.payload_bytes = bytes;
  fields.table_offset = data_bytes;
  fields.table_bytes = wants.table.size();
  fields.job_crc = Crc32c(local.job.data(), local.job.size());
  if (local.cancel) return GivenUp(arena.Name());
  auto published = writer.Publish(fields, CrcRoot(fields, target.crcs().data()));
  KillPoint("ranges.published");
  return published;
}

}  // namespace everstep::checkpoint
