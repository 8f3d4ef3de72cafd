#include "tests/sim/world/sim_controller.h"

#include <algorithm>

#include <fmt/format.h>

#include "controller/core/bugs.h"
#include "tests/sim/world/checkers.h"
#include "tests/sim/world/node.h"

namespace everstep::sim {
namespace {

const NodeId* NodeOf(const controller::Event& event) {
  return std::visit(
      [](const auto& e) -> const NodeId* {
        if constexpr (requires { e.node; }) {
          return &e.node;
        } else {
          return nullptr;
        }
      },
      event);
}

}  // namespace

void SimController::After(Duration delay, std::string label, std::function<void()> action) {
  env_.timeline->After(delay, std::move(label), [this, life = life_, action = std::move(action)] {
    if (core_ && life_ == life) action();
  });
}

// --- the process ---

void SimController::Start() {
  if (core_) return;
  ++life_;
  started_ = env_.timeline->now();
  core_ = std::make_unique<controller::Controller>(env_.options->controller);
  const std::vector<controller::Record> records = store_.Load();
  auto decisions = std::make_shared<controller::Decisions>();
  core_->Recover(env_.timeline->now(), records, decisions.get());
  env_.truth->Count("controller starts");
  env_.truth->Note(env_.timeline->now(), "controller starts");
  env_.checkers->OnRecovered(env_.timeline->now(), core_->state());
  busy_ = true;
  Commit(decisions);
}

void SimController::Crash() {
  if (!core_) return;
  env_.truth->Note(env_.timeline->now(), "controller dies");
  Random& random = env_.timeline->random();
  // Nothing, part, or all of what was not synced is on the disk.
  const std::uint32_t keep[] = {0, 500, 900, 1000};
  store_.Crash(&random, keep[random.Below(4)]);
  core_.reset();
  ++life_;
  inbox_.clear();
  busy_ = wake_queued_ = sync_queued_ = fail_next_sync_ = false;
  if (tick_ != 0) env_.timeline->Cancel(tick_);
  tick_ = 0;
  requests_.clear();
  bound_.clear();
  const std::map<StreamId, Session> sessions = std::move(sessions_);
  sessions_.clear();
  for (const auto& [stream, session] : sessions) {
    env_.network->Break(stream);
    TellAgent(session.node, stream, "the controller closed the connection");
  }
}

// --- sessions ---

void SimController::Accept(StreamId stream, const NodeId& node) {
  sessions_[stream] = {node, 0, false};
}

void SimController::OnMessage(StreamId stream, const controller::Event& event) {
  if (!core_ || !sessions_.contains(stream)) return;
  Push({stream, std::make_shared<const controller::Event>(event), {}});
}

void SimController::StreamGone(StreamId stream, const std::string& why) {
  After(
      std::chrono::microseconds(env_.timeline->random().Between(100, 3000)), "close",
      [this, stream, why] {
        const auto it = sessions_.find(stream);
        if (it == sessions_.end() || it->second.gone) return;
        if (env_.network->Cut(it->second.node, kControllerName)) {  // the news does not get through
          After(Milliseconds(200), "close again", [this, stream, why] { StreamGone(stream, why); });
          return;
        }
        it->second.gone = true;
        Push({stream, nullptr, why});
      });
}

void SimController::Close(StreamId stream, const std::string& why) {
  const auto it = sessions_.find(stream);
  if (it == sessions_.end()) return;
  env_.network->Break(stream);
  TellAgent(it->second.node, stream, why);
  if (!it->second.gone) {
    it->second.gone = true;
    Push({stream, nullptr, why});
  }
}

void SimController::TellAgent(const NodeId& node, StreamId stream, const std::string& why) {
  env_.timeline->After(std::chrono::microseconds(env_.timeline->random().Between(100, 3000)),
                       "reset", [this, node, stream, why] {
                         SimNode* peer = env_.node(node);
                         if (peer->stream() != stream) return;
                         if (env_.network->Cut(kControllerName, node)) {
                           env_.timeline->After(
                               Milliseconds(300), "reset again",
                               [this, node, stream, why] { TellAgent(node, stream, why); });
                           return;
                         }
                         peer->OnStreamLost(stream, why);
                       });
}

void SimController::KeeperDied(const NodeId& node, std::uint64_t keeper_id) {
  if (!env_.options->same_machine) return;
  After(Milliseconds(env_.timeline->random().Between(5, 150)), "keeper watch",
        [this, node, keeper_id] {
          const auto it = core_->state().nodes.find(node);
          if (it == core_->state().nodes.end() || it->second.record.keeper_id != keeper_id) return;
          Push({0,
                std::make_shared<const controller::Event>(controller::NodeProcessDead{
                    node, it->second.record.incarnation, "the keeper's process is gone"}),
                {}});
        });
}

bool SimController::Request(const std::function<controller::Event(controller::RequestId)>& make,
                            std::function<void(const controller::Reply&)> on_reply) {
  if (!core_) return false;
  const controller::RequestId id = next_request_++;
  requests_[id] = std::move(on_reply);
  Push({0, std::make_shared<const controller::Event>(make(id)), {}});
  return true;
}

// --- the brain: one thread, one item at a time ---

void SimController::Push(Item item) {
  inbox_.push_back(std::move(item));
  Pump();
}

void SimController::Pump() {
  if (busy_ || wake_queued_ || inbox_.empty()) return;
  wake_queued_ = true;
  const Timestamp now = env_.timeline->now();
  const Duration paused = std::max(Duration{}, paused_until_ - now);
  After(paused + std::chrono::microseconds(env_.timeline->random().Between(5, 400)), "controller",
        [this] {
          wake_queued_ = false;
          if (env_.timeline->now() < paused_until_) return Pump();
          Work();
        });
}

// What the shell makes of an item; none: nothing for the core.
std::optional<controller::Event> SimController::Resolve(const Item& item) {
  if (item.stream == 0) return *item.event;
  const auto it = sessions_.find(item.stream);
  if (it == sessions_.end()) return std::nullopt;
  if (item.event) {
    // A stream that ended before it registered is no session.
    if (std::holds_alternative<controller::NodeRegistered>(*item.event) && it->second.gone) {
      return std::nullopt;
    }
    return *item.event;
  }
  const Session session = it->second;
  sessions_.erase(it);
  if (const auto b = bound_.find(session.node); b != bound_.end() && b->second == item.stream) {
    bound_.erase(b);
  }
  if (session.incarnation == 0) return std::nullopt;
  return controller::SessionClosed{session.node, session.incarnation, item.why};
}

void SimController::Work() {
  Item item = std::move(inbox_.front());
  inbox_.pop_front();
  const std::optional<controller::Event> event = Resolve(item);
  if (!event) return Pump();
  const Timestamp now = env_.timeline->now();
  auto decisions = std::make_shared<controller::Decisions>();
  env_.checkers->BeforeStep(core_->state(), *event);
  core_->Step(now, *event, decisions.get());
  env_.checkers->AfterStep(now, core_->state(), *event, *decisions);
  Digest& digest = env_.timeline->digest();
  digest.Add(event->index());
  digest.Add(decisions->records.size());
  digest.Add(decisions->commands.size());
  if (const auto* registered = std::get_if<controller::NodeRegistered>(&*event)) {
    const bool taken = std::any_of(
        decisions->commands.begin(), decisions->commands.end(), [&](const controller::Command& c) {
          const auto* r = std::get_if<controller::RegisteredCommand>(&c.body);
          return r != nullptr && r->session == registered->session;
        });
    if (!taken) Close(registered->session, "refused");
  }
  if (const NodeId* node = NodeOf(*event); node != nullptr) digest.Add(*node);
  busy_ = true;
  Commit(decisions);
}

// The order contract. With the seeded bug the commands do not wait for the sync.
void SimController::Commit(const std::shared_ptr<controller::Decisions>& decisions) {
  env_.checkers->OnDecisions(env_.timeline->now(), *decisions);
  if (decisions->records.empty() && decisions->deletions.empty()) {
    Act(*decisions);
    busy_ = false;
    ScheduleTick();
    return Pump();
  }
  store_.Append(decisions->records, decisions->deletions);
  if ((env_.options->controller.bugs & controller::kBugUnsyncedBatch) != 0) {
    Act(*decisions);
    busy_ = false;
    if (!sync_queued_) {
      sync_queued_ = true;
      After(Milliseconds(env_.timeline->random().Between(20, 200)), "lazy sync", [this] {
        sync_queued_ = false;
        store_.Sync();
      });
    }
    ScheduleTick();
    return Pump();
  }
  After(SyncTime(), "sync", [this, decisions] { WriteThenAct(decisions); });
}

void SimController::WriteThenAct(const std::shared_ptr<controller::Decisions>& decisions) {
  const Duration paused = paused_until_ - env_.timeline->now();
  if (paused > Duration{}) {
    After(paused, "sync", [this, decisions] { WriteThenAct(decisions); });
    return;
  }
  if (fail_next_sync_) {
    fail_next_sync_ = false;
    env_.truth->Count("syncs failed");
    Crash();
    env_.timeline->After(Milliseconds(env_.timeline->random().Between(50, 2000)),
                         "controller restart", [this] { Start(); });
    return;
  }
  store_.Sync();
  Act(*decisions);
  busy_ = false;
  ScheduleTick();
  Pump();
}

Duration SimController::SyncTime() {
  Random& random = env_.timeline->random();
  if (env_.timeline->now() < slow_until_) return Milliseconds(random.Between(1, 400));
  return std::chrono::microseconds(random.Between(50, 3000));
}

void SimController::Act(const controller::Decisions& decisions) {
  // Streams of older registrations end first: a newer one of the same node may be bound below.
  for (const NodeId& node : decisions.close_sessions) {
    const auto it = bound_.find(node);
    if (it == bound_.end()) continue;
    const StreamId stream = it->second;
    bound_.erase(it);
    Close(stream, "fenced");
  }
  for (const controller::Command& command : decisions.commands) {
    if (const auto* r = std::get_if<controller::RegisteredCommand>(&command.body)) {
      const auto session = sessions_.find(r->session);
      if (session == sessions_.end()) continue;
      session->second.incarnation = command.incarnation;
      bound_[command.node] = r->session;
    }
    const auto bound = bound_.find(command.node);
    if (bound == bound_.end()) continue;
    const StreamId stream = bound->second;
    const auto session = sessions_.find(stream);
    if (session == sessions_.end() || session->second.incarnation != command.incarnation) continue;
    env_.checkers->OnCommand(env_.timeline->now(), command);
    env_.network->SendOn(stream, kControllerName, "command", [this, stream, command] {
      env_.node(command.node)->OnCommand(stream, command);
    });
  }
  for (const controller::Reply& reply : decisions.replies) {
    const auto it = requests_.find(reply.request);
    if (it == requests_.end()) continue;
    const auto on_reply = std::move(it->second);
    requests_.erase(it);
    on_reply(reply);
  }
}

// One wake-up is enough: it asks again when it comes.
void SimController::ScheduleTick() {
  const std::optional<Timestamp> next = core_->NextWakeup();
  if (!next) return;
  if (tick_ != 0 && tick_at_ <= *next) return;
  if (tick_ != 0) env_.timeline->Cancel(tick_);
  tick_at_ = std::max(*next, env_.timeline->now());
  tick_ = env_.timeline->At(tick_at_, "controller tick", [this] {
    tick_ = 0;
    const std::optional<Timestamp> due = core_ ? core_->NextWakeup() : std::nullopt;
    if (!due) return;
    if (*due > env_.timeline->now()) return ScheduleTick();
    Push({0, std::make_shared<const controller::Event>(controller::Tick{}), {}});
  });
}

}  // namespace everstep::sim
