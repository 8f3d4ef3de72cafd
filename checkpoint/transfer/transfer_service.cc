#include "checkpoint/transfer/transfer_service.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "checkpoint/store/capture_word.h"
#include "checkpoint/store/mend.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/peer_server.h"
#include "checkpoint/transfer/range_restorer.h"
#include "checkpoint/transfer/replica_store.h"
#include "checkpoint/transfer/restorer.h"
#include "checkpoint/transfer/shard_maker.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/upkeep.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;
using LocalPtr = std::shared_ptr<LocalRank>;

constexpr milliseconds kBeat{200};  // how often trainers see that the agent lives
constexpr std::uint64_t kFirstRoom = 4096;
constexpr int kSuspectAfter = 3;
constexpr std::chrono::seconds kRestoreEnds{10};  // once given up; longer than any of its waits

std::int64_t MonotonicNanos() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

RestoreView WordOf(Generation generation, RestoreState state, const SlotView& view) {
  return {.generation = generation,
          .state = state,
          .slot = view.slot,
          .slot_seq = view.seq,
          .step = view.step(),
          .message = {}};
}

class Service final : public TransferService {
 public:
  Service(const TransferOptions& options, ArenaHost* host, Listener* listener, ShardFiles* files)
      : options_(options),
        host_(host),
        listener_(listener),
        files_(files),
        traffic_(options.pacing),
        replicas_(options, host, listener, &jobs_, &traffic_, &relays_),
        pool_(std::max(1, options.push_threads)),
        upkeep_(options, host, listener, &jobs_, &traffic_, &pool_),
        maker_(options, host, listener, &jobs_, &traffic_, &replicas_) {}
  ~Service() override { Stop(); }

  Outcome Open() {
    auto server = PeerServer::Start({.bind_address = options_.bind_address,
                                     .port = options_.port,
                                     .max_connections = options_.max_connections,
                                     .limits = Limits()},
                                    &replicas_);
    if (!server.ok()) return server.error();
    server_ = std::move(server.value());
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    watch_ = std::thread([this] { Watch(); });
    upkeep_.Start([this] { return Jobs(); });
    return Done{};
  }

  std::uint16_t port() const override { return server_->port(); }
  void Begin(const JobId& job, Generation generation, const std::string& data_key) override;
  std::vector<HeldShard> Survey(const JobId& job) override { return upkeep_.Survey(job); }
  bool RestoreFailed(const JobId& job, Generation generation, Rank rank) const override;
  bool Activate(const Part& part, std::string* error) override;
  void MarkCommitted(const JobId& job, Generation generation, Step step) override;
  void MarkReleased(const JobId& job, Generation generation, Step step) override;
  void SetControllerAway(bool away) override;
  void Forget(const JobId& job) override;
  void KeeperGone() override;
  void Mend(const JobId& job, const HeldShard& shard, const std::string& source) override {
    upkeep_.Mend(job, shard, source);
  }
  void Make(const JobId& job, Generation generation, const ShardBuild& build) override {
    maker_.Make(job, generation, build, OwnAddress());
  }
  Traffic* traffic() override { return &traffic_; }
  ScrubReport scrubbed() const override { return upkeep_.report(); }
  void Stop() override;

 private:
  struct Job {
    Generation generation = 0;  // activated
    std::map<Rank, LocalPtr> locals;
    bool tidied = false;  // arenas of earlier generations are dropped
  };

  std::string OwnAddress() const {
    return fmt::format("{}:{}", options_.bind_address, server_->port());
  }
  PeerLimits Limits() const {
    return {.connect_timeout = options_.connect_timeout, .io_timeout = options_.io_timeout};
  }
  Result<LocalPtr> OpenLocal(const Part& part, const WorkerPart& worker);
  bool AwaitRestores(const Part& part, std::string* error);
  void StartRestore(const LocalPtr& local);
  void Restore(const LocalPtr& local);
  void Ask(const LocalPtr& local);
  void Answer(const LocalPtr& local, const SlotView& request);
  std::optional<SlotView> Bring(
      const LocalPtr& local, RestoreState word,
      const std::function<Result<SlotView>(const JobFacts& facts)>& bring);
  void Ready(const LocalPtr& local, const SlotView& view);
  void Holds(const LocalPtr& local, const std::optional<SlotView>& view);
  void Watch();
  void Look(const LocalPtr& local);
  void QueuePush(const LocalPtr& local);  // to all of its peers, now
  void QueuePush(const LocalPtr& local, std::size_t peer, milliseconds delay);
  void RunPush(const LocalPtr& local, std::size_t peer);
  std::optional<milliseconds> Push(const LocalPtr& local, PeerPush* peer);
  std::optional<SlotView> ToPush(const LocalRank& local, const PeerPush& peer) const;
  std::optional<CaptureUnderWay> ToFollow(const LocalRank& local, const PeerPush& peer);
  void Follow(const LocalPtr& local, PeerPush* peer, const PeerTask& task,
              const CaptureUnderWay& capture);
  void PushBegins(LocalRank* local, const SlotView& view);
  void PushEnds(LocalRank* local, PeerPush* peer, const SlotView& view, bool done);
  bool HoldsOf(const JobId& job, const ArenaName& name, Generation generation);
  void Tidy(const JobId& job, Generation generation, const std::set<Rank>& ranks);
  std::vector<LocalPtr> Locals() const;
  std::vector<JobId> Jobs() const;
  bool InPlace(const LocalPtr& local, const SlotView& view);
  void Wake() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_, &one, sizeof one);
  }

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  ShardFiles* const files_;
  JobTable jobs_;
  Traffic traffic_;
  RelayTable relays_;
  ReplicaStore replicas_;
  TaskPool pool_;
  Upkeep upkeep_;
  ShardMaker maker_;
  std::unique_ptr<PeerServer> server_;
  int wake_ = -1;
  std::thread watch_;
  std::atomic<int> following_{0};  // pool threads that follow captures

  mutable std::mutex mutex_;
  bool stopping_ = false;
  bool controller_away_ = false;
  std::map<JobId, Job> active_;
  std::set<std::pair<JobId, Rank>> restoring_;  // arenas that a restore writes to now
  std::condition_variable restore_ended_;
};

std::vector<LocalPtr> Service::Locals() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<LocalPtr> out;
  for (const auto& [id, job] : active_) {
    for (const auto& [rank, local] : job.locals) out.push_back(local);
  }
  return out;
}

std::vector<JobId> Service::Jobs() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<JobId> out;
  out.reserve(active_.size());
  for (const auto& [id, job] : active_) out.push_back(id);
  return out;
}

void Service::Begin(const JobId& job, Generation generation, const std::string& data_key) {
  jobs_.Begin(job, generation, data_key);
  maker_.End(job, generation);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = active_.find(job);
  if (it == active_.end() || it->second.generation >= generation) return;
  for (auto& [rank, local] : it->second.locals) {
    local->cancel = true;
    std::atomic<std::uint64_t>& fence = local->arena.header()->agent.fence_generation;
    if (fence.load() < generation) fence.store(generation, std::memory_order_release);
  }
  active_.erase(it);
}

bool Service::RestoreFailed(const JobId& job, Generation generation, Rank rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = active_.find(job);
  if (it == active_.end() || it->second.generation != generation) return false;
  const auto local = it->second.locals.find(rank);
  if (local == it->second.locals.end()) return false;
  const Arena& arena = local->second->arena;
  const RestoreView word = arena.Restore();
  if (word.generation != generation) return false;
  if (word.state == RestoreState::kFailed) return true;
  if (word.state != RestoreState::kReady || word.slot >= kSlots) return false;
  const auto view = arena.LookRestored(word.slot);
  return view && view->seq == word.slot_seq && arena.Damaged(*view);
}

Result<LocalPtr> Service::OpenLocal(const Part& part, const WorkerPart& worker) {
  const std::uint64_t room = std::max(worker.restore.bytes, kFirstRoom);
  auto fds = host_->Open(part.job, {.rank = worker.rank, .replica = false}, room);
  if (!fds.ok()) return fds.error();
  auto local = std::make_shared<LocalRank>();
  local->eventfd = fds.value().eventfd;
  const ArenaSpec blank{.job = part.job, .rank = worker.rank};
  auto arena = Arena::Open(fds.value().memfd, &blank);
  if (!arena.ok()) return arena.error();
  local->arena = std::move(arena.value());
  local->job = part.job;
  local->rank = worker.rank;
  local->generation = part.generation;
  local->peers.resize(part.peers.size());
  for (std::size_t i = 0; i < part.peers.size(); ++i) local->peers[i].address = part.peers[i];
  local->restore = worker.restore;
  return local;
}

// A restore that was given up looks up every MiB, and may be in the middle of one: it must not
// write into an arena that another generation's restore or trainer fills.
bool Service::AwaitRestores(const Part& part, std::string* error) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (const WorkerPart& worker : part.workers) {
    const bool ended = restore_ended_.wait_for(lock, kRestoreEnds, [&] {
      return !restoring_.contains({part.job, worker.rank});
    });
    if (ended) continue;
    *error = fmt::format("rank {} of job {}: the restore of an earlier generation does not end",
                         worker.rank, part.job);
    return false;
  }
  return true;
}

bool Service::Activate(const Part& part, std::string* error) {
  jobs_.Begin(part.job, part.generation, part.data_key);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = active_.find(part.job);
    if (it != active_.end()) {
      if (it->second.generation > part.generation) {
        *error = fmt::format("generation {} of job {} is over, {} is active", part.generation,
                             part.job, it->second.generation);
        return false;
      }
      for (auto& [rank, local] : it->second.locals) local->cancel = true;
      active_.erase(it);
    }
  }
  if (!AwaitRestores(part, error)) return false;
  upkeep_.GiveUp(part.job, part.given_up);
  Job job{.generation = part.generation};
  for (const WorkerPart& worker : part.workers) {
    auto opened = OpenLocal(part, worker);
    if (!opened.ok()) {
      *error = opened.error().message;
      return false;
    }
    const LocalPtr local = opened.value();
    ArenaHeader& header = *local->arena.header();
    // An agent before this one did all this. The fence does not tell: Begin has moved it already.
    const bool again = local->arena.Restore().generation == part.generation;
    for (SlotHeader& slot : header.slot) {
      slot.pushing_seq.store(0, std::memory_order_relaxed);
      if (!again) slot.replicated_seq.store(0, std::memory_order_relaxed);  // of an earlier peer
    }
    if (!again) header.agent.released_step.store(kNoStep);
    header.agent.has_peer.store(part.peers.empty() && !part.kept_by_parity ? 0 : 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      header.agent.controller_away.store(controller_away_ ? 1 : 0);
    }
    if (part.committed_step > header.agent.committed_step.load()) {
      header.agent.committed_step.store(part.committed_step);
    }
    header.agent.beat_ns.store(MonotonicNanos());
    KillPoint("switch.fencing");
    header.agent.fence_generation.store(part.generation, std::memory_order_release);
    KillPoint("switch.fenced");
    job.locals[worker.rank] = local;
  }
  std::vector<LocalPtr> started;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) {
      *error = "the agent is ending";
      return false;
    }
    for (const auto& [rank, local] : job.locals) started.push_back(local);
    active_[part.job] = std::move(job);
  }
  KillPoint("switch.arenas_opened");
  for (const LocalPtr& local : started) StartRestore(local);
  Wake();
  return true;
}

void Service::StartRestore(const LocalPtr& local) {
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
    pool_.Submit([this, local] { Ask(local); });
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
  pool_.Submit([this, local] { Restore(local); });
}

// What lies here already will do, but not when it was found damaged, or the plan sends the rank
// elsewhere for these very bytes and they are not whole.
bool Service::InPlace(const LocalPtr& local, const SlotView& view) {
  if (upkeep_.KnownDamaged(local->job, ToShard(view, false))) return false;
  if (local->restore.source_address.empty()) return true;
  auto mapped = Arena::Open(fcntl(local->arena.fd(), F_DUPFD_CLOEXEC, 0));
  return mapped.ok() && mapped.value().Verify(view).ok();
}

void Service::Ready(const LocalPtr& local, const SlotView& view) {
  upkeep_.Mended(local->job, ToShard(view, false));
  local->arena.SetRestore(WordOf(local->generation, RestoreState::kReady, view));
  KillPoint("restore.ready");
  local->restored = true;
  Holds(local, view);
}

// What the rank starts from is here, and goes to the peer until something newer is captured.
void Service::Holds(const LocalPtr& local, const std::optional<SlotView>& view) {
  // Word of its commit may have come before the bytes.
  const JobFacts facts = jobs_.Find(local->job).value_or(JobFacts{});
  if (facts.committed_step != kNoStep) {
    MarkSlots(local->arena, facts.committed_generation, facts.committed_step);
  }
  if (view && view->fields.generation != local->generation) {
    KillPoint("repair.restored_told");
    listener_->OnCopied(local->job, ToShard(*view, false));
  }
  QueuePush(local);
}

// Runs `bring`, which writes into the rank's arena, and says in its restore word what came of it:
// `word`, or that it failed. None: it failed, or was given up.
std::optional<SlotView> Service::Bring(
    const LocalPtr& local, RestoreState word,
    const std::function<Result<SlotView>(const JobFacts& facts)>& bring) {
  const auto arena = std::pair(local->job, local->rank);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (local->cancel) return std::nullopt;
    restoring_.insert(arena);
  }
  const auto view = bring(jobs_.Find(local->job).value_or(JobFacts{}));
  KillPoint("restore.brought");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    restoring_.erase(arena);
    restore_ended_.notify_all();
    if (local->cancel) return std::nullopt;
    // Before anybody can give it up: the word is this generation's.
    local->arena.SetRestore(view.ok() ? WordOf(local->generation, word, view.value())
                                      : RestoreView{.generation = local->generation,
                                                    .state = RestoreState::kFailed,
                                                    .step = local->restore.step,
                                                    .message = view.error().message});
  }
  if (view.ok()) return view.value();
  listener_->OnTrouble(local->job,
                       fmt::format("restoring rank {}: {}", local->rank, view.error().message));
  return std::nullopt;
}

void Service::Restore(const LocalPtr& local) {
  Arena memory;
  const auto view = Bring(local, RestoreState::kReady, [&](const JobFacts& facts) {
    return BringRestore(options_, host_, facts, *local, server_->port(), &relays_, &memory);
  });
  if (!view) return;
  local->restored = true;
  Holds(local, *view);
}

// A restore by ranges, first half: the trainer is told what there is.
void Service::Ask(const LocalPtr& local) {
  const auto catalog = Bring(local, RestoreState::kAsk, [&](const JobFacts& facts) {
    const RangeSources sources{options_, host_, files_, facts, OwnAddress()};
    return BringCatalog(sources, *local, &local->tiers);
  });
  if (!catalog) return;
  local->asked_slot = catalog->slot;
  local->asked_seq = catalog->seq;
  local->restored = true;  // who starts from nothing all the same may capture
}

// The second half: it has said what it wants.
void Service::Answer(const LocalPtr& local, const SlotView& request) {
  Arena memory;
  const auto view = Bring(local, RestoreState::kReady, [&](const JobFacts& facts) {
    const RangeSources sources{options_, host_, files_, facts, OwnAddress()};
    return BringRanges(sources, *local, request, local->tiers, &memory);
  });
  if (!view) return;
  local->restored = true;
  Holds(local, *view);
  Wake();  // it counts as captured by this generation
}

void Service::Watch() {
  for (;;) {
    std::vector<LocalPtr> locals = Locals();
    std::vector<pollfd> fds{{wake_, POLLIN, 0}};
    for (const LocalPtr& local : locals) fds.push_back({local->eventfd, POLLIN, 0});
    poll(fds.data(), fds.size(), static_cast<int>(kBeat.count()));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
    }
    std::uint64_t count;
    for (const pollfd& fd : fds) {
      if ((fd.revents & POLLIN) != 0) {
        [[maybe_unused]] const ssize_t n = read(fd.fd, &count, sizeof count);
      }
    }
    const std::int64_t now = MonotonicNanos();
    for (const LocalPtr& local : locals) {
      local->arena.header()->agent.beat_ns.store(now, std::memory_order_relaxed);
      if (!local->cancel) Look(local);
    }
  }
}

// Level-triggered: whatever rang or not, says what is new in the arena.
void Service::Look(const LocalPtr& local) {
  if (const std::uint64_t asked = local->asked_seq; asked != 0) {
    const auto request = local->arena.LookExchange(local->asked_slot, kFlagRequest);
    if (request && request->seq > asked && request->fields.generation == local->generation) {
      local->asked_seq = 0;
      local->arena.SetRestore({.generation = local->generation,
                               .state = RestoreState::kPending,
                               .step = local->restore.step});
      pool_.Submit([this, local, request] { Answer(local, *request); });
      return;
    }
  }
  for (std::uint32_t i = 0; i < kSlots && local->restored; ++i) {
    const auto capture = LookCapture(local->arena, i);
    if (!capture || capture->id == local->seen_capture[i] ||
        capture->view.fields.generation != local->generation ||
        capture->view.fields.payload_bytes < options_.ahead_bytes) {
      continue;
    }
    local->seen_capture[i] = capture->id;
    QueuePush(local);
  }
  const ArenaHeader& header = *local->arena.header();
  const auto view = local->arena.Newest();
  Step step = local->seen_step;
  if (header.trainer.generation.load() == local->generation) {
    step = std::max(step, header.trainer.step.load());
  }
  const bool fresh = view && view->fields.generation == local->generation &&
                     view->content() != local->seen_content && view->fields.rank == local->rank;
  if (fresh) step = std::max(step, view->step());
  if (step > local->seen_step) {
    local->seen_step = step;
    listener_->OnCaptured(local->job, local->generation, local->rank, step);
  }
  if (!fresh) return;
  KillPoint("push.capture_seen");
  local->seen_content = view->content();
  if (view->step() > local->restore.step) {  // trained, not put together by a restore
    traffic_.OnStep(local->job, local->generation, local->rank, view->step(),
                    static_cast<std::int64_t>(view->fields.captured_ns),
                    header.trainer.waited_ns.load(std::memory_order_relaxed));
  }
  listener_->OnCopied(local->job, ToShard(*view, false));
  KillPoint("push.capture_told");
  QueuePush(local);
}

void Service::QueuePush(const LocalPtr& local) {
  for (std::size_t i = 0; i < local->peers.size(); ++i) QueuePush(local, i, milliseconds(0));
}

void Service::QueuePush(const LocalPtr& local, std::size_t peer, milliseconds delay) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    PeerPush& push = local->peers[peer];
    if (push.running) push.again = true;
    if (push.running || push.queued) return;
    push.queued = true;
  }
  pool_.Submit([this, local, peer] { RunPush(local, peer); }, delay);
}

void Service::RunPush(const LocalPtr& local, std::size_t peer) {
  PeerPush& push = local->peers[peer];
  {
    std::lock_guard<std::mutex> lock(mutex_);
    push.queued = false;
    push.running = true;
    push.again = false;
  }
  const std::optional<milliseconds> retry = Push(local, &push);
  bool again;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    push.running = false;
    again = push.again;
  }
  if (local->cancel) return;
  if (retry || again) QueuePush(local, peer, retry.value_or(milliseconds(0)));
}

// The newest capture of the generation; before there is one, what the rank was restored from.
std::optional<SlotView> Service::ToPush(const LocalRank& local, const PeerPush& peer) const {
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
  std::lock_guard<std::mutex> lock(mutex_);
  if (peer.has_content == best->content()) return std::nullopt;
  return best;
}

void Service::PushBegins(LocalRank* local, const SlotView& view) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++local->pushing[view.slot];
  local->arena.header()->slot[view.slot].pushing_seq.store(view.seq, std::memory_order_release);
}

// A content that every peer has verified is replicated; one that no push carries any more may go.
void Service::PushEnds(LocalRank* local, PeerPush* peer, const SlotView& view, bool done) {
  std::lock_guard<std::mutex> lock(mutex_);
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
std::optional<CaptureUnderWay> Service::ToFollow(const LocalRank& local, const PeerPush& peer) {
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
void Service::Follow(const LocalPtr& local, PeerPush* peer, const PeerTask& task,
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
std::optional<milliseconds> Service::Push(const LocalPtr& local, PeerPush* peer) {
  const auto view = ToPush(*local, *peer);
  if (local->cancel || !local->restored) return std::nullopt;
  const auto capture = view ? std::nullopt : ToFollow(*local, *peer);
  if (!view && !capture) return std::nullopt;
  const JobFacts facts = jobs_.Find(local->job).value_or(JobFacts{});
  if (!peer->sending.open()) {
    auto mapped = Arena::Open(fcntl(local->arena.fd(), F_DUPFD_CLOEXEC, 0));
    if (!mapped.ok()) return options_.retry_last;  // no descriptor is free
    peer->sending = std::move(mapped.value());
  }
  const bool restored = view && view->fields.generation != local->generation;
  const PeerTask task{.address = peer->address,
                      .job = local->job,
                      .key = facts.key,
                      .generation = local->generation,
                      .committed_generation = facts.committed_generation,
                      .committed_step = facts.committed_step,
                      .limits = Limits(),
                      .cancel = &local->cancel,
                      .streams = options_.streams,
                      .traffic_class = restored ? TrafficClass::kRepair : TrafficClass::kCommit,
                      .traffic = &traffic_};
  if (capture) {
    Follow(local, peer, task, *capture);
    return std::nullopt;
  }
  PushBegins(local.get(), *view);
  KillPoint("push.marked");
  PushReport report;
  const auto began = MonotonicNanos();
  const auto pushed = PushSlot(task, &peer->sending, *view, &report);
  if (pushed.ok() || !local->cancel) {
    traffic_.Pushed(pushed.ok() ? PeerOutcome::kDone : OutcomeOf(pushed.error()),
                    static_cast<double>(MonotonicNanos() - began) / 1e9, report.unchanged_bytes,
                    report.resumed_bytes);
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
  if (local->cancel) return std::nullopt;
  const Error& error = pushed.error();
  if (!local->arena.Current(*view)) return milliseconds(0);  // a newer one has come
  peer->corrupt = error.code == ErrorCode::kCorrupt ? peer->corrupt + 1 : 0;
  if (peer->corrupt == kSuspectAfter) {  // not the wire, then
    if (const auto chunk = FirstDamage(&peer->sending, *view)) {
      upkeep_.Damaged(local->job, ToShard(*view, false), *chunk, "push");
    }
  }
  const bool hopeless = error.code == ErrorCode::kStale || error.code == ErrorCode::kNoMemory ||
                        peer->corrupt >= kSuspectAfter;
  if (hopeless) peer->gave_up_content = view->content();
  if (hopeless || !peer->troubled) {
    peer->troubled = true;
    listener_->OnTrouble(
        local->job,
        fmt::format("pushing step {} of rank {}: {}{}", view->step(), local->rank, error.message,
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

void Service::MarkCommitted(const JobId& job, Generation generation, Step step) {
  jobs_.Committed(job, generation, step);
  KillPoint("commit.noted");
  replicas_.MarkCommitted(job, generation, step);
  std::set<Rank> ranks;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = active_.find(job);
    if (it == active_.end()) return;
    for (auto& [rank, local] : it->second.locals) {
      MarkSlots(local->arena, generation, step);
      ranks.insert(rank);
    }
    KillPoint("commit.marked");
    if (it->second.tidied || it->second.generation != generation) return;
    it->second.tidied = true;
  }
  pool_.Submit([this, job, generation, ranks] { Tidy(job, generation, ranks); });
}

void Service::MarkReleased(const JobId& job, Generation generation, Step step) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = active_.find(job);
  if (it == active_.end()) return;
  for (auto& [rank, local] : it->second.locals) {
    ArenaHeader& header = *local->arena.header();
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = local->arena.Look(i);
      if (view && view->fields.generation == generation && view->step() <= step) {
        header.slot[i].released_seq.store(view->seq, std::memory_order_release);
      }
    }
    // A slower rank may come to a released step after this.
    if (generation == local->generation && step > header.agent.released_step.load()) {
      header.agent.released_step.store(step, std::memory_order_release);
    }
  }
}

// What an agent before this one received of the generation.
bool Service::HoldsOf(const JobId& job, const ArenaName& name, Generation generation) {
  const auto arena = OpenHeld(host_, job, name);
  for (std::uint32_t i = 0; i < kSlots && arena.ok(); ++i) {
    const auto view = arena.value().Look(i);
    if (view && view->fields.generation == generation) return true;
  }
  return false;
}

// A step of this generation is committed: whatever earlier memberships left here is surplus.
void Service::Tidy(const JobId& job, Generation generation, const std::set<Rank>& ranks) {
  auto names = host_->List(job);
  if (!names.ok()) return;
  const std::set<Rank> received = replicas_.Received(job, generation);
  for (const ArenaName& name : names.value()) {
    if (name.replica ? received.count(name.rank) != 0 || HoldsOf(job, name, generation)
                     : ranks.count(name.rank) != 0) {
      continue;
    }
    if (jobs_.Find(job).value_or(JobFacts{}).generation != generation) return;  // things changed
    if (name.replica) replicas_.Drop(job, name.rank);
    host_->Drop(job, name);
    KillPoint("repair.surplus_dropped");
  }
}

void Service::SetControllerAway(bool away) {
  std::lock_guard<std::mutex> lock(mutex_);
  controller_away_ = away;
  for (auto& [id, job] : active_) {
    for (auto& [rank, local] : job.locals) {
      local->arena.header()->agent.controller_away.store(away ? 1 : 0);
    }
  }
}

void Service::Forget(const JobId& job) {
  jobs_.Erase(job);
  maker_.End(job, UINT64_MAX);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (const auto it = active_.find(job); it != active_.end()) {
      for (auto& [rank, local] : it->second.locals) local->cancel = true;
      active_.erase(it);
    }
  }
  replicas_.Forget(job);
  traffic_.Forget(job);
  Wake();
}

void Service::KeeperGone() {
  maker_.EndAll();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [id, job] : active_) {
      for (auto& [rank, local] : job.locals) local->cancel = true;
    }
    active_.clear();
  }
  replicas_.Clear();
  Wake();
}

void Service::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    for (auto& [id, job] : active_) {
      for (auto& [rank, local] : job.locals) local->cancel = true;
    }
  }
  upkeep_.Stop();
  if (watch_.joinable()) {
    Wake();
    watch_.join();
  }
  if (server_ != nullptr) server_->Stop();
  maker_.Stop();
  pool_.Stop();
  if (wake_ >= 0) close(wake_);
  wake_ = -1;
}

}  // namespace

Result<std::unique_ptr<TransferService>> TransferService::Start(const TransferOptions& options,
                                                                ArenaHost* host, Listener* listener,
                                                                ShardFiles* files) {
  auto service = std::make_unique<Service>(options, host, listener, files);
  if (auto ok = service->Open(); !ok.ok()) return ok.error();
  return std::unique_ptr<TransferService>(std::move(service));
}

}  // namespace everstep::checkpoint
