// The controller's process in the simulated cluster: the real Controller in a small shell that
// keeps its order contract (records synced, then commands, then replies), with sessions, a disk and
// a life that faults may end at any instant.
//
//   agents ══streams══▶ inbox ─▶ Controller::Step ─▶ [sync] ─▶ commands, replies
//                                                      └ a crash here keeps the batch whole, or not
//                                                      at all
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "controller/core/controller.h"
#include "tests/sim/kernel/network.h"
#include "tests/sim/world/options.h"
#include "tests/sim/world/sim_store.h"
#include "tests/sim/world/truth.h"

namespace everstep::sim {

class Checkers;
class SimNode;

// What the controller's process reaches. All must outlive it.
struct ControllerEnv {
  Timeline* timeline = nullptr;
  Network* network = nullptr;
  Truth* truth = nullptr;
  Checkers* checkers = nullptr;
  const WorldOptions* options = nullptr;
  std::function<SimNode*(const NodeId&)> node;
};

class SimController {
 public:
  explicit SimController(ControllerEnv env) : env_(std::move(env)) {}

  bool up() const { return core_ != nullptr; }
  // The core's state; null while the process is down.
  const controller::ClusterState* state() const { return core_ ? &core_->state() : nullptr; }
  const SimStore& store() const { return store_; }
  bool idle() const { return !busy_ && !sync_queued_; }  // nothing is unsynced
  Timestamp started() const { return started_; }

  // --- faults ---
  void Start();
  void Crash();
  void PauseUntil(Timestamp until) { paused_until_ = until; }  // SIGSTOP
  void SlowDiskUntil(Timestamp until) { slow_until_ = until; }
  void FailDiskOnce() { fail_next_sync_ = true; }  // the next sync fails and the process aborts

  // --- from agents ---
  void Accept(StreamId stream, const NodeId& node);
  void OnMessage(StreamId stream, const controller::Event& event);
  // The agent's end of the stream is gone, or the network broke it; the controller hears of it in
  // time.
  void StreamGone(StreamId stream, const std::string& why);
  // Same machine only: the shell watches keeper processes.
  void KeeperDied(const NodeId& node, std::uint64_t keeper_id);

  // --- from people ---
  // `on_reply` may never come: the process may die first. Returns false when nobody listens.
  bool Request(const std::function<controller::Event(controller::RequestId)>& make,
               std::function<void(const controller::Reply&)> on_reply);

 private:
  struct Item {
    StreamId stream = 0;                             // 0: not from an agent
    std::shared_ptr<const controller::Event> event;  // none: the stream closed
    std::string why;
  };
  struct Session {
    NodeId node;
    Incarnation incarnation = 0;  // 0: not registered
    bool gone = false;
  };

  void After(Duration delay, std::string label, std::function<void()> action);
  void Push(Item item);
  void Pump();
  void Work();
  std::optional<controller::Event> Resolve(const Item& item);
  void Commit(const std::shared_ptr<controller::Decisions>& decisions);
  void WriteThenAct(const std::shared_ptr<controller::Decisions>& decisions);
  void Act(const controller::Decisions& decisions);
  void Close(StreamId stream, const std::string& why);
  void TellAgent(const NodeId& node, StreamId stream, const std::string& why);
  void ScheduleTick();
  Duration SyncTime();

  const ControllerEnv env_;
  SimStore store_;
  std::unique_ptr<controller::Controller> core_;
  std::uint64_t life_ = 0;
  std::deque<Item> inbox_;
  bool busy_ = false;
  bool wake_queued_ = false;
  bool sync_queued_ = false;  // seeded bug: syncs run behind
  EventId tick_ = 0;
  Timestamp tick_at_;
  std::map<StreamId, Session> sessions_;
  std::map<NodeId, StreamId> bound_;
  std::map<controller::RequestId, std::function<void(const controller::Reply&)>> requests_;
  controller::RequestId next_request_ = 1;
  Timestamp started_;
  Timestamp paused_until_;
  Timestamp slow_until_;
  bool fail_next_sync_ = false;
};

}  // namespace everstep::sim
