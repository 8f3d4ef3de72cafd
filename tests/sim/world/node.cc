#include "tests/sim/world/node.h"

#include <algorithm>

#include <fmt/format.h>

#include "tests/sim/world/sim_controller.h"

namespace everstep::sim {
namespace {

// The short and the long grace of a stop, as the controller's server sends them.
Duration Grace(bool failed) {
  return failed ? Milliseconds(100) : Seconds(2);
}

}  // namespace

SimNode::SimNode(NodeId name, NodeEnv env)
    : name_(std::move(name)),
      env_(std::move(env)),
      clock_skew_(Milliseconds(env_.timeline->random().Between(-5000, 5000))) {}

Duration SimNode::Draw(std::int64_t low_ms, std::int64_t high_ms) {
  return std::chrono::microseconds(env_.timeline->random().Between(low_ms * 1000, high_ms * 1000));
}

void SimNode::AfterAgent(Duration delay, std::string label, std::function<void()> action) {
  env_.timeline->After(delay, name_ + " " + std::move(label),
                       [this, life = agent_life_, action = std::move(action)] {
                         if (agent_ && agent_life_ == life) action();
                       });
}

void SimNode::AfterKeeper(Duration delay, std::string label, std::function<void()> action) {
  std::string full = name_ + " " + std::move(label);
  env_.timeline->After(delay, full, [this, full, life = keeper_life_, action = std::move(action)] {
    if (!keeper_ || keeper_life_ != life) return;
    const Duration paused = keeper_paused_until_ - env_.timeline->now();
    if (paused <= Duration{}) return action();
    env_.timeline->After(paused, full, [this, life, action] {
      if (keeper_ && keeper_life_ == life) action();
    });
  });
}

// --- the machine ---

void SimNode::Boot() {
  if (booted_) return;
  booted_ = true;
  StartAgent();
}

void SimNode::Crash() {
  if (!booted_) return;
  booted_ = false;
  CrashAgent();
  DropKeeper();
}

void SimNode::CrashAgent() {
  if (!agent_) return;
  ++agent_life_;
  agent_.reset();
  inbox_.clear();
  agent_paused_until_ = {};
  agent_gone_since_ = env_.timeline->now();
  // The kernel closes a dead process's sockets; a machine without power closes nothing.
  if (booted_ && stream_ != 0) {
    env_.network->Break(stream_);
    env_.controller->StreamGone(stream_, "end of stream");
  }
  pumping_ = false;
  connecting_ = false;
  if (tick_ != 0) env_.timeline->Cancel(tick_);
  tick_ = 0;
  stream_ = 0;
  streams_.clear();
}

void SimNode::PauseAgent(Timestamp until) {
  agent_paused_until_ = until;
  agent_gone_since_ = env_.timeline->now();
}

void SimNode::StartAgent() {
  if (!booted_ || agent_) return;
  ++agent_life_;
  controller_away_ = true;
  agent_ = std::make_unique<agent::AgentCore>(agent::CoreOptions{});
  AfterAgent(Draw(5, 100), "attach", [this] { AttachKeeper(); });
  Connect();
}

// Adopts the keeper that is there, or starts one.
void SimNode::AttachKeeper() {
  const bool fresh = keeper_ == nullptr;
  if (fresh) {
    ++keeper_life_;
    keeper_ = std::make_unique<Keeper>();
    Digest digest;
    digest.Add(fmt::format("{}/{}", name_, keeper_life_));
    keeper_->id = digest.value() | 1;
    Scrub();
  }
  keeper_->controller_away = controller_away_;
  Tell(agent::KeeperAttached{fresh, keeper_->remembered, Adopted()});
  PushAll();
}

void SimNode::CrashKeeper() {
  if (!keeper_) return;
  DropKeeper();
  Tell(agent::KeeperGone{"the keeper's socket closed"});
  AfterAgent(Draw(20, 400), "new keeper", [this] {
    if (!keeper_) AttachKeeper();  // an agent that had just started has one by now
  });
}

void SimNode::Notice(Duration deadline) {
  Tell(agent::Notice{"spot", deadline});
}

// --- the session ---

void SimNode::Connect() {
  if (!agent_ || connecting_ || stream_ != 0) return;
  connecting_ = true;
  AfterAgent(Draw(2, 300), "connect", [this] {
    connecting_ = false;
    if (!env_.controller->up() || env_.network->Cut(name_, kControllerName) ||
        env_.network->Cut(kControllerName, name_)) {
      return Connect();
    }
    stream_ = env_.network->Open(name_, kControllerName);
    streams_.insert(stream_);
    env_.controller->Accept(stream_, name_);
    Tell(agent::SessionOpened{});
  });
}

void SimNode::OnStreamLost(StreamId stream, const std::string& why) {
  if (!agent_ || stream_ != stream) return;
  stream_ = 0;
  Tell(agent::SessionLost{why});
  Connect();
}

void SimNode::OnCommand(StreamId stream, const controller::Command& command) {
  if (!agent_ || !streams_.contains(stream)) return;
  if (stream_ != stream) env_.truth->Count("late commands");
  const agent::Header header{command.incarnation, command.sequence};
  if (const auto* c = std::get_if<controller::RegisteredCommand>(&command.body)) {
    Tell(agent::Registered{header, c->heartbeat_interval, c->lease, c->known_jobs});
  } else if (const auto* w = std::get_if<controller::WarmCommand>(&command.body)) {
    Tell(agent::Warm{header, w->job, w->command});
  } else if (const auto* p = std::get_if<controller::PrepareCommand>(&command.body)) {
    Tell(agent::Prepare{header, p->job, p->generation, p->command, p->host_store, Grace(p->failed),
                        p->data_key, p->given_up, p->park});
  } else if (const auto* a = std::get_if<controller::ActivateCommand>(&command.body)) {
    agent::Activate activate;
    activate.header = header;
    activate.job = a->plan->job;
    activate.generation = a->plan->generation;
    activate.command = a->command;
    for (const NodePlan& node : a->plan->nodes) {
      if (node.node == name_) activate.plan = node;
    }
    activate.cut = a->plan->cut;
    activate.kept_by_parity = !a->plan->parity.groups.empty();
    activate.group_world_size = static_cast<std::uint32_t>(a->plan->nodes.size());
    activate.nproc_per_node = a->nproc_per_node;
    activate.world_size = activate.group_world_size * a->nproc_per_node;
    activate.master_addr = a->plan->master_addr;
    activate.master_port = a->plan->master_port;
    activate.restart_count = a->plan->restart_count;
    activate.data_key = a->data_key;
    activate.committed_step = a->committed_step;
    activate.given_up = a->given_up;
    Tell(std::move(activate));
  } else if (const auto* s = std::get_if<controller::StopJobCommand>(&command.body)) {
    Tell(agent::StopJob{header, s->job, s->generation, s->forget, Grace(s->failed)});
  } else if (const auto* m = std::get_if<controller::CommittedCommand>(&command.body)) {
    Tell(agent::Committed{header, m->job, m->generation, m->step, m->released});
  } else if (const auto* f = std::get_if<controller::PersistCommand>(&command.body)) {
    Tell(agent::Persist{header, f->job, f->generation, f->step, f->ranks, f->verified});
  } else if (const auto* r = std::get_if<controller::RepairShardCommand>(&command.body)) {
    Tell(agent::RepairShard{header, r->job, r->shard, r->source_node, r->source_address});
  } else if (const auto* b = std::get_if<controller::BuildShardCommand>(&command.body)) {
    Tell(agent::BuildShard{header, b->job, b->generation, b->build});
  } else if (const auto* t = std::get_if<controller::ToldAckCommand>(&command.body)) {
    Tell(agent::ToldAck{header, t->job, t->generation, t->rank, t->sequence});
  }
}

// --- the agent's one thread ---

void SimNode::Tell(agent::Event event) {
  if (!agent_) return;
  inbox_.push_back(std::move(event));
  Pump();
}

void SimNode::Pump() {
  if (pumping_ || inbox_.empty()) return;
  pumping_ = true;
  const Duration paused = std::max(Duration{}, agent_paused_until_ - env_.timeline->now());
  AfterAgent(paused + std::chrono::microseconds(env_.timeline->random().Between(10, 800)), "agent",
             [this] {
               pumping_ = false;
               if (env_.timeline->now() < agent_paused_until_) return Pump();
               const agent::Event event = std::move(inbox_.front());
               inbox_.pop_front();
               StepAgent(event);
               Pump();
             });
}

void SimNode::StepAgent(const agent::Event& event) {
  agent::Effects effects;
  const Incarnation before = agent_->incarnation();
  agent_->Step(env_.timeline->now() + clock_skew_, event, &effects);
  CheckStep(event, before, effects);
  env_.timeline->digest().Add(event.index());
  for (const agent::Effect& effect : effects) {
    env_.timeline->digest().Add(effect.index());
    CarryOut(effect);
  }
  ScheduleTick();
}

// A command of another registration than the present one may only be dropped.
void SimNode::CheckStep(const agent::Event& event, Incarnation before,
                        const agent::Effects& effects) const {
  const agent::Header* header = std::visit(
      [](const auto& e) -> const agent::Header* {
        if constexpr (requires { e.header; }) {
          return &e.header;
        } else {
          return nullptr;
        }
      },
      event);
  if (header == nullptr) return;
  const bool registers = std::holds_alternative<agent::Registered>(event);
  const bool stale =
      registers ? header->incarnation <= keeper_remembers() : header->incarnation != before;
  if (!stale) return;
  env_.truth->Count("stale commands");
  for (const agent::Effect& effect : effects) {
    if (std::holds_alternative<agent::Dropped>(effect) ||
        std::holds_alternative<agent::CloseSession>(effect)) {
      continue;
    }
    env_.truth->Violate(
        env_.timeline->now(), "stale_obeyed",
        fmt::format("{} obeys a command (kind {}) of registration {}, its own is {}", name_,
                    event.index(), header->incarnation, before));
    return;
  }
}

bool SimNode::Responsive() const {
  return keeper_ && agent_ && env_.timeline->now() >= agent_paused_until_;
}

// One wake-up is enough: it asks again when it comes.
void SimNode::ScheduleTick() {
  const std::optional<Timestamp> next = agent_->NextWakeup();
  if (!next) return;
  const Timestamp at = std::max(*next - clock_skew_, env_.timeline->now());
  if (tick_ != 0 && tick_at_ <= at) return;
  if (tick_ != 0) env_.timeline->Cancel(tick_);
  tick_at_ = at;
  tick_ = env_.timeline->At(at, name_ + " tick", [this] {
    tick_ = 0;
    const std::optional<Timestamp> due = agent_->NextWakeup();
    if (!due) return;
    if (*due - clock_skew_ > env_.timeline->now()) return ScheduleTick();
    Tell(agent::Tick{});
  });
}

void SimNode::Say(const std::string& what, controller::Event event) {
  if (stream_ == 0) return;
  env_.network->SendOn(stream_, name_, name_ + " says " + what,
                       [c = env_.controller, stream = stream_, event = std::move(event)] {
                         c->OnMessage(stream, event);
                       });
}

void SimNode::CarryOut(const agent::Effect& effect) {
  const Incarnation incarnation = agent_->incarnation();
  if (const auto* e = std::get_if<agent::SendRegister>(&effect)) {
    controller::NodeRegistered message;
    message.node = name_;
    message.session = stream_;
    message.keeper_id = keeper_id();
    message.previous_incarnation = e->previous;
    message.facts.address = "10.0.0." + name_.substr(1);
    message.facts.data_port = 7000;
    message.jobs = e->jobs;
    for (JobOnNode& job : message.jobs) job.shards = Verified(job.job);
    Say("register", std::move(message));
  } else if (const auto* h = std::get_if<agent::SendHeartbeat>(&effect)) {
    controller::Heartbeat beat{name_, incarnation, h->sequence, h->sent, {}};
    for (const agent::JobProgress& p : h->jobs) {
      beat.jobs.push_back({p.job, p.generation, p.step, p.running});
    }
    Say("heartbeat", std::move(beat));
  } else if (const auto* p = std::get_if<agent::SendPrepared>(&effect)) {
    Say("prepared",
        controller::Prepared{name_, incarnation, p->holds, p->store_port, p->refused, p->message});
  } else if (const auto* a = std::get_if<agent::SendActivated>(&effect)) {
    Say("activated", controller::Activated{name_, incarnation, a->job, a->generation, a->workers,
                                           a->failed, a->message});
  } else if (const auto* x = std::get_if<agent::SendWorkerExited>(&effect)) {
    Say("worker_exited",
        controller::WorkerExited{name_, incarnation, x->job, x->generation, x->worker.rank,
                                 x->worker.local_rank, x->worker.pid, x->worker.exit});
  } else if (const auto* s = std::get_if<agent::SendWorkerStalled>(&effect)) {
    Say("worker_stalled",
        controller::WorkerStalled{name_, incarnation, s->stalled.job, s->stalled.generation,
                                  s->stalled.rank, static_cast<StallKind>(s->stalled.kind),
                                  s->stalled.evidence, s->stalled.stalled});
  } else if (const auto* c = std::get_if<agent::SendShardCopied>(&effect)) {
    Say("shard_copied", controller::ShardCopied{name_, incarnation, c->job, c->shard});
  } else if (const auto* d = std::get_if<agent::SendShardDamaged>(&effect)) {
    Say("shard_damaged",
        controller::ShardDamaged{name_, incarnation, d->damaged.job, d->damaged.shard,
                                 d->damaged.chunk, d->damaged.found_by});
  } else if (const auto* f = std::get_if<agent::SendPersisted>(&effect)) {
    const agent::Persisted& done = f->persisted;
    Say("persisted",
        controller::Persisted{name_, incarnation, done.job, done.generation, done.step, done.sealed,
                              done.bytes, done.took, done.error, done.missing});
  } else if (const auto* told = std::get_if<agent::SendTold>(&effect)) {
    const agent::WorkerTold& t = told->told;
    Say("told", controller::Told{name_, incarnation, t.job, t.generation, t.rank,
                                 DecodeTold(t.words).value_or(std::vector<ToldWord>{})});
  } else if (const auto* n = std::get_if<agent::SendNotice>(&effect)) {
    Say("notice", controller::Notice{name_, incarnation, n->notice.source, n->notice.deadline});
  } else if (const auto* w = std::get_if<agent::SendNodeWarm>(&effect)) {
    Say("node_warm", controller::NodeWarm{name_, incarnation, w->job, w->warm, w->message});
  } else if (const auto* k = std::get_if<agent::SendKeeperLost>(&effect)) {
    Say("keeper_lost", controller::KeeperLost{name_, incarnation, keeper_id(), k->message});
  } else if (const auto* t = std::get_if<agent::SendStopped>(&effect)) {
    Say("stopped", controller::Stopped{name_, incarnation, t->job, t->generation});
  } else if (const auto* close = std::get_if<agent::CloseSession>(&effect)) {
    if (const StreamId stream = stream_; stream != 0) {
      env_.truth->Count("sessions closed by agents");
      env_.network->Break(stream);
      env_.controller->StreamGone(stream, close->why);
      OnStreamLost(stream, close->why);
    }
  } else if (std::get_if<agent::Dropped>(&effect)) {
    env_.truth->Count("dropped by agents");
  } else if (const auto* persist = std::get_if<agent::PersistStep>(&effect)) {
    Persist(*persist);  // answers without a keeper, too
  } else if (keeper_) {
    CarryOutInKeeper(effect);
  }
}

}  // namespace everstep::sim
