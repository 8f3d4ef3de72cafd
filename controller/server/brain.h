// The thread that owns the controller. Everything reaches it through one bounded mailbox; it steps
// the pure core, writes one synced batch for all that was decided, and only then lets commands and
// answers out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "admin.pb.h"
#include "agent.pb.h"
#include "controller/core/controller.h"
#include "controller/server/log_relay.h"
#include "controller/server/metrics.h"
#include "controller/server/process_watch.h"
#include "controller/store/record_store.h"
#include "proto/base/clock.h"
#include "proto/base/mailbox.h"

namespace everstep::controller {

// The sending side of one agent's stream. Thread-safe; nothing here blocks.
class AgentStream {
 public:
  enum class Why : std::uint8_t {
    kFenced,    // the registration is over
    kTaken,     // another living node has that name
    kTooMany,   // no room for one more node
    kShutdown,  // the controller ends
  };
  virtual ~AgentStream() = default;
  virtual void Send(v1::ControllerMessage message) = 0;  // a stream that is over drops it
  virtual void Close(Why why, const std::string& text) = 0;
  // One report was taken in: the stream may read on (it stops when too many wait).
  virtual void Handled() = 0;
};

// Somebody who watches; called on the brain's thread, must not block. False: gone, ask no more.
using EventSink = std::function<bool(const JournalRecord&)>;
using StatusSink = std::function<bool(v1::JobStatus status, bool terminal)>;
// Names a watcher; 0: too many are there.
using WatchId = std::uint64_t;

class Brain {
 public:
  struct Config {
    Options core;
    std::size_t mailbox = 65536;     // events and requests that wait
    std::size_t max_watchers = 512;  // followers of events, jobs and logs
    // Asked before each batch; not ok is as a write that failed. RocksDB may end the process at a
    // full disk before it can say so. Null: not asked.
    std::function<StoreStatus()> room;
  };

  // `clock` outlives the brain.
  Brain(const Config& config, std::unique_ptr<RecordStore> store, const Clock* clock);
  ~Brain();
  Brain(const Brain&) = delete;
  Brain& operator=(const Brain&) = delete;

  // Reads the store, or takes `snapshot` when the store is empty; then known-dead nodes are lost at
  // once. Not ok: nothing was changed.
  StoreStatus Recover(const v1::StoreSnapshot* snapshot, const std::vector<NodeId>& known_dead);

  // On the calling thread until Stop, or until a batch could not be written: then it returns that
  // status, and nothing that the batch justified has gone out. After Stop every request has had its
  // answer and every agent's stream its last word.
  StoreStatus Run();
  void Stop();  // from any thread
  bool stopping() const { return stop_; }

  // --- from any thread. False: the mailbox is full or closed, say so to the peer ---
  // Runs on the brain's thread; what it reads is durable.
  bool Post(std::function<void()> task);
  bool PostRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream,
                    v1::Register message);
  bool PostClosed(std::uint64_t session, std::string evidence);
  // A report of the agent that registered on `session`.
  bool PostReport(std::uint64_t session, v1::AgentMessage message);

  // --- on the brain's thread, inside a task ---
  const ClusterState& state() const { return controller_.state(); }
  Forecast IfLost(const JobId& job, const std::vector<NodeId>& lost) const {
    return controller_.IfLost(clock_->Now(), job, lost);
  }
  Timestamp now() const { return clock_->Now(); }
  const StoreInfo& store_info() const { return store_->info(); }
  std::string store_text() const { return store_->Describe(); }
  std::size_t sessions() const { return sessions_.size(); }
  // What the node's newest heartbeat said of its checkpoint traffic; null: nothing yet.
  const v1::CheckpointTraffic* traffic(const NodeId& node) const;
  const v1::ScrubReport* scrub(const NodeId& node) const;  // likewise
  std::size_t watchers() const { return watchers_.size() + followers_.size() + tails_.size(); }
  // The answer comes after the batch is durable; null: the controller ends first.
  void Request(const std::function<Event(RequestId)>& make,
               std::function<void(const Reply*)> answer);
  // A message that the core knows nothing of. False: the node has no stream.
  bool SendTo(const NodeId& node, v1::ControllerMessage message);
  WatchId WatchEvents(EventSink sink);
  WatchId FollowJob(const JobId& job, bool with_snapshot, StatusSink sink);
  // Asks the job's nodes for their logs; lines come to `reader` through the relay. With follow it
  // goes on through generations, restarts of agents and nodes that join, until the job is over.
  // *error: no node can answer, or there are too many watchers.
  WatchId TailLogs(const v1::TailJobLogsRequest& request, LogRelay::Reader reader,
                   std::string* error);
  // The watcher is gone. Harmless when it was known.
  void Unwatch(WatchId id);

  // --- from any thread ---
  LogRelay& relay() { return relay_; }
  Counters& counters() { return counters_; }
  std::size_t mailbox_depth() const { return mailbox_.size(); }
  // Since the thread last came round; it does so at least once a second.
  Duration silence() const;

 private:
  struct Bound {  // newest registration of a node
    std::uint64_t session = 0;
    Incarnation incarnation = 0;
    std::shared_ptr<AgentStream> stream;  // null: broken
    std::uint64_t sequence = 0;
    v1::Register facts;
    bool keeper_dead = false;
    v1::CheckpointTraffic traffic;  // of its newest heartbeat
    std::optional<v1::ScrubReport> scrub;
  };
  struct Registering {
    std::shared_ptr<AgentStream> stream;
    v1::Register facts;
    std::optional<std::string> broken;  // its stream broke before it was let in: the evidence
  };
  struct Follower {
    WatchId id = 0;
    JobId job;
    bool with_snapshot = false;
    StatusSink sink;
    std::string last;  // serialised, without what changes by itself
    std::uint64_t snapshot_version = 0;
  };
  struct Tail {
    v1::TailJobLogsRequest request;  // .job is the whole id
    std::set<NodeId> asked;
    Timestamp end_at;  // ns != 0: the job is over, last lines are on their way
  };
  struct Register {
    std::uint64_t session;
    std::shared_ptr<AgentStream> stream;
    v1::Register message;
  };
  struct Closed {
    std::uint64_t session;
    std::string evidence;
  };
  struct Report {
    std::uint64_t session;
    v1::AgentMessage message;
  };
  struct KeeperDead {
    std::uint64_t session;
  };
  using Task = std::function<void()>;
  using Item = std::variant<Task, Register, Closed, Report, KeeperDead>;

  // brain.cc
  bool Push(Item item);
  void Take(Task& task) { task(); }
  void Step(const Event& event);
  bool Commit();
  void CarryOut(Decisions& decisions);
  Timestamp Wakeup();
  Timestamp Deadline();
  void End();

  // brain_sessions.cc
  void Take(Register& item);
  void Take(Closed& item);
  void Take(Report& item);
  void Take(KeeperDead& item);
  bool NameTaken(const v1::Register& message, std::string* who) const;
  void Bind(const Command& command, const RegisteredCommand& registered);
  void WatchKeeper(const Bound& bound);
  void Fence(const NodeId& node);

  // brain_watchers.cc
  void TellWatchers(const JournalRecord& record);
  void TellFollowers(Timestamp now);
  void AskForLogs(const NodeId& node, WatchId id, Tail* tail, std::int64_t lines);
  void TailsOf(const NodeId& node, const JobId& activated);
  void EndTails(Timestamp now);

  const Config config_;
  const std::unique_ptr<RecordStore> store_;
  const Clock* const clock_;
  Controller controller_;
  Counters counters_;
  LogRelay relay_;
  Mailbox<Item> mailbox_;
  std::atomic<bool> stop_{false};
  std::atomic<std::int64_t> round_ns_{0};
  const Here here_;

  Timestamp trim_at_;  // memory of a burst is given back then; ns == 0: none
  Timestamp wakeup_, wakeup_asked_;
  bool wakeup_stale_ = true;
  std::vector<Decisions> pending_;  // decided, not yet durable
  StoreStatus failure_;
  std::map<NodeId, Bound> bound_;
  std::map<std::uint64_t, NodeId> sessions_;  // registered ones
  std::map<std::uint64_t, Registering> registering_;
  std::map<RequestId, std::function<void(const Reply*)>> requests_;
  RequestId last_request_ = 0;

  WatchId last_watch_ = 0;
  std::map<WatchId, EventSink> watchers_;
  std::vector<Follower> followers_;
  std::map<WatchId, Tail> tails_;
  std::set<JobId> changed_;
  Timestamp followers_at_;  // next look at what changes without a record (steps, ranks)
  std::string snapshot_;    // of snapshot_version_
  std::uint64_t snapshot_version_ = 0;
  std::uint64_t durable_version_ = 1;  // grows with each batch that changes more than the journal

  std::unique_ptr<ProcessWatch> watch_;  // last: its thread posts
};

}  // namespace everstep::controller
