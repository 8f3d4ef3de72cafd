#include "checkpoint/transfer/restorer.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/store/fence.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/peer_task.h"
#include "checkpoint/transfer/replica_store.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

// A second object over the same memory: its mappings go when it goes.
Result<Arena> Reopen(const Arena& arena) {
  const int fd = fcntl(arena.fd(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return Error{ErrorCode::kInternal, arena.Name() + ": no descriptor is free"};
  return Arena::Open(fd);
}

// The slot that takes the bytes; whoever wants them too gets them from `relays` while they come.
class SlotSink final : public FetchSink {
 public:
  SlotSink(Arena* arena, std::uint32_t slot, RelayKey key, RelayTable* relays)
      : arena_(arena), slot_(slot), key_(std::move(key)), relays_(relays) {}
  ~SlotSink() override { End(false); }
  SlotSink(const SlotSink&) = delete;
  SlotSink& operator=(const SlotSink&) = delete;

  SlotWriter* Begin(const SlotFields& fields) override {
    if (writer_) return &*writer_;
    auto writer = SlotWriter::Begin(arena_, slot_, fields.payload_bytes, Touch::kByChunk);
    if (!writer.ok()) {
      why_ = writer.error().message;
      return nullptr;
    }
    writer_.emplace(writer.value());
    fields_ = fields;
    return &*writer_;
  }
  void Table(const std::vector<std::uint32_t>& crcs,
             const std::vector<std::uint8_t>& have) override {
    if (relay_ != nullptr) return;
    auto memory = Reopen(*arena_);
    if (!memory.ok()) return;  // who waits for it turns to a holder
    const SlotHeader& torn = arena_->header()->slot[slot_];
    SlotView view{.slot = slot_,
                  .seq = torn.seq.load(std::memory_order_acquire),
                  .extent_offset = torn.extent_offset,
                  .extent_bytes = torn.extent_bytes,
                  .fields = fields_,
                  .crc_root = key_.crc_root};
    relay_ = std::make_shared<Relay>(std::move(memory.value()), view, crcs, have);
    relays_->Open(key_, relay_);
    KillPoint("restore.relay_opened");
  }
  void Verified(std::uint64_t chunk) override {
    if (relay_ != nullptr) relay_->Verified(chunk);
  }
  void Lost() override { End(false); }
  void End(bool published) {
    if (relay_ == nullptr) return;
    relay_->End(published);
    relays_->Close(key_, relay_.get());
    relay_ = nullptr;
  }
  std::string Why() const override { return why_; }

 private:
  Arena* arena_;
  std::uint32_t slot_;
  const RelayKey key_;
  RelayTable* relays_;
  std::optional<SlotWriter> writer_;
  SlotFields fields_;
  std::shared_ptr<Relay> relay_;
  std::string why_;
};

// Whom a restore asks, one after the other, beginning with the plan's source.
class Sources {
 public:
  Sources(const TransferOptions& options, const RestorePart& want, const std::string& own) {
    if (want.relay > 0) {
      const auto behind = std::min<std::uint32_t>(want.relay, 64) - 1;
      // It takes its own memory first, at a GiB a second.
      const std::chrono::milliseconds ready(std::min<std::uint64_t>(want.bytes >> 20, 60'000));
      all_.push_back({.address = want.source_address,
                      .relay = true,
                      .limits = {.connect_timeout = options.connect_timeout,
                                 .io_timeout = options.relay_timeout +
                                               options.relay_timeout / 4 * behind + ready,
                                 .least_bytes_per_second = options.relay_bytes_per_second}});
    }
    const PeerLimits holders = LimitsOf(options);
    const auto add = [&](const std::string& address) {
      if (!address.empty() && address != own)
        all_.push_back({.address = address, .limits = holders});
    };
    if (want.relay == 0) add(want.source_address);
    for (const std::string& other : want.others) add(other);
  }

  bool empty() const { return at_ >= all_.size(); }
  // What the present one is asked like.
  void Fill(PeerTask* task) const {
    const Source& source = all_[at_];
    task->address = source.address;
    task->relay = source.relay;
    task->checked = source.corrupt > 0;
    task->limits = source.limits;
  }
  // The present one failed so; the next one's turn. True: after a pause, all have had theirs.
  bool Next(ErrorCode code) {
    Source& source = all_[at_];
    // A source that just started may not know the job yet, so "not there" is believed the fifth
    // time. A wrong chunk may be the wire once; three are its memory.
    source.gone += code == ErrorCode::kNotFound ? 1 : 0;
    source.corrupt += code == ErrorCode::kCorrupt ? 1 : 0;
    if (source.relay || source.gone >= 5 || source.corrupt >= 3 || code == ErrorCode::kStale) {
      all_.erase(all_.begin() + static_cast<std::ptrdiff_t>(at_));
    } else {
      ++at_;
      asked_ = true;
    }
    if (at_ < all_.size()) return false;
    at_ = 0;
    return std::exchange(asked_, false);
  }

 private:
  struct Source {
    std::string address;
    bool relay = false;  // one chance: what it lacks once it may lack for long
    PeerLimits limits;
    int gone = 0, corrupt = 0;
  };
  std::vector<Source> all_;  // who may yet have it
  std::size_t at_ = 0;
  bool asked_ = false;  // one that stays, since the last pause
};

// Each byte is read once: copied and checked in the same pass.
Result<SlotView> CopySlot(Arena* from, const SlotView& view, Arena* to, std::uint32_t slot,
                          const std::atomic<bool>& cancel) {
  const unsigned char* data = from->Payload(view);
  const std::uint32_t* crcs = from->ChunkCrcs(view);
  if (data == nullptr || crcs == nullptr) {
    return Error{ErrorCode::kNoMemory, from->Name() + ": cannot map the slot"};
  }
  auto writer = SlotWriter::Begin(to, slot, view.fields.payload_bytes);
  if (!writer.ok()) return writer.error();
  for (std::uint64_t i = 0; i < view.chunks(); ++i) {
    if (cancel) return Error{ErrorCode::kStale, "the generation is over"};
    const std::uint32_t crc =
        Crc32cCopy(0, writer.value().Chunk(i), data + i * kChunkBytes, view.chunk_size(i));
    writer.value().SetChunkCrc(i, crc);
    KillPoint("restore.chunk_copied");
    if (crc == crcs[i]) continue;
    from->MarkDamaged(view);
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: slot {}, step {}: chunk {} of {} has CRC {:08x}, not {:08x}",
                             from->Name(), view.slot, view.step(), i, view.chunks(), crc, crcs[i])};
  }
  StoreFence();
  auto copied = writer.value().Publish(view.fields, view.crc_root);
  KillPoint("restore.slot_copied");
  if (!copied.ok()) return copied;
  if (!from->Current(view)) {
    return Error{ErrorCode::kStale, fmt::format("{}: step {} was overwritten while it was copied",
                                                from->Name(), view.step())};
  }
  return copied;
}

}  // namespace

std::optional<SlotView> FindRestore(const Arena& arena, const RestorePart& restore) {
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena.Look(i);
    if (view && !arena.Damaged(*view) && view->fields.step == restore.step &&
        view->fields.generation == restore.shard_generation &&
        view->fields.rank == restore.shard_rank && view->crc_root == restore.crc_root) {
      return view;
    }
  }
  return std::nullopt;
}

Result<SlotView> BringRestore(const TransferOptions& options, ArenaHost* host,
                              const JobFacts& facts, const LocalRank& local, std::uint16_t own_port,
                              RelayTable* relays, Arena* memory) {
  const RestorePart& want = local.restore;
  auto target = Reopen(local.arena);
  if (!target.ok()) return target.error();
  *memory = std::move(target.value());
  Arena& arena = *memory;
  // These very bytes lie here, damaged: they are put right where they are.
  const auto damaged = FindRestore(arena, want);
  const std::uint32_t slot =
      damaged ? damaged->slot : ChooseSlot(arena, facts.committed_generation, facts.committed_step);

  std::string why;
  std::optional<Result<SlotView>> here;
  const auto copy = [&](const ArenaName& name, Arena* source) {
    if (name == ArenaName{.rank = local.rank, .replica = false}) return false;  // `arena` itself
    const auto view = FindRestore(*source, want);
    if (!view) return false;
    here = CopySlot(source, *view, &arena, slot, local.cancel);
    if (!here->ok()) why = here->error().message;
    return here->ok() || local.cancel;
  };
  if (SearchShard(host, local.job, want.shard_rank, copy)) return *here;

  Sources sources(options, want, fmt::format("{}:{}", options.bind_address, own_port));
  if (sources.empty()) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("step {} of rank {} is not in this node's memory{}{}", want.step,
                             want.shard_rank, why.empty() ? "" : ": ", why)};
  }
  PeerTask task =
      TaskFor(options, local.job, facts, local.generation, TrafficClass::kRepair, &local.cancel);
  task.streams = options.streams;
  SlotFields wanted;
  wanted.step = want.step;
  wanted.rank = want.shard_rank;
  wanted.generation = want.shard_generation;
  wanted.payload_bytes = want.bytes;
  SlotSink sink(&arena, slot,
                {local.job, want.shard_rank, want.shard_generation, want.step, want.crc_root},
                relays);
  // While others wait for the source this takes its memory, not once it answers: each in a line
  // would wait for all before it.
  if (want.bytes <= kMaxPayloadBytes) {
    if (auto ok = SlotWriter::Reserve(&arena, slot, want.bytes, Touch::kByChunk); !ok.ok())
      return ok.error();
  }
  FetchProgress progress;
  const auto deadline = std::chrono::steady_clock::now() + options.restore_timeout +
                        std::chrono::milliseconds(RestoreMillis(want.bytes));
  auto pause = options.retry_first;
  for (int attempt = 1;; ++attempt) {
    sources.Fill(&task);
    auto view = FetchSlot(task, wanted, want.crc_root, &sink, &progress);
    if (view.ok()) {
      sink.End(true);
      return view;
    }
    const ErrorCode code = view.error().code;
    if (local.cancel) return Error{ErrorCode::kStale, "the generation is over"};
    const bool all_asked = code != ErrorCode::kNoMemory && sources.Next(code);
    if (code == ErrorCode::kNoMemory || sources.empty() ||
        std::chrono::steady_clock::now() + pause >= deadline) {
      return Error{code, fmt::format("{} (attempt {})", view.error().message, attempt)};
    }
    if (!all_asked) continue;
    for (auto slept = pause * 0; slept < pause && !local.cancel;
         slept += std::chrono::milliseconds(20)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    if (local.cancel) return Error{ErrorCode::kStale, "the generation is over"};
    pause = std::min(pause * 2, options.retry_last);
  }
}

}  // namespace everstep::checkpoint
