#include "controller/server/brain.h"

#include <algorithm>
#include <utility>

#include "controller/server/convert.h"
#include "controller/server/memory.h"
#include "controller/store/convert.h"
#include "proto/base/kill_point.h"
#include "proto/base/log.h"

namespace everstep::controller {
namespace {

constexpr Duration kRound =
    Seconds(1);  // the loop comes round at least so often: /healthz looks at it
constexpr std::size_t kManyCommands = 64;
constexpr Duration kTrimAfter = Seconds(2);
constexpr Duration kWakeupAge = Milliseconds(50);

LogLevel LevelOf(Severity severity) {
  switch (severity) {
    case Severity::kInfo: return LogLevel::kInfo;
    case Severity::kWarning: return LogLevel::kWarning;
    case Severity::kError: return LogLevel::kError;
  }
  return LogLevel::kInfo;
}

void LogJournal(const JournalRecord& r) {
  Log(LevelOf(r.severity), r.type,
      {{"seq", r.sequence},
       {"reason", ReasonName(r.reason)},
       {"job", r.job},
       {"node", r.node},
       {"rank", r.rank},
       {"generation", r.generation},
       {"message", r.message},
       {"evidence", r.evidence}});
}

}  // namespace

Brain::Brain(const Config& config, std::unique_ptr<RecordStore> store, const Clock* clock)
    : config_(config),
      store_(std::move(store)),
      clock_(clock),
      controller_(config.core),
      mailbox_(config.mailbox),
      round_ns_(clock->Now().ns),
      here_(ReadHere()) {
  watch_ =
      std::make_unique<ProcessWatch>([this](std::uint64_t session) { Push(KeeperDead{session}); });
}

Brain::~Brain() {
  watch_.reset();
}

StoreStatus Brain::Recover(const v1::StoreSnapshot* snapshot,
                           const std::vector<NodeId>& known_dead) {
  std::vector<Record> records;
  StoreStatus status = store_->Load(&records);
  if (!status.ok()) return status;
  const bool fresh = std::none_of(records.begin(), records.end(), [](const Record& r) {
    return !std::holds_alternative<JournalRecord>(r);
  });
  if (snapshot != nullptr && fresh) {
    records.clear();
    if (!FromSnapshot(*snapshot, &records)) {
      return {StoreCode::kCorrupt, "the snapshot holds a record this version does not understand"};
    }
    status = store_->Write(records, {});
    if (!status.ok()) return status;
  }
  LogInfo("recovered", {{"records", static_cast<std::uint64_t>(records.size())},
                        {"starts", store_->info().starts},
                        {"from_snapshot", snapshot != nullptr && fresh}});
  Decisions decisions;
  controller_.Recover(clock_->Now(), records, &decisions);
  if (!decisions.empty()) pending_.push_back(std::move(decisions));
  for (const NodeId& node : known_dead) {
    const auto it = state().nodes.find(node);
    if (it != state().nodes.end()) {
      Step(NodeProcessDead{node, it->second.record.incarnation,
                           "known dead at the controller's start"});
    }
  }
  return Commit() ? StoreStatus{} : failure_;
}

StoreStatus Brain::Run() {
  while (!stop_) {
    const Timestamp now = clock_->Now();
    round_ns_ = now.ns;
    const Duration left = std::clamp(Deadline() - now, Duration{0}, kRound);
    std::vector<Item> items = mailbox_.PopAll(std::chrono::steady_clock::now() + left);
    for (Item& item : items) {
      // What a task reads and answers must be durable; everything else shares one batch.
      if (std::holds_alternative<Task>(item) && !Commit()) return failure_;
      std::visit([this](auto& i) { Take(i); }, item);
    }
    if (Wakeup() <= clock_->Now()) Step(Tick{});
    if (!Commit()) return failure_;
    TellFollowers(clock_->Now());
    EndTails(clock_->Now());
    if (trim_at_.ns != 0 && clock_->Now() >= trim_at_) {
      trim_at_ = {};
      GiveBackMemory();
    }
  }
  End();
  return failure_;
}

void Brain::End() {
  // Writers stopped at Close(); what they left is taken in: each task finishes somebody's call.
  for (Item& item : mailbox_.PopAll(std::chrono::steady_clock::now())) {
    if (std::holds_alternative<Task>(item) && !Commit()) return;
    std::visit([this](auto& i) { Take(i); }, item);
  }
  if (!Commit()) return;
  for (auto& [id, answer] : requests_) answer(nullptr);
  requests_.clear();
  for (auto& [node, bound] : bound_) {
    if (bound.stream) bound.stream->Close(AgentStream::Why::kShutdown, "the controller ends");
  }
}

void Brain::Stop() {
  stop_ = true;
  mailbox_.Close();
}

Duration Brain::silence() const {
  return clock_->Now() - Timestamp{round_ns_.load()};
}

Timestamp Brain::Wakeup() {
  // NextWakeup looks at every node, and a heartbeat moves it into the future (or, as a lease calms
  // down, nearer by a sixteenth at most): the answer of a moment ago will do.
  const Timestamp now = clock_->Now();
  if (wakeup_stale_ || wakeup_ <= now || now - wakeup_asked_ > kWakeupAge) {
    wakeup_ = controller_.NextWakeup().value_or(now + Seconds(3600));
    wakeup_asked_ = now;
    wakeup_stale_ = false;
  }
  return wakeup_;
}

Timestamp Brain::Deadline() {
  Timestamp at = Wakeup();
  if (!followers_.empty()) at = std::min(at, followers_at_);
  for (const auto& [id, tail] : tails_) {
    if (tail.end_at.ns != 0) at = std::min(at, tail.end_at);
  }
  return at;
}

bool Brain::Push(Item item) {
  if (mailbox_.Push(std::move(item))) return true;
  ++counters_.mailbox_refused;
  return false;
}

bool Brain::Post(Task task) {
  return Push(std::move(task));
}
bool Brain::PostRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream,
                         v1::Register message) {
  return Push(Register{session, std::move(stream), std::move(message)});
}
bool Brain::PostClosed(std::uint64_t session, std::string evidence) {
  return Push(Closed{session, std::move(evidence)});
}
bool Brain::PostReport(std::uint64_t session, v1::AgentMessage message) {
  return Push(Report{session, std::move(message)});
}

void Brain::Step(const Event& event) {
  ++counters_.events;
  const std::int64_t began = MonotonicNanos();
  Decisions decisions;
  controller_.Step(clock_->Now(), event, &decisions);
  counters_.decision.Observe(Duration(MonotonicNanos() - began));
  if (!std::holds_alternative<Heartbeat>(event)) wakeup_stale_ = true;
  if (!decisions.empty()) pending_.push_back(std::move(decisions));
}

bool Brain::Commit() {
  if (!failure_.ok()) return false;
  // Carrying out may decide more (a stream that broke while it was let in): until nothing is left.
  while (!pending_.empty()) {
    std::vector<Decisions> batch;
    batch.swap(pending_);
    std::vector<Record> records;
    std::vector<Deletion> deletions;
    for (Decisions& d : batch) {
      // All records, then all deletions: an earlier deletion must not swallow a later record of
      // that key.
      if (!deletions.empty()) {
        for (const Record& record : d.records) {
          const RecordKey key = KeyOf(record);
          std::erase_if(deletions, [&](const Deletion& deletion) {
            return deletion.table == key.table && deletion.key == key.key;
          });
        }
      }
      records.insert(records.end(), d.records.begin(), d.records.end());
      deletions.insert(deletions.end(), d.deletions.begin(), d.deletions.end());
      if (std::any_of(d.records.begin(), d.records.end(),
                      [](const Record& r) { return !std::holds_alternative<JournalRecord>(r); })) {
        ++durable_version_;
      }
    }
    if (!records.empty() || !deletions.empty()) {
      const std::int64_t began = MonotonicNanos();
      if (config_.room) failure_ = config_.room();
      KillPoint("store.writing");
      if (failure_.ok()) failure_ = store_->Write(records, deletions);
      if (!failure_.ok()) {
        LogError("store_failed",
                 {{"code", StoreCodeName(failure_.code)}, {"message", failure_.message}});
        return false;
      }
      counters_.store_write.Observe(Duration(MonotonicNanos() - began));
      counters_.records += records.size();
    }
    KillPoint("store.written");
    for (Decisions& d : batch) CarryOut(d);
  }
  if (!changed_.empty()) TellFollowers(clock_->Now());
  return true;
}

void Brain::CarryOut(Decisions& decisions) {
  for (const Record& record : decisions.records) {
    if (const auto* line = std::get_if<JournalRecord>(&record)) {
      LogJournal(*line);
      TellWatchers(*line);
      if (!line->job.empty()) changed_.insert(line->job);
    } else if (const auto* job = std::get_if<JobRecord>(&record)) {
      changed_.insert(job->spec.job);
    } else if (const auto* plan = std::get_if<GenerationRecord>(&record)) {
      changed_.insert(plan->plan.job);
      KillPoint("switch.stored");
    } else if (const auto* commit = std::get_if<CommitRecord>(&record)) {
      changed_.insert(commit->job);
      KillPoint("commit.stored");
    } else if (const auto* ledger = std::get_if<LedgerRecord>(&record)) {
      changed_.insert(ledger->job);
    }
  }
  for (const NodeId& node : decisions.close_sessions) Fence(node);
  // A switch of a large job fills many queues for a moment; the allocator would keep that memory.
  if (decisions.commands.size() >= kManyCommands) trim_at_ = clock_->Now() + kTrimAfter;
  PlanNumbers numbers;
  for (const Command& command : decisions.commands) {
    if (const auto* registered = std::get_if<RegisteredCommand>(&command.body))
      Bind(command, *registered);
    const auto it = bound_.find(command.node);
    if (it == bound_.end() || it->second.incarnation != command.incarnation) continue;
    v1::ControllerMessage message = ToWire(command, &numbers);
    if (message.has_registered()) message.mutable_registered()->set_cluster(store_->info().cluster);
    // Before the workers are forked, so that the agent sends their first lines, too.
    if (message.has_activate()) TailsOf(command.node, message.activate().job());
    const bool registration = message.has_registered();
    SendTo(command.node, std::move(message));
    KillPoint("store.command_sent");
    if (registration) TailsOf(command.node, JobId());
  }
  for (const Reply& reply : decisions.replies) {
    const auto it = requests_.find(reply.request);
    if (it == requests_.end()) continue;
    it->second(&reply);
    requests_.erase(it);
  }
}

void Brain::Request(const std::function<Event(RequestId)>& make,
                    std::function<void(const Reply*)> answer) {
  const RequestId id = ++last_request_;
  requests_[id] = std::move(answer);
  Step(make(id));
}

}  // namespace everstep::controller
