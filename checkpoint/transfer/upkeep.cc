#include "checkpoint/transfer/upkeep.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/mend.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/mender.h"
#include "checkpoint/transfer/peer_task.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kMostDamaged = 4096;  // remembered; beyond, all are forgotten and found anew

}  // namespace

void Upkeep::Start(std::function<std::vector<JobId>()> jobs) {
  scrubber_ = std::make_unique<Scrubber>(options_.scrub, host_, traffic_, std::move(jobs),
                                         [this](const Scrubber::Finding& f) {
                                           listener_->OnTrouble(f.job, f.what);
                                           Damaged(f.job, f.shard, f.chunk, "scrub");
                                         });
}

void Upkeep::Stop() {
  ending_ = true;
  if (scrubber_ != nullptr) scrubber_->Stop();
}

std::vector<HeldShard> Upkeep::Survey(const JobId& job) {
  std::vector<HeldShard> out;
  auto names = host_->List(job);
  if (!names.ok()) {
    listener_->OnTrouble(job, names.error().message);
    return out;
  }
  std::uint64_t unread = options_.survey_bytes;
  const std::uint32_t job_crc = Crc32c(job.data(), job.size());
  for (const ArenaName& name : names.value()) {
    auto arena = OpenHeld(host_, job, name);
    if (!arena.ok()) {
      if (arena.error().code != ErrorCode::kNotFound) {
        listener_->OnTrouble(job, arena.error().message);
      }
      continue;
    }
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena.value().Look(i);
      if (!view || view->fields.job_crc != job_crc) continue;
      if (name.replica && view->fields.rank != name.rank) continue;
      const HeldShard shard = ToShard(*view, name.replica);
      const bool all = view->fields.payload_bytes <= unread;
      if (all) unread -= view->fields.payload_bytes;
      if (!all && (arena.value().Damaged(*view) || KnownDamaged(job, shard))) {
        listener_->OnTrouble(job, fmt::format("{}: slot {}, step {}: was found damaged; left out",
                                              arena.value().Name(), i, view->step()));
        continue;
      }
      const auto ok = all ? arena.value().Verify(*view) : CheckTable(&arena.value(), *view);
      if (!ok.ok()) {
        if (ok.error().code != ErrorCode::kStale) listener_->OnTrouble(job, ok.error().message);
        if (const auto chunk = FirstDamage(&arena.value(), *view)) {
          Damaged(job, shard, *chunk, "survey");
        }
        continue;
      }
      out.push_back(shard);
      KillPoint("switch.slot_surveyed");
    }
  }
  return out;
}

void Upkeep::Damaged(const JobId& job, const HeldShard& shard, std::int64_t chunk, const char* by) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (damaged_.size() > kMostDamaged) damaged_.clear();
    if (damaged_.insert(KeyOf(job, shard)).second) ++found_;
  }
  listener_->OnDamaged(job, shard, chunk, by);
}

void Upkeep::Mended(const JobId& job, const HeldShard& shard) {
  std::lock_guard<std::mutex> lock(mutex_);
  mended_ += damaged_.erase(KeyOf(job, shard));
}

bool Upkeep::KnownDamaged(const JobId& job, const HeldShard& shard) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return damaged_.contains(KeyOf(job, shard));
}

ScrubReport Upkeep::report() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {.checked_bytes = scrubber_->checked_bytes(),
          .checked_slots = scrubber_->checked_slots(),
          .damaged = found_,
          .repaired = mended_};
}

void Upkeep::Mend(const JobId& job, const HeldShard& shard, const std::string& source_address) {
  pool_->Submit([this, job, shard, source_address] { RunMend(job, shard, source_address); });
}

void Upkeep::RunMend(const JobId& job, const HeldShard& shard, const std::string& source_address) {
  const auto facts = jobs_->Find(job);
  if (!facts) return;  // over, and its memory gone
  PeerTask task =
      TaskFor(options_, job, *facts, facts->generation, TrafficClass::kRepair, &ending_);
  task.address = source_address;
  task.traffic = traffic_;
  // Wherever it lies: it goes by its name alone, so each of them may be what was found damaged.
  SearchShard(host_, job, shard.rank, [&](const ArenaName& name, Arena* arena) {
    if (name.replica == shard.replica) MendIn(task, arena, shard);
    return false;
  });
}

void Upkeep::MendIn(const PeerTask& task, Arena* arena, const HeldShard& shard) {
  const JobId& job = task.job;
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = arena->Look(i);
    if (!view || view->step() != shard.step || view->fields.generation != shard.generation ||
        view->fields.rank != shard.rank || view->crc_root != shard.crc_root) {
      continue;
    }
    if (KnownDamaged(job, shard)) arena->MarkDamaged(*view);  // no source, of itself neither
    MendReport report;
    const auto mended = MendSlot(task, arena, *view, &report);
    if (mended.ok()) {
      Mended(job, shard);
      listener_->OnCopied(job, ToShard(*view, shard.replica));
    } else if (mended.error().code != ErrorCode::kStale) {
      listener_->OnTrouble(job, fmt::format("mending step {} of rank {} from {}: {}", shard.step,
                                            shard.rank, task.address, mended.error().message));
    }
    return;
  }
}

// What a roll-back gave up is torn, own and kept for peers: nobody finds it again.
void Upkeep::GiveUp(const JobId& job, const std::vector<Cut>& given_up) {
  if (given_up.empty()) return;
  auto names = host_->List(job);
  if (!names.ok()) return;
  for (const ArenaName& name : names.value()) {
    auto arena = OpenHeld(host_, job, name);
    for (std::uint32_t i = 0; arena.ok() && i < kSlots; ++i) {
      const auto view = arena.value().Look(i);
      if (!view) continue;
      const bool beyond = std::any_of(given_up.begin(), given_up.end(), [&view](const Cut& cut) {
        return Beyond(cut, view->fields.generation, view->step());
      });
      if (beyond) Discard(&arena.value(), *view);
    }
  }
}

}  // namespace everstep::checkpoint
