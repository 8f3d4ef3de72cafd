#include "checkpoint/transfer/scrubber.h"

#include <algorithm>

#include "checkpoint/store/mend.h"
#include "checkpoint/transfer/held_arenas.h"

namespace everstep::checkpoint {

using std::chrono::steady_clock;

Scrubber::Scrubber(const ScrubOptions& options, ArenaHost* host, Traffic* traffic,
                   std::function<std::vector<JobId>()> jobs,
                   std::function<void(const Finding&)> found)
    : options_(options),
      host_(host),
      traffic_(traffic),
      jobs_(std::move(jobs)),
      found_(std::move(found)) {
  if (options_.bytes_per_s > 0) thread_ = std::thread([this] { Run(); });
}

Scrubber::~Scrubber() {
  Stop();
}

void Scrubber::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

bool Scrubber::Pause(std::chrono::nanoseconds time) {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait_for(lock, time, [this] { return stopping_.load(); });
  return !stopping_;
}

void Scrubber::Run() {
  // A tenth of the interval: a content that comes just after a pass does not wait for two.
  const auto pause =
      std::max<std::chrono::nanoseconds>(options_.every / 10, std::chrono::milliseconds(20));
  while (Pause(pause)) Pass();
}

void Scrubber::Pass() {
  std::map<SlotKey, std::pair<std::uint64_t, steady_clock::time_point>> still;
  for (const JobId& job : jobs_()) {
    auto names = host_->List(job);
    if (!names.ok()) continue;
    for (const ArenaName& name : names.value()) {
      auto arena = OpenHeld(host_, job, name);
      if (!arena.ok()) continue;
      for (std::uint32_t i = 0; i < kSlots; ++i) {
        if (!CheckSlot(job, name, &arena.value(), i)) return;
        const SlotKey key{job, name.rank, name.replica, i};
        if (const auto it = seen_.find(key); it != seen_.end()) still.insert(*it);
      }
    }
  }
  seen_ = std::move(still);
}

bool Scrubber::CheckSlot(const JobId& job, const ArenaName& name, Arena* arena,
                         std::uint32_t slot) {
  const auto view = arena->Look(slot);
  if (!view) return true;
  auto& seen = seen_[{job, name.rank, name.replica, slot}];
  const auto now = steady_clock::now();
  if (seen.first == view->seq && now - seen.second < options_.every) return true;
  const auto tell = [&](std::int64_t chunk, const Outcome& outcome) {
    if (outcome.ok() || outcome.error().code != ErrorCode::kCorrupt) return false;
    found_({job, ToShard(*view, name.replica), chunk, outcome.error().message});
    return true;
  };
  bool whole = !tell(kTableDamaged, CheckTable(arena, *view));
  for (std::uint64_t i = 0; whole && i < view->chunks(); ++i) {
    if (!traffic_->Admit(TrafficClass::kScrub, view->chunk_size(i), &stopping_)) return false;
    const auto looked = CheckChunk(arena, *view, i);
    if (!looked.ok() && looked.error().code != ErrorCode::kCorrupt) return true;  // overwritten
    whole = !tell(static_cast<std::int64_t>(i), looked);
    checked_bytes_ += view->chunk_size(i);
    if (!Pause(std::chrono::nanoseconds(
            static_cast<std::int64_t>(1e9 * static_cast<double>(view->chunk_size(i)) /
                                      static_cast<double>(options_.bytes_per_s))))) {
      return false;
    }
  }
  seen = {view->seq, steady_clock::now()};
  if (whole) ++checked_slots_;
  return true;
}

}  // namespace everstep::checkpoint
