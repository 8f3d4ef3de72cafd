#include "worker/agent/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "checkpoint/core/gap_trace.h"
#include "proto/base/endpoint.h"
#include "proto/base/log.h"
#include "proto/wire/convert.h"
#include "worker/agent/convert.h"
#include "worker/agent/error_file.h"
#include "worker/agent/node_dir.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

constexpr Duration kLookForSuccessor = Milliseconds(50);  // while no controller answers
constexpr Duration kIdleWakeup = Seconds(5);
// A node without a keeper runs nothing; its controller must not go on thinking that it does.
constexpr Duration kKeeperAwayLimit = Seconds(3);
constexpr Duration kKeeperEndSlack = Seconds(3);

void Earliest(std::optional<Timestamp>* out, const std::optional<Timestamp>& t) {
  if (t && (!*out || *t < **out)) *out = t;
}

}  // namespace

Engine::Engine(AgentOptions options, const Clock* clock, TransferFactory transfer)
    : options_(std::move(options)),
      clock_(clock),
      transfer_factory_(std::move(transfer)),
      identity_{options_.node, options_.node_dir, options_.keeper_socket},
      boot_id_(BootId()),
      pid_namespace_(PidNamespace()),
      core_(CoreOptions{}),
      backoff_({}, static_cast<std::uint64_t>(clock->Now().ns)),
      mailbox_(kMailbox) {}

Engine::~Engine() {
  mailbox_.Close();
  tailer_.reset();
  session_.reset();
  if (transfer_ != nullptr) transfer_->Stop();
  files_.Stop();
  memory_.Stop();
  disk_load_.Stop();
  disk_look_.Stop();
  disk_.Stop();
  transfer_.reset();
  keeper_.reset();
}

void Engine::Post(std::function<void()> task) {
  // A message that is lost here is made good by starting over with a whole state on every side.
  if (!mailbox_.Push(std::move(task)) && !mailbox_.closed()) overflow_ = true;
}

void Engine::Feed(Event event) {
  events_.push_back(std::move(event));
  if (stepping_) return;
  stepping_ = true;
  while (!events_.empty()) {
    const Event next = std::move(events_.front());
    events_.pop_front();
    Effects effects;
    core_.Step(clock_->Now(), next, &effects);
    incarnation_ = core_.incarnation();
    for (const Effect& effect : effects) Carry(effect);
  }
  stepping_ = false;
}

int Engine::Run() {
  std::vector<std::string> controllers = options_.controllers;
  std::string error;
  if (!local_command_.Load(options_.local_command, &error)) {
    fmt::print(stderr, "everstep-agent: {}\n", error);
    return 1;
  }
  if (!controllers.empty() && !WriteControllers(options_.node_dir, controllers, &error)) {
    LogError("start_failed", {{"why", error}});
    fmt::print(stderr, "everstep-agent: {}\n", error);
    return 1;
  }
  if (controllers.empty()) controllers = ReadControllers(options_.node_dir);
  address_ = options_.address;
  if (address_.empty()) {
    address_ = controllers.empty() ? "127.0.0.1" : LocalAddressTowards(controllers.front());
  }
  LogInfo("agent_started", {{"node", options_.node},
                            {"pid", static_cast<std::int32_t>(getpid())},
                            {"address", address_},
                            {"controller", controllers.empty() ? "-" : controllers.front()}});
  if (!IsLoopback(address_)) {
    LogWarning("channel_not_encrypted",
               {{"address", address_}, {"why", "sessions and checkpoints travel in the clear"}});
  }

  SessionCallbacks session;
  session.on_message = [this](std::uint64_t stream, v1::ControllerMessage message) {
    if (++inbound_ > kMaxInbound) {
      --inbound_;
      overflow_ = true;
      return;
    }
    local_command_.Overlay(&message);
    auto shared = std::make_shared<v1::ControllerMessage>(std::move(message));
    Post([this, stream, shared] {
      --inbound_;
      OnMessage(stream, *shared);
    });
  };
  session.on_lost = [this](std::uint64_t stream, std::string why) {
    Post([this, stream, why = std::move(why)] { OnStreamLost(stream, why); });
  };
  session_ = std::make_unique<SessionClient>(std::move(session));
  tailer_ = std::make_unique<LogTailer>(
      [this](TailChunk chunk) {
        v1::AgentMessage m;
        m.set_incarnation(incarnation_);
        v1::LogLines* lines = m.mutable_log_lines();
        lines->set_request(chunk.request);
        lines->set_job(chunk.file.job);
        lines->set_generation(chunk.file.generation);
        lines->set_rank(chunk.file.rank);
        lines->set_from_stderr(chunk.file.from_stderr);
        lines->set_data(std::move(chunk.data));
        lines->set_end(chunk.end);
        session_->Send(std::move(m));
      },
      [this] { return session_->waiting_bytes(); });

  KeeperCallbacks keeper;
  keeper.on_attached = [this](std::uint64_t link, v1::KeeperState state, bool started) {
    // On the door's thread: error files of workers that ended while no agent looked.
    Adopted adopted = Adopt(state);
    for (AdoptedJob& job : adopted.attached.jobs) {
      for (WorkerOnNode& w : job.holds.workers) {
        if (!w.running && w.pid != 0) FillError("", &w.exit);
      }
    }
    auto shared = std::make_shared<v1::KeeperState>(std::move(state));
    Post([this, link, shared, started, adopted = std::move(adopted)] {
      OnKeeperAttached(link, *shared, started, adopted);
    });
  };
  keeper.on_event = [this](std::uint64_t link, v1::KeeperReply event) {
    Post([this, link, event = std::move(event)] { OnKeeperEvent(link, event); });
  };
  keeper.on_lost = [this](std::uint64_t link, std::string why) {
    Post([this, link, why = std::move(why)] { OnKeeperLost(link, why); });
  };
  keeper.on_failed = [this](std::string why, bool hopeless) {
    Post([this, why = std::move(why), hopeless] { OnKeeperFailed(why, hopeless); });
  };
  keeper_ = std::make_unique<KeeperDoor>(
      KeeperDoorOptions{options_.keeper_socket, options_.keeper_program, options_.node,
                        options_.node_dir + "/keeper.log", options_.lifeline},
      std::move(keeper));
  file_plane_ = std::make_unique<FilePlane>(checkpoint::PosixDisk(), keeper_.get());
  StartTransfer();
  Attach();

  while (!done_) {
    const Timestamp now = clock_->Now();
    const Duration wait = std::clamp(NextTimer().value_or(now + kIdleWakeup) - now, Duration{},
                                     Duration(kIdleWakeup));
    for (const auto& task : mailbox_.PopAll(std::chrono::steady_clock::now() + wait)) {
      task();
      if (done_) break;
    }
    if (overflow_.exchange(false)) HandleOverflow();
    if (!done_) CheckTimers(clock_->Now());
  }
  return exit_code_;
}

void Engine::HandleOverflow() {
  LogError("mailbox_overflow", {{"node", options_.node}, {"limit", std::uint64_t{kMailbox}}});
  session_->Close("the agent does not keep up");
  link_ = 0;
  Attach();
}

std::optional<Timestamp> Engine::NextTimer() const {
  std::optional<Timestamp> next = core_.NextWakeup();
  Earliest(&next, dial_at_);
  if (dial_at_) Earliest(&next, look_at_);
  Earliest(&next, register_by_);
  Earliest(&next, attach_at_);
  Earliest(&next, keeper_look_at_);
  Earliest(&next, leave_by_);
  Earliest(&next, shutdown_by_);
  if (!exits_.empty()) Earliest(&next, exits_.begin()->second.tell_by);
  return next;
}

void Engine::CheckTimers(Timestamp now) {
  if (const auto wakeup = core_.NextWakeup(); wakeup && *wakeup <= now) Feed(Tick{});
  if (attach_at_ && *attach_at_ <= now) {
    attach_at_.reset();
    Attach();
  }
  if (keeper_look_at_ && *keeper_look_at_ <= now) CheckKeeper(now);
  if (keeper_away_since_ && core_.registered() && now - *keeper_away_since_ > kKeeperAwayLimit) {
    session_->Close("this node's keeper is away");
  }
  if (register_by_ && *register_by_ <= now) {
    register_by_.reset();
    session_->Close(
        fmt::format("no registration within {} ms", ToMilliseconds(next_dial_.patience)));
  }
  // A successor's address is worth a dial at once, however long the old one's waits have become.
  if (dial_at_ && look_at_ <= now) {
    look_at_ = now + kLookForSuccessor;
    if (ReadControllers(options_.node_dir) != dialled_) {
      backoff_.Succeeded();
      stood_.clear();
      next_dial_ = {};
      dial_at_ = now;
    }
  }
  if (dial_at_ && *dial_at_ <= now) {
    dial_at_.reset();
    Dial();
  }
  TellLateExits(now);
  CheckLeave(now);
}

void Engine::StartTransfer() {
  if (!transfer_factory_) return;
  checkpoint::TransferOptions o;
  o.bind_address = IsLoopback(address_) ? "127.0.0.1" : address_;
  o.streams = static_cast<int>(options_.ckpt_streams);
  o.scrub = {.bytes_per_s = static_cast<std::uint64_t>(options_.scrub_mib_per_s * (1 << 20)),
             .every = std::chrono::milliseconds(ToMilliseconds(options_.scrub_every))};
  if (!options_.ckpt_gap_trace.empty()) {
    std::ifstream file(options_.ckpt_gap_trace);
    const std::string text(std::istreambuf_iterator<char>(file), {});
    const std::string wrong = file.is_open() ? checkpoint::ParseGapTrace(text, &o.pacing)
                                             : std::string("it cannot be read");
    if (wrong.empty()) {
      LogInfo("gap_trace_read",
              {{"file", options_.ckpt_gap_trace},
               {"spans", static_cast<std::uint64_t>(o.pacing.busy_then_idle_s.size() / 2)}});
    } else {
      LogWarning("gap_trace_refused", {{"file", options_.ckpt_gap_trace}, {"error", wrong}});
    }
  }
  const bool any = options_.data_port == 0;
  o.port = any ? ReadDataPort(options_.node_dir) : static_cast<std::uint16_t>(options_.data_port);
  auto started = transfer_factory_(o, keeper_.get(), this, file_plane_.get());
  if (!started.ok() && any && o.port != 0) {  // somebody took the port meanwhile
    o.port = 0;
    started = transfer_factory_(o, keeper_.get(), this, file_plane_.get());
  }
  if (started.ok()) {
    transfer_ = std::move(started.value());
    WriteDataPort(options_.node_dir, transfer_->port());
    LogInfo("data_plane_started",
            {{"address", o.bind_address}, {"port", std::uint32_t{transfer_->port()}}});
  } else {
    // The node runs workers all the same; their checkpoints stay on it alone.
    LogError("data_plane_failed", {{"address", o.bind_address}, {"why", started.error().message}});
  }
}

// --- the session ---

void Engine::Dial() {
  if (link_ == 0 || done_) return;  // OnKeeperAttached dials
  std::vector<std::string> controllers = ReadControllers(options_.node_dir);
  dialled_ = controllers;
  if (controllers.empty()) controllers = options_.controllers;
  if (controllers.empty()) {
    if (last_loss_ != "no address") {
      LogError("controller_unknown",
               {{"why", "no --controller was given and STATE/nodes/NAME/controller names none"}});
    }
    last_loss_ = "no address";
    dial_at_ = clock_->Now() + Seconds(1);
    return;
  }
  if (const auto stood = std::find(controllers.begin(), controllers.end(), stood_);
      stood != controllers.end()) {
    std::rotate(controllers.begin(), stood, stood + 1);
  }
  addresses_ = controllers.size();
  dialling_ = controllers[next_dial_.index % addresses_];
  stream_ = session_->Dial(dialling_);
  stream_open_ = true;
  register_by_ = clock_->Now() + next_dial_.patience;
  Feed(SessionOpened{});
}

void Engine::OnMessage(std::uint64_t stream, const v1::ControllerMessage& message) {
  if (stream != stream_ || !stream_open_) return;
  std::string error;
  std::optional<Event> event = FromWire(message, &error);
  if (!event) {
    LogWarning("message_refused", {{"why", error}, {"sequence", message.sequence()}});
    return;
  }
  if (auto* stop = std::get_if<StopJob>(&*event)) {
    const auto job = core_.jobs().find(stop->job);
    v1::Command command;
    if (job != core_.jobs().end() && wire::ToProto(job->second.command, &command)) {
      stop->grace = Milliseconds(message.stop_job().failed() ? command.restart_grace_ms()
                                                             : command.stop_grace_ms());
    }
  }
  if (message.has_warm()) local_world_[message.warm().job()] = message.warm().nproc_per_node();
  const bool before = core_.registered();
  Feed(std::move(*event));
  if (!before && core_.registered()) {
    backoff_.Succeeded();
    stood_ = dialling_;
    register_by_.reset();
    last_loss_.clear();
    LogInfo("registered", {{"node", options_.node},
                           {"incarnation", core_.incarnation()},
                           {"cluster", message.registered().cluster()},
                           {"heartbeat_ms", message.registered().heartbeat_interval_ms()},
                           {"lease_ms", message.registered().lease_ms()},
                           {"controller_version", message.registered().controller_version()}});
  }
}

void Engine::OnStreamLost(std::uint64_t stream, const std::string& why) {
  if (stream != stream_ || !stream_open_) return;
  stream_open_ = false;
  register_by_.reset();
  tailer_->CancelAll();
  follows_.clear();
  if (why != last_loss_) {
    LogWarning("session_lost", {{"node", options_.node}, {"why", why}});
    last_loss_ = why;
  }
  Feed(SessionLost{why});
  next_dial_ = backoff_.Next(addresses_);
  dial_at_ = clock_->Now() + next_dial_.wait;
  look_at_ = clock_->Now();
}

void Engine::Send(v1::AgentMessage message) {
  if (!message.has_register_()) message.set_incarnation(core_.incarnation());
  session_->Send(std::move(message));
}

// --- the node's end ---

void Engine::Leave(const std::string& source) {
  Post([this, source] {
    const Timestamp now = clock_->Now();
    LogInfo("leaving", {{"node", options_.node}, {"source", source}, {"again", leaving_}});
    if (leaving_) {
      leave_by_ = now;
    } else {
      leaving_ = true;
      leave_by_ = now + options_.leave_timeout;
      if (options_.leave_timeout > Duration{}) Feed(Notice{source, options_.leave_timeout});
    }
    CheckLeave(now);
  });
}

void Engine::Quit() {
  Post([this] {
    LogInfo("agent_quits", {{"node", options_.node}, {"keeper_pid", keeper_pid_}});
    Finish(0);
  });
}

void Engine::LifelineCut() {
  Post([this] {
    LogInfo("lifeline_cut", {{"node", options_.node}});
    leaving_ = true;
    leave_by_.reset();
    if (!shutdown_by_) BeginShutdown();
  });
}

void Engine::CheckLeave(Timestamp now) {
  if (shutdown_by_) {
    if (now >= *shutdown_by_) {
      LogError("keeper_outlives",
               {{"pid", keeper_pid_}, {"why", "it did not end in time; kill it by its pid"}});
      Finish(1);
    }
    return;
  }
  if (!leaving_) return;
  bool runs = false;
  for (const auto& [id, job] : core_.jobs()) {
    runs |= std::any_of(job.workers.begin(), job.workers.end(),
                        [](const WorkerOnNode& w) { return w.running; });
    runs |= !job.old_workers.empty() || job.persisting > 0;
  }
  if (runs && core_.registered() && leave_by_ && now < *leave_by_) return;
  BeginShutdown();
}

void Engine::BeginShutdown() {
  leave_by_.reset();
  shutdown_by_ = clock_->Now() + options_.stop_grace + kKeeperEndSlack;
  if (link_ == 0) {
    // One that is being started is ended by OnKeeperAttached.
    if (!attaching_ && ProcessStartTime(keeper_pid_) == 0) Finish(0);
    return;
  }
  AskShutdown();
}

void Engine::AskShutdown() {
  v1::KeeperRequest request;
  request.mutable_shutdown()->set_grace_ms(
      static_cast<std::uint32_t>(ToMilliseconds(options_.stop_grace)));
  Ask(std::move(request), nullptr);  // OnKeeperLost ends the agent
}

void Engine::Finish(int exit_code) {
  if (done_) return;
  done_ = true;
  exit_code_ = exit_code;
  LogInfo("agent_ended", {{"node", options_.node}, {"exit", exit_code}});
}

// --- the checkpoint plane's threads ---

void Engine::OnCaptured(const JobId& job, Generation generation, Rank, Step step) {
  Post([this, job, generation, step] { Feed(StepCaptured{job, generation, step}); });
}

void Engine::OnCopied(const JobId& job, const HeldShard& shard) {
  Post([this, job, shard] {
    held_.Note(job, shard);
    Feed(ShardCopied{job, shard});
  });
}

void Engine::OnDamaged(const JobId& job, const HeldShard& shard, std::int64_t chunk,
                       const char* by) {
  Post([this, job, shard, chunk, by] {
    held_.Drop(job, shard);
    Feed(ShardDamaged{job, shard, chunk, by});
  });
}

void Engine::OnTrouble(const JobId& job, const std::string& what) {
  LogWarning("checkpoint_trouble", {{"job", job}, {"why", what}});
}

}  // namespace everstep::agent
