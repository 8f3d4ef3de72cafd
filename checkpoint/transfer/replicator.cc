#include "checkpoint/transfer/replicator.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <mutex>

#include "checkpoint/store/mend.h"
#include "checkpoint/transfer/peer_task.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;

constexpr int kSuspectAfter = 3;

}  // namespace

void Replicator::QueuePush(const LocalPtr& local) {
  for (std::size_t i = 0; i < local->peers.size(); ++i) QueuePush(local, i, milliseconds(0));
}

void Replicator::QueuePush(const LocalPtr& local, std::size_t peer, milliseconds delay) {
  {
    std::lock_guard<std::mutex> lock(local->mutex);
    PeerPush& push = local->peers[peer];
    if (push.running) push.again = true;
    if (push.running || push.queued) return;
    push.queued = true;
  }
  pool_->Submit([this, local, peer] { Run(local, peer); }, delay);
}

void Replicator::Run(const LocalPtr& local, std::size_t peer) {
  PeerPush& push = local->peers[peer];
  {
    std::lock_guard<std::mutex> lock(local->mutex);
    push.queued = false;
    push.running = true;
    push.again = false;
  }
  const std::optional<milliseconds> retry = Push(local, &push);
  bool again;
  {
    std::lock_guard<std::mutex> lock(local->mutex);
    push.running = false;
    again = push.again;
  }
  if (local->cancel) return;
  if (retry || again) QueuePush(local, peer, retry.value_or(milliseconds(0)));
}

// The newest capture of the generation; before there is one, what the rank was restored from.
std::optional<SlotView> Replicator::ToPush(const LocalRank& local, const PeerPush& peer) {
  std::optional<SlotView> best;
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    const auto view = local.arena.Look(i);
    if (!view || view->fields.generation != local.generation) continue;
    if (!best || view->step() > best->step()) best = view;
  }
  if (!best) {
    const RestoreView word = local.arena.Restore();
    if (word.generation != local.generation || word.state != RestoreState::kReady)
      return std::nullopt;
    best = local.arena.Look(word.slot % kSlots);
    if (!best || best->seq != word.slot_seq) return std::nullopt;
    // Another rank's shard: that rank pushes it.
    if (best->fields.rank != local.rank) return std::nullopt;
  }
  const SlotHeader& slot = local.arena.header()->slot[best->slot];
  if (slot.replicated_seq.load() == best->seq || peer.gave_up_content == best->content()) {
    return std::nullopt;
  }
  std::lock_guard<std::mutex> lock(local.mutex);
  if (peer.has_content == best->content()) return std::nullopt;
  return best;
}

void Replicator::PushBegins(LocalRank* local, const SlotView& view) {
  std::lock_guard<std::mutex> lock(local->mutex);
  ++local->pushing[view.slot];
  local->arena.header()->slot[view.slot].pushing_seq.store(view.seq, std::memory_order_release);
}

// A content that every peer has verified is replicated; one that no push carries any more may go.
void Replicator::PushEnds(LocalRank* local, PeerPush* peer, const SlotView& view, bool done) {
  std::lock_guard<std::mutex> lock(local->mutex);
  if (local->cancel && !stopping_) return;  // the marks are the next generation's, of other peers
  SlotHeader& slot = local->arena.header()->slot[view.slot];
  if (done) peer->has_content = view.content();
  const bool all = std::all_of(local->peers.begin(), local->peers.end(),
                               [&](const PeerPush& p) { return p.has_content == view.content(); });
  if (all) slot.replicated_seq.store(view.seq, std::memory_order_release);
  KillPoint("push.replicated");
  if (--local->pushing[view.slot] == 0) slot.pushing_seq.store(0, std::memory_order_release);
}

// A capture under way of which nothing has been sent yet.
std::optional<CaptureUnderWay> Replicator::ToFollow(const LocalRank& local,
                                                    const PeerPush& peer) const {
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    auto capture = LookCapture(local.arena, i);
    if (capture && capture->id != peer.ahead &&
        capture->view.fields.generation == local.generation &&
        capture->view.fields.payload_bytes >= options_.ahead_bytes) {
      return capture;
    }
  }
  return std::nullopt;
}

// One attempt a capture; the push that follows it needs none of this. It lasts as long as the
// capture does, so one thread of the pool stays free for what is whole.
void Replicator::Follow(const LocalPtr& local, PeerPush* peer, const PeerTask& task,
                        const CaptureUnderWay& capture) {
  if (following_.fetch_add(1) + 1 < std::max(2, options_.push_threads)) {
    peer->ahead = capture.id;
    const auto sent = PushAhead(task, &peer->sending, capture);
    if (!sent.ok() && sent.error().code == ErrorCode::kInvalid) {
      listener_->OnTrouble(local->job, sent.error().message);
    }
  }
  following_.fetch_sub(1);
}

// One attempt. When to try again; none: nothing is left to send.
std::optional<milliseconds> Replicator::Push(const LocalPtr& local, PeerPush* peer) {
  const auto view = ToPush(*local, *peer);
  if (local->cancel || !local->restored) return std::nullopt;
  const auto capture = view ? std::nullopt : ToFollow(*local, *peer);
  if (!view && !capture) return std::nullopt;
  const JobFacts facts = jobs_->Find(local->job).value_or(JobFacts{});
  if (!peer->sending.open()) {
    auto mapped = Arena::Open(fcntl(local->arena.fd(), F_DUPFD_CLOEXEC, 0));
    if (!mapped.ok()) return options_.retry_last;  // no descriptor is free
    peer->sending = std::move(mapped.value());
  }
  const bool restored = view && view->fields.generation != local->generation;
  PeerTask task = TaskFor(options_, local->job, facts, local->generation,
                          restored ? TrafficClass::kRepair : TrafficClass::kCommit, &local->cancel);
  task.address = peer->address;
  task.streams = options_.streams;
  task.traffic = traffic_;
  if (capture) {
    Follow(local, peer, task, *capture);
    return std::nullopt;
  }
  PushBegins(local.get(), *view);
  KillPoint("push.marked");
  PushReport report;
  const auto began = std::chrono::steady_clock::now();
  const auto pushed = PushSlot(task, &peer->sending, *view, &report);
  if (pushed.ok() || !local->cancel) {
    traffic_->Pushed(
        pushed.ok() ? PeerOutcome::kDone : OutcomeOf(pushed.error()),
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(),
        report.unchanged_bytes, report.resumed_bytes);
  }
  KillPoint("push.ended");
  PushEnds(local.get(), peer, *view, pushed.ok());
  if (restored && pushed.ok()) KillPoint("repair.pushed");
  if (pushed.ok()) {
    peer->backoff = milliseconds(0);
    peer->corrupt = 0;
    peer->troubled = false;
    return std::nullopt;
  }
  return After(local, peer, *view, pushed.error());
}

// An attempt to push `view` failed: when to try again.
std::optional<milliseconds> Replicator::After(const LocalPtr& local, PeerPush* peer,
                                              const SlotView& view, const Error& error) {
  if (local->cancel) return std::nullopt;
  if (!local->arena.Current(view)) return milliseconds(0);  // a newer one has come
  peer->corrupt = error.code == ErrorCode::kCorrupt ? peer->corrupt + 1 : 0;
  if (peer->corrupt == kSuspectAfter) {  // not the wire, then
    if (const auto chunk = FirstDamage(&peer->sending, view)) {
      upkeep_->Damaged(local->job, ToShard(view, false), *chunk, "push");
    }
  }
  const bool hopeless = error.code == ErrorCode::kStale || error.code == ErrorCode::kNoMemory ||
                        peer->corrupt >= kSuspectAfter;
  if (hopeless) peer->gave_up_content = view.content();
  if (hopeless || !peer->troubled) {
    peer->troubled = true;
    listener_->OnTrouble(
        local->job,
        fmt::format("pushing step {} of rank {}: {}{}", view.step(), local->rank, error.message,
                    peer->corrupt >= kSuspectAfter
                        ? "; its bytes no longer match the checksum of their capture: "
                          "this node's memory is suspect"
                        : ""));
  }
  if (hopeless) return std::nullopt;
  peer->backoff = peer->backoff.count() == 0 ? options_.retry_first
                                             : std::min(peer->backoff * 2, options_.retry_last);
  return peer->backoff;
}

}  // namespace everstep::checkpoint
