// The thread that owns the controller. Everything reaches it through one bounded mailbox; it steps the pure
// core, writes one synced batch for all that was decided, and only then lets commands and answers out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "admin.pb.h"
#include "agent.pb.h"
#include "controller/core/controller.h"
#include "controller/server/process_watch.h"
#include "controller/store/record_store.h"
#include "proto/base/clock.h"
#include "proto/base/mailbox.h"

namespace everstep::controller {

// The sending side of one agent's stream. Thread-safe.
class AgentStream {
 public:
  enum class Why { kFenced, kRefused, kShutdown };
  virtual ~AgentStream() = default;
  virtual void Send(v1::ControllerMessage message) = 0;  // a stream that is over drops it
  virtual void Close(Why why, const std::string& text) = 0;
};

// Somebody who watches; called on the brain's thread, must not block. False: gone, ask no more.
using EventSink = std::function<bool(const JournalRecord&)>;
using StatusSink = std::function<bool(v1::JobStatus status, bool terminal)>;

class Brain {
 public:
  struct Config {
    Options core;
    std::size_t mailbox = 65536;  // events and requests that wait
    std::uint32_t max_watchers = 256;
  };

  // `store` is open; `clock` outlives the brain.
  Brain(Config config, std::unique_ptr<RecordStore> store, const Clock* clock);
  ~Brain();

  // Reads the store, or takes `snapshot` when the store is empty; then known-dead nodes are lost at once.
  // Not ok: nothing was changed.
  StoreStatus Recover(const v1::StoreSnapshot* snapshot, const std::vector<NodeId>& known_dead);

  // On the calling thread until Stop, or until a batch could not be written: then it returns that status,
  // and nothing that the batch justified has gone out.
  StoreStatus Run();
  void Stop();

  // --- from any thread. False: the mailbox is full, say so to the peer ---
  bool Post(std::function<void()> task);  // runs on the brain's thread; what it reads is durable
  bool PostEvent(Event event);
  bool PostRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream, v1::Register message);
  bool PostClosed(std::uint64_t session, std::string evidence);
  // `agent` is registered on `session`: its report.
  bool PostReport(std::uint64_t session, v1::AgentMessage message);

  // --- on the brain's thread, inside a task ---
  const ClusterState& state() const { return controller_.state(); }
  Timestamp now() const { return clock_->Now(); }
  const StoreInfo& store_info() const { return store_->info(); }
  std::string store_text() const { return store_->Describe(); }
  // The answer comes after the batch is durable.
  void Request(std::function<Event(RequestId)> make, std::function<void(const Reply&)> answer);
  // A message that the core knows nothing of. False: the node has no stream.
  bool SendTo(const NodeId& node, v1::ControllerMessage message);
  bool WatchEvents(EventSink sink);
  bool FollowJob(const JobId& job, bool with_snapshot, StatusSink sink);

  // --- counters for /metrics, from any thread ---
  std::uint64_t events_handled() const { return events_; }
  std::uint64_t batches_written() const { return batches_; }
  std::uint64_t batch_nanos() const { return batch_nanos_; }
  std::size_t mailbox_depth() const { return mailbox_.size(); }

 private:
  struct Bound {  // newest registration of a node
    std::uint64_t session = 0;
    Incarnation incarnation = 0;
    std::shared_ptr<AgentStream> stream;  // null: broken
    std::uint64_t sequence = 0;
    v1::Register facts;
    bool keeper_dead = false;
  };
  struct Registering {
    std::shared_ptr<AgentStream> stream;
    v1::Register facts;
  };
  struct Follower {
    JobId job;
    bool with_snapshot = false;
    StatusSink sink;
    std::string last;      // serialised, without what changes by itself
    std::string snapshot;  // newest sent
  };
  using Item = std::variant<Event, std::function<void()>>;

  void Step(const Event& event);
  bool Commit();
  void CarryOut(Decisions& decisions);
  void Bind(const Command& command, const RegisteredCommand& registered);
  void OnRegister(std::uint64_t session, std::shared_ptr<AgentStream> stream, v1::Register message);
  void OnClosed(std::uint64_t session, const std::string& evidence);
  void OnReport(std::uint64_t session, const v1::AgentMessage& message);
  void OnKeeperDead(std::uint64_t session);
  void TellFollowers(bool all);
  Timestamp Wakeup();
  Timestamp Deadline();

  const Config config_;
  const std::unique_ptr<RecordStore> store_;
  const Clock* const clock_;
  Controller controller_;
  Mailbox<Item> mailbox_;
  std::atomic<bool> stop_{false};
  const Here here_;

  Timestamp wakeup_, wakeup_asked_;
  bool wakeup_stale_ = true;
  std::vector<Decisions> pending_;  // decided, not yet durable
  StoreStatus failure_;
  std::map<NodeId, Bound> bound_;
  std::map<std::uint64_t, NodeId> sessions_;  // registered ones
  std::map<std::uint64_t, Registering> registering_;
  std::map<RequestId, std::function<void(const Reply&)>> requests_;
  RequestId last_request_ = 0;
  std::vector<EventSink> watchers_;
  std::vector<Follower> followers_;
  std::set<JobId> changed_;
  Timestamp followers_at_;  // next look at what changes without a record (steps, ranks)

  std::atomic<std::uint64_t> events_{0}, batches_{0}, batch_nanos_{0};
  std::unique_ptr<ProcessWatch> watch_;  // last: its thread posts
};

}  // namespace everstep::controller
