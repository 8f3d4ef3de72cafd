#include "checkpoint/transfer/transfer_service.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "checkpoint/store/capture_word.h"
#include "checkpoint/transfer/held_arenas.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/peer_server.h"
#include "checkpoint/transfer/peer_task.h"
#include "checkpoint/transfer/replica_store.h"
#include "checkpoint/transfer/replicator.h"
#include "checkpoint/transfer/restores.h"
#include "checkpoint/transfer/shard_maker.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/upkeep.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kBeat{200};  // how often trainers see that the agent lives
constexpr std::uint64_t kFirstRoom = 4096;

std::int64_t MonotonicNanos() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class Service final : public TransferService {
 public:
  Service(const TransferOptions& options, ArenaHost* host, Listener* listener, ShardFiles* files)
      : options_(options),
        host_(host),
        listener_(listener),
        traffic_(options.pacing),
        replicas_(options, host, listener, &jobs_, &traffic_, &relays_),
        pool_(std::max(1, options.push_threads)),
        upkeep_(options, host, listener, &jobs_, &traffic_, &pool_),
        replicator_(options, listener, &jobs_, &traffic_, &pool_, &upkeep_),
        restores_(options, host, listener, files, &jobs_, &relays_, &pool_, &upkeep_, &replicator_,
                  [this] { Wake(); }),
        maker_(options, host, listener, &jobs_, &traffic_, &replicas_) {}
  ~Service() override { Stop(); }

  Outcome Open() {
    auto server = PeerServer::Start({.bind_address = options_.bind_address,
                                     .port = options_.port,
                                     .max_connections = options_.max_connections,
                                     .limits = LimitsOf(options_)},
                                    &replicas_);
    if (!server.ok()) return server.error();
    server_ = std::move(server.value());
    restores_.SetOwn(OwnAddress(), server_->port());
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
  Result<LocalPtr> OpenLocal(const Part& part, const WorkerPart& worker);
  void Watch();
  void Look(const LocalPtr& local);
  bool HoldsOf(const JobId& job, const ArenaName& name, Generation generation);
  void Tidy(const JobId& job, Generation generation, const std::set<Rank>& ranks);
  std::vector<LocalPtr> Locals() const;
  std::vector<JobId> Jobs() const;
  void Wake() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_, &one, sizeof one);
  }

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  JobTable jobs_;
  Traffic traffic_;
  RelayTable relays_;
  ReplicaStore replicas_;
  TaskPool pool_;
  Upkeep upkeep_;
  Replicator replicator_;
  Restores restores_;
  ShardMaker maker_;
  std::unique_ptr<PeerServer> server_;
  int wake_ = -1;
  std::thread watch_;

  mutable std::mutex mutex_;
  bool stopping_ = false;
  bool controller_away_ = false;
  std::map<JobId, Job> active_;
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
    local->GiveUp();
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
      for (auto& [rank, local] : it->second.locals) local->GiveUp();
      active_.erase(it);
    }
  }
  if (!restores_.Await(part, error)) return false;
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
  for (const LocalPtr& local : started) restores_.Start(local);
  Wake();
  return true;
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
  if (restores_.LookForAnswer(local)) return;
  for (std::uint32_t i = 0; i < kSlots && local->restored; ++i) {
    const auto capture = LookCapture(local->arena, i);
    if (!capture || capture->id == local->seen_capture[i] ||
        capture->view.fields.generation != local->generation ||
        capture->view.fields.payload_bytes < options_.ahead_bytes) {
      continue;
    }
    local->seen_capture[i] = capture->id;
    replicator_.QueuePush(local);
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
  replicator_.QueuePush(local);
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
      for (auto& [rank, local] : it->second.locals) local->GiveUp();
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
      for (auto& [rank, local] : job.locals) local->GiveUp();
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
    replicator_.Stop();
    for (auto& [id, job] : active_) {
      for (auto& [rank, local] : job.locals) local->GiveUp();
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
