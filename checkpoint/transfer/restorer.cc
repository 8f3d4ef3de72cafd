#include "checkpoint/transfer/restorer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "checkpoint/store/fence.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/peer_client.h"
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

class SlotSink final : public FetchSink {
 public:
  SlotSink(Arena* arena, std::uint32_t slot) : arena_(arena), slot_(slot) {}
  SlotWriter* Begin(const SlotFields& fields) override {
    if (writer_) return &*writer_;
    auto writer = SlotWriter::Begin(arena_, slot_, fields.payload_bytes);
    if (!writer.ok()) {
      why_ = writer.error().message;
      return nullptr;
    }
    writer_.emplace(writer.value());
    return &*writer_;
  }
  std::string Why() const override { return why_; }

 private:
  Arena* arena_;
  std::uint32_t slot_;
  std::optional<SlotWriter> writer_;
  std::string why_;
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
                              const JobFacts& facts, const LocalRank& local,
                              std::uint16_t own_port) {
  const RestorePart& want = local.restore;
  auto target = Reopen(local.arena);
  if (!target.ok()) return target.error();
  Arena& arena = target.value();
  // These very bytes lie here, damaged: they are put right where they are.
  const auto damaged = FindRestore(arena, want);
  const std::uint32_t slot =
      damaged ? damaged->slot : ChooseSlot(arena, facts.committed_generation, facts.committed_step);

  std::string why;
  for (const bool replica : {false, true}) {
    if (!replica && want.shard_rank == local.rank) continue;  // that is this arena itself
    auto fds = host->Open(local.job, {.rank = want.shard_rank, .replica = replica}, 0);
    if (!fds.ok()) continue;
    if (fds.value().eventfd >= 0) close(fds.value().eventfd);
    auto source = Arena::Open(fds.value().memfd);
    if (!source.ok()) continue;
    const auto view = FindRestore(source.value(), want);
    if (!view) continue;
    auto copied = CopySlot(&source.value(), *view, &arena, slot, local.cancel);
    if (copied.ok()) return copied;
    if (local.cancel) return copied;
    why = copied.error().message;
  }

  const std::string own = fmt::format("{}:{}", options.bind_address, own_port);
  if (want.source_address.empty() || want.source_address == own) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("step {} of rank {} is not in this node's memory{}{}", want.step,
                             want.shard_rank, why.empty() ? "" : ": ", why)};
  }
  PeerTask task{
      .address = want.source_address,
      .job = local.job,
      .key = facts.key,
      .generation = local.generation,
      .committed_generation = facts.committed_generation,
      .committed_step = facts.committed_step,
      .limits = {.connect_timeout = options.connect_timeout, .io_timeout = options.io_timeout},
      .cancel = &local.cancel,
      .streams = options.streams,
      .traffic_class = TrafficClass::kRepair};
  SlotFields wanted;
  wanted.step = want.step;
  wanted.rank = want.shard_rank;
  wanted.generation = want.shard_generation;
  wanted.payload_bytes = want.bytes;
  SlotSink sink(&arena, slot);
  FetchProgress progress;
  const auto deadline = std::chrono::steady_clock::now() + options.restore_timeout +
                        std::chrono::milliseconds(RestoreMillis(want.bytes));
  auto pause = options.retry_first;
  int gone = 0, corrupt = 0;
  for (int attempt = 1;; ++attempt) {
    auto view = FetchSlot(task, wanted, want.crc_root, &sink, &progress);
    if (view.ok()) return view;
    const ErrorCode code = view.error().code;
    // A source that just started may not know the job yet, so "not there" is believed the fifth
    // time.
    if (code == ErrorCode::kNotFound) ++gone;
    if (code == ErrorCode::kCorrupt) ++corrupt;  // once may be the wire, three times is its memory
    task.checked = corrupt > 0;
    if (code == ErrorCode::kStale || code == ErrorCode::kNoMemory || gone >= 5 || corrupt >= 3 ||
        std::chrono::steady_clock::now() + pause >= deadline) {
      return Error{code, fmt::format("{} (attempt {})", view.error().message, attempt)};
    }
    for (auto slept = pause * 0; slept < pause && !local.cancel;
         slept += std::chrono::milliseconds(20)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    if (local.cancel) return Error{ErrorCode::kStale, "the generation is over"};
    pause = std::min(pause * 2, options.retry_last);
  }
}

}  // namespace everstep::checkpoint
