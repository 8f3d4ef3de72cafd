#include "worker/agent/file_plane.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <thread>
#include <utility>

#include "checkpoint/store/memory_limit.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/held_arenas.h"
#include "proto/base/kill_point.h"
#include "proto/base/log.h"
#include "proto/base/version.h"

namespace everstep::agent {
namespace {

namespace cp = everstep::checkpoint;

constexpr std::chrono::milliseconds kRetryPause{250};  // doubled
// A network file system may show another node's file a little late.
constexpr std::chrono::milliseconds kSealPause{100};
constexpr int kSealLooks = 5;

std::uint64_t WallNanos() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::system_clock::now().time_since_epoch())
                                        .count());
}

// A rank's own arena, made with room for a slot of so many bytes where there is none.
cp::Result<cp::Arena> OpenOwn(cp::ArenaHost* host, const JobId& job, Rank rank,
                              std::uint64_t room) {
  auto fds = host->Open(job, {.rank = rank, .replica = false}, room);
  if (!fds.ok()) return fds.error();
  if (fds.value().eventfd >= 0) close(fds.value().eventfd);
  const cp::ArenaSpec blank{.job = job, .rank = rank};
  return cp::Arena::Open(fds.value().memfd, room == 0 ? nullptr : &blank);
}

bool IsOf(const cp::SlotView& view, Generation generation, Step step, Rank rank) {
  return view.fields.generation == generation && view.fields.step == step &&
         view.fields.rank == rank;
}

}  // namespace

bool FilePlane::CopyOne(const JobId& job, Generation generation, Step step, Rank rank,
                        SlotCopy* out, std::string* error) {
  *error = fmt::format("step {} of rank {} is not in this node's memory any more", step, rank);
  bool copied = false;
  const auto copy = [&](const cp::ArenaName&, cp::Arena* arena) {
    for (std::uint32_t i = 0; i < cp::kSlots; ++i) {
      const auto view = arena->Look(i);
      if (!view || !IsOf(*view, generation, step, rank)) continue;
      const std::uint64_t bytes = view->fields.payload_bytes;
      if (auto room = cp::CheckMemory(
              bytes, fmt::format("writing step {} of rank {} of job {}", step, rank, job));
          !room.ok()) {
        *error = room.error().message;
        return true;  // nor for any other copy of it
      }
      const unsigned char* data = arena->Payload(*view);
      const std::uint32_t* crcs = arena->ChunkCrcs(*view);
      std::unique_ptr<unsigned char[]> payload(new (std::nothrow) unsigned char[bytes]);
      if (data == nullptr || crcs == nullptr || payload == nullptr) {
        *error = fmt::format("{}: no memory for a copy of {} bytes", arena->Name(), bytes);
        return true;
      }
      std::memcpy(payload.get(), data, bytes);
      out->chunk_crcs.assign(crcs, crcs + view->chunks());
      if (!arena->Current(*view)) {
        *error =
            fmt::format("{}: step {} was overwritten while it was copied", arena->Name(), step);
        continue;
      }
      KillPoint("persist.slot_copied");
      out->payload = std::move(payload);
      out->content = {.job = job,
                      .fields = view->fields,
                      .crc_root = view->crc_root,
                      .payload = out->payload.get(),
                      .chunk_crcs = out->chunk_crcs.data()};
      copied = true;
      return true;
    }
    return false;
  };
  cp::SearchShard(host_, job, rank, copy);
  return copied;
}

bool FilePlane::Copy(const JobId& job, Generation generation, Step step,
                     const std::vector<Rank>& ranks, std::vector<SlotCopy>* out,
                     std::string* error) {
  for (const Rank rank : ranks) {
    if (!CopyOne(job, generation, step, rank, &out->emplace_back(), error)) return false;
  }
  return true;
}

Persisted FilePlane::Write(const CheckpointDir& dir, const JobId& job, Generation generation,
                           Step step, std::vector<SlotCopy> slots, const Cut& verified) {
  Persisted done{.job = job, .generation = generation, .step = step};
  cp::FileTier tier(disk_, dir.path);
  for (SlotCopy& slot : slots) {
    auto pause = kRetryPause;
    for (int attempt = 1;; ++attempt) {
      std::uint64_t written = 0;
      slot.content.payload = slot.payload.get();
      slot.content.chunk_crcs = slot.chunk_crcs.data();
      const auto ok = tier.WriteShard(slot.content, &written);
      done.bytes += written;
      if (ok.ok()) break;
      if (ok.error().code != cp::ErrorCode::kInternal || attempt == kAttempts) {
        done.error = fmt::format("{} (attempt {})", ok.error().message, attempt);
        return done;
      }
      std::this_thread::sleep_for(pause);
      pause *= 2;
    }
    slot.payload.reset();
  }
  for (int look = 1; look <= kSealLooks; ++look) {
    auto sealed = tier.Seal(step, generation, WallNanos(), fmt::format("everstep {}", kVersion),
                            &done.missing);
    if (!sealed.ok() && look == kSealLooks) done.error = sealed.error().message;
    done.sealed = sealed.ok() && sealed.value();
    if (done.sealed || look == kSealLooks) break;
    std::this_thread::sleep_for(kSealPause);
  }
  KillPoint("persist.sealed");
  if (done.sealed && verified.step != kNoStep) {
    const std::string name = cp::CheckpointName(verified.step, verified.generation);
    const auto marked = tier.MarkVerified(name);
    if (!marked.ok() && marked.error().code != cp::ErrorCode::kNotFound) {
      LogWarning("checkpoint_not_marked",
                 {{"job", job}, {"checkpoint", name}, {"why", marked.error().message}});
    }
  }
  if (done.sealed && dir.keep > 0) {
    std::vector<std::string> removed;
    if (auto ok = tier.Prune(dir.keep, &removed); !ok.ok()) {
      LogWarning("checkpoint_not_pruned", {{"job", job}, {"why", ok.error().message}});
    }
  }
  return done;
}

std::vector<HeldShard> FilePlane::Survey(const CheckpointDir& dir, const JobId& job,
                                         const std::vector<Cut>& given_up) {
  std::vector<HeldShard> out;
  cp::FileTier tier(disk_, dir.path);
  auto list = tier.List();
  if (!list.ok()) {
    if (list.error().code != cp::ErrorCode::kNotFound) {
      LogWarning("checkpoint_dir_unreadable", {{"job", job}, {"why", list.error().message}});
    }
    return out;
  }
  std::size_t told = 0;
  for (const cp::FileCheckpoint& c : list.value()) {
    if (c.state == cp::FileCheckpoint::State::kDamaged) {
      LogWarning("checkpoint_damaged", {{"job", job}, {"checkpoint", c.name}, {"why", c.why}});
    }
    if (c.state != cp::FileCheckpoint::State::kComplete) continue;
    const auto cut = std::find_if(given_up.begin(), given_up.end(), [&c, &job](const Cut& g) {
      return c.manifest.job == job && Beyond(g, c.generation, c.step);
    });
    if (cut != given_up.end()) {
      const auto marked = tier.MarkGivenUp(
          c.name, fmt::format("job {} was rolled back to step {}", job, cut->step));
      if (!marked.ok()) {
        LogWarning("checkpoint_not_marked",
                   {{"job", job}, {"checkpoint", c.name}, {"why", marked.error().message}});
      }
      continue;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto bad = bad_.find(dir.path + "/" + c.name);
      if (bad != bad_.end() && bad->second >= kBadReads) continue;
    }
    std::vector<HeldShard> shards;
    for (const cp::ManifestFile& f : c.manifest.ranks) {
      HeldShard shard{.rank = f.rank,
                      .world_size = c.manifest.world_size,
                      .generation = c.generation,
                      .step = c.step,
                      .crc_root = f.crc_root,
                      .bytes = f.payload_bytes,
                      .replicated_layout = c.manifest.replicated_layout,
                      .file = true,
                      .share = c.manifest.shares};
      if (c.manifest.job != job) {  // its root as this job's slots have it
        auto head = tier.ReadHead(c, f.rank);
        if (!head.ok()) break;
        cp::Restamp(job, &head.value());
        shard.crc_root = head.value().crc_root;
      }
      shards.push_back(shard);
    }
    if (shards.size() != c.manifest.ranks.size()) continue;
    out.insert(out.end(), shards.begin(), shards.end());
    if (++told == kNewest) break;
  }
  return out;
}

cp::Outcome FilePlane::LoadOne(cp::FileTier* tier, const JobId& job, const WorkerPlan& worker,
                               const std::atomic<bool>& over) {
  const RestorePlan& want = worker.restore;
  auto arena = OpenOwn(host_, job, worker.rank, want.bytes);
  if (!arena.ok()) return arena.error();
  std::uint32_t slot = 0;
  std::optional<Step> oldest;
  for (std::uint32_t i = 0; i < cp::kSlots; ++i) {
    const auto view = arena.value().Look(i);
    const Step step = view ? view->step() : kNoStep;
    if (view && IsOf(*view, want.shard_generation, want.step, want.shard_rank) &&
        view->crc_root == want.crc_root && arena.value().Verify(*view).ok()) {
      return cp::Done{};
    }
    if (oldest && *oldest <= step) continue;
    oldest = step;
    slot = i;
  }
  auto checkpoint = tier->Look(cp::CheckpointName(want.step, want.shard_generation));
  if (!checkpoint.ok()) return checkpoint.error();
  const cp::FileCheckpoint& c = checkpoint.value();
  if (c.state != cp::FileCheckpoint::State::kComplete) {
    return cp::Error{cp::ErrorCode::kCorrupt,
                     fmt::format("{}/{}: {}", tier->directory(), c.name, c.why)};
  }
  auto head = tier->ReadHead(c, want.shard_rank);
  if (!head.ok()) return head.error();
  cp::Restamp(job, &head.value());
  const cp::SlotFields& fields = head.value().fields;
  if (head.value().crc_root != want.crc_root) {
    return cp::Error{cp::ErrorCode::kInvalid,
                     fmt::format("{}/{}: rank {} is not what the plan names any more",
                                 tier->directory(), c.name, want.shard_rank)};
  }
  auto writer = cp::SlotWriter::Begin(&arena.value(), slot, fields.payload_bytes);
  if (!writer.ok()) return writer.error();
  KillPoint("restore.file_slot_begun");
  auto read = tier->ReadPayload(c, want.shard_rank, head.value(), writer.value().Chunk(0), &over);
  if (!read.ok()) return read;
  for (std::size_t i = 0; i < head.value().chunk_crcs.size(); ++i) {
    writer.value().SetChunkCrc(i, head.value().chunk_crcs[i]);
  }
  KillPoint("restore.file_read");
  if (over) return cp::Error{cp::ErrorCode::kStale, "the generation is over"};
  auto published = writer.value().Publish(fields, want.crc_root);
  if (!published.ok()) return published.error();
  KillPoint("restore.file_published");
  return cp::Done{};
}

void FilePlane::Begin(const JobId& job, Generation generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  Generation& newest = begun_[job];
  newest = std::max(newest, generation);
  for (Loading& l : loading_) {
    if (l.job == job && l.generation < generation) l.over = true;
  }
}

bool FilePlane::AwaitEarlier(const JobId& job, Generation generation,
                             std::chrono::milliseconds patience, std::string* error) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool ended = load_ended_.wait_for(lock, patience, [&] {
    return std::none_of(loading_.begin(), loading_.end(), [&](const Loading& l) {
      return l.job == job && l.generation < generation;
    });
  });
  if (!ended) {
    *error = fmt::format(
        "a restore of an earlier generation is still in a read of the checkpoint directory after "
        "{} ms; look at its file system",
        patience.count());
  }
  return ended;
}

void FilePlane::Forget(const JobId& job) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Loading& l : loading_) {
    if (l.job == job) l.over = true;
  }
  begun_.erase(job);
}

void FilePlane::Refused(cp::FileTier* tier, const std::string& name, const cp::Error& error) {
  const std::string path = tier->directory() + "/" + name;
  if (error.code == cp::ErrorCode::kCorrupt) {
    if (auto marked = tier->MarkDamaged(name, error.message); !marked.ok()) {
      std::lock_guard<std::mutex> lock(mutex_);
      bad_[path] = kBadReads;  // a directory that can be read only
    }
  } else if (error.code == cp::ErrorCode::kInternal) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++bad_[path];
  }
}

cp::Outcome FilePlane::Read(const std::string& directory, const cp::SlotName& name,
                            cp::ChunkTaker* taker) {
  cp::FileTier tier(disk_, directory);
  auto checkpoint = tier.Look(cp::CheckpointName(name.fields.step, name.fields.generation));
  if (!checkpoint.ok()) return checkpoint.error();
  const cp::FileCheckpoint& c = checkpoint.value();
  if (c.state != cp::FileCheckpoint::State::kComplete) {
    return cp::Error{cp::ErrorCode::kCorrupt, fmt::format("{}/{}: {}", directory, c.name, c.why)};
  }
  if (static_cast<std::size_t>(name.fields.rank) >= c.manifest.ranks.size()) {
    return cp::Error{cp::ErrorCode::kNotFound,
                     fmt::format("{}/{}: no rank {}", directory, c.name, name.fields.rank)};
  }
  auto head = tier.ReadHead(c, name.fields.rank);
  if (!head.ok()) return head.error();
  cp::Restamp(name.job, &head.value());
  const cp::SlotFields& fields = head.value().fields;
  if (auto ok = cp::CheckNamed(name, fields, head.value().crc_root, directory + "/" + c.name);
      !ok.ok()) {
    return ok;
  }
  auto read =
      tier.ReadChunks(c, name.fields.rank, head.value(), taker->Lacks(fields),
                      [taker](std::uint32_t chunk, const unsigned char* data, std::uint32_t bytes) {
                        return taker->Take(chunk, data, bytes);
                      });
  if (!read.ok() && read.error().code != cp::ErrorCode::kStale) {
    LogError("restore_from_files_failed",
             {{"job", name.job}, {"checkpoint", c.name}, {"why", read.error().message}});
    Refused(&tier, c.name, read.error());
  }
  return read;
}

bool FilePlane::Load(const CheckpointDir& dir, const Activate& a, std::string* error) {
  std::list<Loading>::iterator mine;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto newest = begun_.find(a.job);
    if (newest != begun_.end() && newest->second > a.generation) {
      *error = "the generation is over";
      return false;
    }
    mine = loading_.emplace(loading_.end());
    mine->job = a.job;
    mine->generation = a.generation;
  }
  const bool done = LoadAll(dir, a, mine->over, error);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    loading_.erase(mine);
  }
  load_ended_.notify_all();
  return done;
}

bool FilePlane::LoadAll(const CheckpointDir& dir, const Activate& a, const std::atomic<bool>& over,
                        std::string* error) {
  cp::FileTier tier(disk_, dir.path);
  for (const WorkerPlan& worker : a.plan.workers) {
    if (!worker.restore.file) continue;
    const std::string name =
        cp::CheckpointName(worker.restore.step, worker.restore.shard_generation);
    const auto began = std::chrono::steady_clock::now();
    const auto ok = LoadOne(&tier, a.job, worker, over);
    if (ok.ok()) {
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      LogInfo("restored_from_files", {{"job", a.job},
                                      {"rank", worker.rank},
                                      {"checkpoint", name},
                                      {"bytes", worker.restore.bytes},
                                      {"ms", static_cast<std::uint64_t>(took.count() * 1000)}});
      continue;
    }
    *error = fmt::format("restoring rank {} from files: {}", worker.rank, ok.error().message);
    LogError("restore_from_files_failed",
             {{"job", a.job}, {"checkpoint", name}, {"why", ok.error().message}});
    Refused(&tier, name, ok.error());
    return false;
  }
  return true;
}

}  // namespace everstep::agent
