#include "checkpoint/transfer/restores.h"

#include <fcntl.h>
#include <fmt/format.h>

#include "checkpoint/transfer/range_restorer.h"
#include "checkpoint/transfer/replica_store.h"
#include "checkpoint/transfer/restorer.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::chrono::seconds kEnds{10};  // once given up; longer than any of its waits

RestoreView WordOf(Generation generation, RestoreState state, const SlotView& view) {
  return {.generation = generation,
          .state = state,
          .slot = view.slot,
          .slot_seq = view.seq,
          .step = view.step(),
          .message = {}};
}

}  // namespace

// A restore that was given up looks up every MiB, and may be in the middle of one: it must not
// write into an arena that another generation's restore or trainer fills.
bool Restores::Await(const Part& part, std::string* error) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (const WorkerPart& worker : part.workers) {
    const bool ended = ended_.wait_for(lock, kEnds, [&] {
      return !writing_.contains({part.job, worker.rank});
    });
    if (ended) continue;
    *error = fmt::format("rank {} of job {}: the restore of an earlier generation does not end",
                         worker.rank, part.job);
    return false;
  }
  return true;
}

void Restores::Start(const LocalPtr& local) {
  const RestoreView word = local->arena.Restore();
  if (word.generation == local->generation &&
      (word.state == RestoreState::kReady || word.state == RestoreState::kFresh)) {
    local->restored = true;  // an agent before this one did it
    if (word.state == RestoreState::kReady) Holds(local, local->arena.Look(word.slot % kSlots));
    return;
  }
  if (local->restore.step == kNoStep) {
    local->arena.SetRestore({.generation = local->generation, .state = RestoreState::kFresh});
    local->restored = true;
    return;
  }
  const bool ranges = local->restore.cut != nullptr;
  if (ranges && word.generation == local->generation && word.state == RestoreState::kAsk &&
      word.slot < kSlots) {
    // An agent before this one asked: the trainer may be reading or answering just now.
    local->asked_slot = word.slot;
    local->asked_seq = word.slot_seq;
    local->restored = true;
    return;
  }
  if (ranges) {
    local->arena.SetRestore({.generation = local->generation,
                             .state = RestoreState::kPending,
                             .step = local->restore.step});
    pool_->Submit([this, local] { Ask(local); });
    return;
  }
  const auto view = FindRestore(local->arena, local->restore);
  if (view && InPlace(local, *view)) {
    Ready(local, *view);  // the worker checks every byte before it believes it
    return;
  }
  local->arena.SetRestore({.generation = local->generation,
                           .state = RestoreState::kPending,
                           .slot_seq = local->restore.bytes,
                           .step = local->restore.step});
  KillPoint("restore.pending");
  pool_->Submit([this, local] { BringWhole(local); });
}

// What lies here already will do, but not when it was found damaged, or the plan sends the rank
// elsewhere for these very bytes and they are not whole.
bool Restores::InPlace(const LocalPtr& local, const SlotView& view) {
  if (upkeep_->KnownDamaged(local->job, ToShard(view, false))) return false;
  if (local->restore.source_address.empty()) return true;
  auto mapped = Arena::Open(fcntl(local->arena.fd(), F_DUPFD_CLOEXEC, 0));
  return mapped.ok() && mapped.value().Verify(view).ok();
}

void Restores::Ready(const LocalPtr& local, const SlotView& view) {
  upkeep_->Mended(local->job, ToShard(view, false));
  local->arena.SetRestore(WordOf(local->generation, RestoreState::kReady, view));
  KillPoint("restore.ready");
  local->restored = true;
  Holds(local, view);
}

// What the rank starts from is here, and goes to the peer until something newer is captured.
void Restores::Holds(const LocalPtr& local, const std::optional<SlotView>& view) {
  // Word of its commit may have come before the bytes.
  const JobFacts facts = jobs_->Find(local->job).value_or(JobFacts{});
  if (facts.committed_step != kNoStep) {
    MarkSlots(local->arena, facts.committed_generation, facts.committed_step);
  }
  if (view && view->fields.generation != local->generation) {
    KillPoint("repair.restored_told");
    listener_->OnCopied(local->job, ToShard(*view, false));
  }
  replicator_->QueuePush(local);
}

// Runs `bring`, which writes into the rank's arena, and says in its restore word what came of it:
// `word`, or that it failed. None: it failed, or was given up.
std::optional<SlotView> Restores::Bring(
    const LocalPtr& local, RestoreState word,
    const std::function<Result<SlotView>(const JobFacts& facts)>& bring) {
  const auto arena = std::pair(local->job, local->rank);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (local->cancel) return std::nullopt;
    writing_.insert(arena);
  }
  const auto view = bring(jobs_->Find(local->job).value_or(JobFacts{}));
  KillPoint("restore.brought");
  bool given_up;
  {
    // Before anybody can give it up: the word is this generation's.
    std::lock_guard<std::mutex> lock(local->mutex);
    given_up = local->cancel;
    if (!given_up) {
      local->arena.SetRestore(view.ok() ? WordOf(local->generation, word, view.value())
                                        : RestoreView{.generation = local->generation,
                                                      .state = RestoreState::kFailed,
                                                      .step = local->restore.step,
                                                      .message = view.error().message});
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_.erase(arena);
    ended_.notify_all();
  }
  if (given_up) return std::nullopt;
  if (view.ok()) return view.value();
  listener_->OnTrouble(local->job,
                       fmt::format("restoring rank {}: {}", local->rank, view.error().message));
  return std::nullopt;
}

void Restores::BringWhole(const LocalPtr& local) {
  Arena memory;
  const auto view = Bring(local, RestoreState::kReady, [&](const JobFacts& facts) {
    return BringRestore(options_, host_, facts, *local, own_port_, relays_, &memory);
  });
  if (!view) return;
  local->restored = true;
  Holds(local, *view);
}

// A restore by ranges, first half: the trainer is told what there is.
void Restores::Ask(const LocalPtr& local) {
  const auto catalog = Bring(local, RestoreState::kAsk, [&](const JobFacts& facts) {
    const RangeSources sources{options_, host_, files_, facts, own_address_};
    return BringCatalog(sources, *local, &local->tiers);
  });
  if (!catalog) return;
  local->asked_slot = catalog->slot;
  local->asked_seq = catalog->seq;
  local->restored = true;  // who starts from nothing all the same may capture
}

bool Restores::LookForAnswer(const LocalPtr& local) {
  const std::uint64_t asked = local->asked_seq;
  if (asked == 0) return false;
  const auto request = local->arena.LookExchange(local->asked_slot, kFlagRequest);
  if (!request || request->seq <= asked || request->fields.generation != local->generation) {
    return false;
  }
  local->asked_seq = 0;
  local->arena.SetRestore({.generation = local->generation,
                           .state = RestoreState::kPending,
                           .step = local->restore.step});
  pool_->Submit([this, local, request] { Answer(local, *request); });
  return true;
}

// The second half: it has said what it wants.
void Restores::Answer(const LocalPtr& local, const SlotView& request) {
  Arena memory;
  const auto view = Bring(local, RestoreState::kReady, [&](const JobFacts& facts) {
    const RangeSources sources{options_, host_, files_, facts, own_address_};
    return BringRanges(sources, *local, request, local->tiers, &memory);
  });
  if (!view) return;
  local->restored = true;
  Holds(local, *view);
  wake_();  // it counts as captured by this generation
}

}  // namespace everstep::checkpoint
