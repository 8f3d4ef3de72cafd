#include "controller/server/brain.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/server/convert.h"
#include "controller/server/status.h"
#include "controller/store/convert.h"
#include "proto/base/log.h"

namespace everstep::controller {
namespace {

constexpr Duration kFollowInterval = Milliseconds(200);
constexpr Duration kIdle = Seconds(3600);
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

Brain::Brain(Config config, std::unique_ptr<RecordStore> store, const Clock* clock)
    : config_(config), store_(std::move(store)), clock_(clock), controller_(config.core),
      mailbox_(config.mailbox), here_(ReadHere()) {
  watch_ = std::make_unique<ProcessWatch>(
      [this](std::uint64_t session) { Post([this, session] { OnKeeperDead(session); }); });
}

Brain::~Brain() { watch_.reset(); }

StoreStatus Brain::Recover(const v1::StoreSnapshot* snapshot, const std::vector<NodeId>& known_dead) {
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
  pending_.push_back(std::move(decisions));
  for (const NodeId& node : known_dead) {
    const auto it = state().nodes.find(node);
    if (it != state().nodes.end()) {
      Step(NodeProcessDead{node, it->second.record.incarnation, "known dead at the controller's start"});
    }
  }
  return Commit() ? StoreStatus{} : failure_;
}

StoreStatus Brain::Run() {
  while (!stop_) {
    const Duration left = std::clamp(Deadline() - clock_->Now(), Duration{0}, kIdle);
    std::vector<Item> items = mailbox_.PopAll(std::chrono::steady_clock::now() + left);
    for (Item& item : items) {
      if (Event* event = std::get_if<Event>(&item)) {
        Step(*event);
      } else {
        if (!Commit()) return failure_;  // what a task reads and answers is durable
        std::get<std::function<void()>>(item)();
      }
    }
    if (Wakeup() <= clock_->Now()) Step(Tick{});
    if (!Commit()) return failure_;
    TellFollowers(false);
  }
  for (auto& [node, bound] : bound_) {
    if (bound.stream) bound.stream->Close(AgentStream::Why::kShutdown, "the controller ends");
  }
  return {};
}

void Brain::Stop() {
  stop_ = true;
  mailbox_.Close();
}

Timestamp Brain::Wakeup() {
  // NextWakeup looks at every node, and a heartbeat only ever moves it into the future: then an answer of
  // a moment ago is at worst too early.
  const Timestamp now = clock_->Now();
  if (wakeup_stale_ || wakeup_ <= now || now - wakeup_asked_ > kWakeupAge) {
    wakeup_ = controller_.NextWakeup().value_or(now + kIdle);
    wakeup_asked_ = now;
    wakeup_stale_ = false;
  }
  return wakeup_;
}

Timestamp Brain::Deadline() {
  Timestamp at = Wakeup();
  if (!followers_.empty()) at = std::min(at, followers_at_);
  return at;
}

bool Brain::Post(std::function<void()> task) { return mailbox_.Push(std::move(task)); }
bool Brain::PostEvent(Event event) { return mailbox_.Push(std::move(event)); }

bool Brain::PostRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream,
                         v1::Register message) {
  auto shared = std::make_shared<v1::Register>(std::move(message));
  return Post([this, session, stream = std::move(stream), shared]() mutable {
    OnRegister(session, std::move(stream), std::move(*shared));
  });
}

bool Brain::PostClosed(std::uint64_t session, std::string evidence) {
  return Post([this, session, evidence = std::move(evidence)] { OnClosed(session, evidence); });
}

bool Brain::PostReport(std::uint64_t session, v1::AgentMessage message) {
  auto shared = std::make_shared<v1::AgentMessage>(std::move(message));
  return Post([this, session, shared] { OnReport(session, *shared); });
}

void Brain::Step(const Event& event) {
  ++events_;
  Decisions decisions;
  controller_.Step(clock_->Now(), event, &decisions);
  if (!std::holds_alternative<Heartbeat>(event)) wakeup_stale_ = true;
  if (!decisions.empty()) pending_.push_back(std::move(decisions));
}

bool Brain::Commit() {
  if (!failure_.ok()) return false;
  // Carrying out may decide more (a refused stream): until nothing is left.
  while (!pending_.empty()) {
    std::vector<Decisions> batch;
    batch.swap(pending_);
    std::vector<Record> records;
    std::vector<Deletion> deletions;
    for (Decisions& d : batch) {
      // All records, then all deletions: an earlier deletion must not swallow a later record of that key.
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
    }
    if (!records.empty() || !deletions.empty()) {
      const std::int64_t began = MonotonicNanos();
      failure_ = store_->Write(records, deletions);
      if (!failure_.ok()) {
        LogError("store_failed", {{"code", StoreCodeName(failure_.code)}, {"message", failure_.message}});
        return false;
      }
      ++batches_;
      batch_nanos_ += static_cast<std::uint64_t>(MonotonicNanos() - began);
    }
    for (Decisions& d : batch) CarryOut(d);
  }
  if (!changed_.empty()) TellFollowers(false);
  return true;
}

void Brain::CarryOut(Decisions& decisions) {
  for (const Record& record : decisions.records) {
    if (const auto* line = std::get_if<JournalRecord>(&record)) {
      LogJournal(*line);
      std::erase_if(watchers_, [&](const EventSink& sink) { return !sink(*line); });
      if (!line->job.empty()) changed_.insert(line->job);
    } else if (const auto* job = std::get_if<JobRecord>(&record)) {
      changed_.insert(job->spec.job);
    } else if (const auto* plan = std::get_if<GenerationRecord>(&record)) {
      changed_.insert(plan->plan.job);
    }
  }
  for (const NodeId& node : decisions.close_sessions) {
    const auto it = bound_.find(node);
    if (it == bound_.end() || !it->second.stream) continue;
    it->second.stream->Close(AgentStream::Why::kFenced,
                             fmt::format("registration {} of node {} is over: the node was taken for lost "
                                         "or a newer one came",
                                         it->second.incarnation, node));
    sessions_.erase(it->second.session);
    watch_->Forget(it->second.session);
    it->second.stream.reset();
  }
  for (const Command& command : decisions.commands) {
    if (const auto* registered = std::get_if<RegisteredCommand>(&command.body)) Bind(command, *registered);
    const auto it = bound_.find(command.node);
    if (it == bound_.end() || it->second.incarnation != command.incarnation) continue;
    v1::ControllerMessage message = ToWire(command);
    if (message.has_registered()) message.mutable_registered()->set_cluster(store_->info().cluster);
    SendTo(command.node, std::move(message));
  }
  for (const Reply& reply : decisions.replies) {
    const auto it = requests_.find(reply.request);
    if (it == requests_.end()) continue;
    it->second(reply);
    requests_.erase(it);
  }
}

void Brain::Bind(const Command& command, const RegisteredCommand& registered) {
  const auto it = registering_.find(registered.session);
  if (it == registering_.end()) return;  // its stream broke meanwhile
  Bound& bound = bound_[command.node];
  if (bound.stream) {
    sessions_.erase(bound.session);
    watch_->Forget(bound.session);
    bound.stream->Close(AgentStream::Why::kFenced, "a newer registration of this node came");
  }
  bound = Bound{registered.session, command.incarnation, std::move(it->second.stream), 0,
                std::move(it->second.facts), false};
  registering_.erase(it);
  sessions_[registered.session] = command.node;
  if (bound.facts.boot_id() == here_.boot_id && bound.facts.pid_namespace() == here_.pid_namespace) {
    watch_->Watch(bound.session, bound.facts.keeper_pid(), bound.facts.keeper_start_time());
  }
}

bool Brain::SendTo(const NodeId& node, v1::ControllerMessage message) {
  const auto it = bound_.find(node);
  if (it == bound_.end() || !it->second.stream) return false;
  message.set_incarnation(it->second.incarnation);
  message.set_sequence(++it->second.sequence);
  it->second.stream->Send(std::move(message));
  return true;
}

void Brain::OnRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream,
                       v1::Register message) {
  const NodeId node = message.node();
  NodeRegistered event = FromWire(message, session);
  registering_[session] = {stream, std::move(message)};
  Step(event);
  if (!Commit()) return;
  // No RegisteredCommand claimed it: refused.
  const auto left = registering_.find(session);
  if (left == registering_.end()) return;
  registering_.erase(left);
  const bool known = state().nodes.contains(node);
  stream->Close(AgentStream::Why::kRefused,
                known ? fmt::format("node {} was not let in", node)
                      : fmt::format("node {} is one too many: this controller takes {}\nhint: start another "
                                    "controller, or remove nodes",
                                    node, config_.core.max_nodes));
}

void Brain::OnClosed(std::uint64_t session, const std::string& evidence) {
  registering_.erase(session);
  const auto it = sessions_.find(session);
  if (it == sessions_.end()) return;  // fenced before
  Bound& bound = bound_.at(it->second);
  const NodeId node = it->second;
  sessions_.erase(it);
  bound.stream.reset();
  Step(SessionClosed{node, bound.incarnation, evidence});
  if (bound.keeper_dead) {
    Step(NodeProcessDead{node, bound.incarnation,
                         fmt::format("stream broke, keeper pid {} is gone", bound.facts.keeper_pid())});
  }
}

void Brain::OnKeeperDead(std::uint64_t session) {
  for (auto& [node, bound] : bound_) {
    if (bound.session != session) continue;
    bound.keeper_dead = true;
    // An agent that lives reports its keeper's death itself, with what it knows.
    if (!bound.stream) {
      Step(NodeProcessDead{node, bound.incarnation,
                           fmt::format("stream broke, keeper pid {} is gone", bound.facts.keeper_pid())});
    }
    return;
  }
}

void Brain::OnReport(std::uint64_t session, const v1::AgentMessage& message) {
  const auto it = sessions_.find(session);
  if (it == sessions_.end()) return;  // of a registration that is over
  Bound& bound = bound_.at(it->second);
  if (const auto event = FromWire(it->second, message, bound.facts)) Step(*event);
  if (message.has_keeper_lost() && message.incarnation() == bound.incarnation) {
    watch_->Forget(session);
    bound.keeper_dead = false;
    bound.facts.set_keeper_pid(message.keeper_lost().new_keeper_pid());
    bound.facts.set_keeper_start_time(message.keeper_lost().new_keeper_start_time());
    if (bound.facts.boot_id() == here_.boot_id && bound.facts.pid_namespace() == here_.pid_namespace) {
      watch_->Watch(session, bound.facts.keeper_pid(), bound.facts.keeper_start_time());
    }
  }
}

void Brain::Request(std::function<Event(RequestId)> make, std::function<void(const Reply&)> answer) {
  const RequestId id = ++last_request_;
  requests_[id] = std::move(answer);
  Step(make(id));
}

bool Brain::WatchEvents(EventSink sink) {
  if (watchers_.size() >= config_.max_watchers) return false;
  watchers_.push_back(std::move(sink));
  return true;
}

bool Brain::FollowJob(const JobId& job, bool with_snapshot, StatusSink sink) {
  if (followers_.size() >= config_.max_watchers) return false;
  if (followers_.empty()) followers_at_ = clock_->Now();
  followers_.push_back({job, with_snapshot, std::move(sink), {}});
  changed_.insert(job);
  return true;
}

void Brain::TellFollowers(bool all) {
  const Timestamp now = clock_->Now();
  const bool due = all || now >= followers_at_;
  if (due) followers_at_ = now + kFollowInterval;
  std::erase_if(followers_, [&](Follower& follower) {
    if (!due && !changed_.contains(follower.job)) return false;
    const auto job = state().jobs.find(follower.job);
    if (job == state().jobs.end()) return true;
    v1::JobStatus status = JobStatusOf(state(), job->second, now);
    if (follower.with_snapshot) {
      std::string snapshot = SnapshotOf(state(), store_->info().cluster).SerializeAsString();
      if (snapshot != follower.snapshot) {
        follower.snapshot = snapshot;
        *status.mutable_snapshot() = std::move(snapshot);
      }
    }
    const double age = status.age_seconds();
    status.clear_age_seconds();
    std::string text = status.SerializeAsString();
    if (text == follower.last) return false;
    if (!status.snapshot().empty()) {  // the next look compares without it
      v1::JobStatus bare = status;
      bare.clear_snapshot();
      text = bare.SerializeAsString();
    }
    follower.last = std::move(text);
    status.set_age_seconds(age);
    const bool terminal = IsTerminal(job->second.record.state);
    return !follower.sink(std::move(status), terminal) || terminal;
  });
  changed_.clear();
}

}  // namespace everstep::controller
