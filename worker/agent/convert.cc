#include "worker/agent/convert.h"

#include <fmt/format.h>

#include "worker/agent/log_layout.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

// An error file at most; more is cut at the wire (agent.proto).
constexpr std::size_t kMaxErrorJson = 64u << 10;

CommandSpec Opaque(const v1::Command& command) {
  return {command.SerializeAsString()};
}

Duration Grace(const v1::Command& command, bool failed) {
  return Milliseconds(failed ? command.restart_grace_ms() : command.stop_grace_ms());
}

RestorePlan RestoreFromWire(const v1::Restore& m) {
  RestorePlan out;
  out.step = m.step();
  out.shard_rank = m.shard_rank();
  out.shard_generation = m.shard_generation();
  out.crc_root = m.crc_root();
  out.bytes = m.bytes();
  out.source_node = m.source_node();
  out.source_address = m.source_address();
  return out;
}

v1::Restore RestoreToWire(const RestorePlan& r) {
  v1::Restore m;
  m.set_step(r.step);
  m.set_shard_rank(r.shard_rank);
  m.set_shard_generation(r.shard_generation);
  m.set_crc_root(r.crc_root);
  m.set_bytes(r.bytes);
  m.set_source_node(r.source_node);
  m.set_source_address(r.source_address);
  return m;
}

v1::ExitInfo ExitToWire(const ExitInfo& e) {
  v1::ExitInfo m;
  m.set_code(e.code);
  m.set_oom_killed(e.oom_killed);
  m.set_by_everstep(e.by_everstep);
  m.set_exit_ns(e.occurred.ns);
  m.set_error_json(e.error_json.substr(0, kMaxErrorJson));
  m.set_error_file(e.error_file);
  m.set_error_time_ns(e.error_time.ns);
  m.set_ran_ms(ToMilliseconds(e.ran));
  return m;
}

v1::WorkerOnNode WorkerToWire(const WorkerOnNode& w) {
  v1::WorkerOnNode m;
  m.set_rank(w.rank);
  m.set_local_rank(w.local_rank);
  m.set_pid(w.pid);
  m.set_running(w.running);
  if (!w.running) *m.mutable_exit() = ExitToWire(w.exit);
  return m;
}

// The job a command is about; null: it is about none.
const std::string* JobOf(const v1::ControllerMessage& m) {
  switch (m.body_case()) {
    case v1::ControllerMessage::kWarm: return &m.warm().job();
    case v1::ControllerMessage::kPrepare: return &m.prepare().job();
    case v1::ControllerMessage::kActivate: return &m.activate().job();
    case v1::ControllerMessage::kStopJob: return &m.stop_job().job();
    case v1::ControllerMessage::kCommitted: return &m.committed().job();
    case v1::ControllerMessage::kTailLogs: return &m.tail_logs().job();
    case v1::ControllerMessage::kKillForDrill: return &m.kill_for_drill().job();
    default: return nullptr;
  }
}

}  // namespace

bool ParseCommand(const CommandSpec& spec, v1::Command* command) {
  return command->ParseFromString(spec.opaque);
}

Activate ActivateFromWire(const v1::Activate& m) {
  Activate e;
  e.job = m.job();
  e.generation = m.generation();
  e.command = Opaque(m.command());
  e.world_size = m.world_size();
  e.group_world_size = m.group_world_size();
  e.nproc_per_node = m.nproc_per_node();
  e.master_addr = m.master_addr();
  e.master_port = m.master_port();
  e.restart_count = m.restart_count();
  e.data_key = m.data_key();
  e.committed_step = m.committed_step();
  e.plan.node = m.plan().node();
  e.plan.group_rank = m.plan().group_rank();
  e.plan.address = m.plan().address();
  e.plan.data_port = m.plan().data_port();
  e.plan.replica_node = m.plan().replica_node();
  e.plan.replica_address = m.plan().replica_address();
  for (const v1::WorkerPlan& w : m.plan().workers()) {
    WorkerPlan plan;
    plan.rank = w.rank();
    plan.local_rank = w.local_rank();
    if (w.has_restore()) plan.restore = RestoreFromWire(w.restore());
    e.plan.workers.push_back(std::move(plan));
  }
  return e;
}

v1::Activate ToWire(const Activate& e) {
  v1::Activate m;
  m.set_job(e.job);
  m.set_generation(e.generation);
  m.mutable_command()->ParseFromString(e.command.opaque);
  m.set_world_size(e.world_size);
  m.set_group_world_size(e.group_world_size);
  m.set_nproc_per_node(e.nproc_per_node);
  m.set_master_addr(e.master_addr);
  m.set_master_port(e.master_port);
  m.set_restart_count(e.restart_count);
  m.set_data_key(e.data_key);
  m.set_committed_step(e.committed_step);
  v1::NodePlan* plan = m.mutable_plan();
  plan->set_node(e.plan.node);
  plan->set_group_rank(e.plan.group_rank);
  plan->set_address(e.plan.address);
  plan->set_data_port(e.plan.data_port);
  plan->set_replica_node(e.plan.replica_node);
  plan->set_replica_address(e.plan.replica_address);
  for (const WorkerPlan& w : e.plan.workers) {
    v1::WorkerPlan* worker = plan->add_workers();
    worker->set_rank(w.rank);
    worker->set_local_rank(w.local_rank);
    worker->set_role_rank(w.rank);
    *worker->mutable_restore() = RestoreToWire(w.restore);
  }
  return m;
}

std::optional<Event> FromWire(const v1::ControllerMessage& m, std::string* error) {
  const Header header{m.incarnation(), m.sequence()};
  if (const std::string* job = JobOf(m); job != nullptr && !IsSafeName(*job)) {
    *error = fmt::format("the job name '{}' is not [A-Za-z0-9_.-]{{1,128}}", job->substr(0, 200));
    return std::nullopt;
  }
  switch (m.body_case()) {
    case v1::ControllerMessage::kRegistered: {
      Registered e;
      e.header = header;
      e.heartbeat_interval = Milliseconds(m.registered().heartbeat_interval_ms());
      e.lease = Milliseconds(m.registered().lease_ms());
      e.known_jobs.assign(m.registered().known_jobs().begin(), m.registered().known_jobs().end());
      return e;
    }
    case v1::ControllerMessage::kWarm:
      return Warm{header, m.warm().job(), Opaque(m.warm().command())};
    case v1::ControllerMessage::kPrepare: {
      const v1::Prepare& p = m.prepare();
      return Prepare{header,         p.job(),
                     p.generation(), Opaque(p.command()),
                     p.host_store(), Grace(p.command(), p.failed()),
                     p.data_key()};
    }
    case v1::ControllerMessage::kActivate: {
      Activate e = ActivateFromWire(m.activate());
      e.header = header;
      return e;
    }
    case v1::ControllerMessage::kStopJob: {
      // StopJob carries no command: the shell replaces the grace by the job's own (Agent::Grace).
      const v1::StopJob& s = m.stop_job();
      return StopJob{header, s.job(), s.generation(), s.forget(), Duration{}};
    }
    case v1::ControllerMessage::kCommitted: {
      const v1::Committed& c = m.committed();
      return Committed{header, c.job(), c.generation(), c.step(),
                       c.has_released_step() ? c.released_step() : kNoStep};
    }
    case v1::ControllerMessage::kTailLogs: {
      const v1::TailLogs& t = m.tail_logs();
      return TailLogs{header,     t.request(),    t.job(),   t.rank(),
                      t.follow(), t.tail_lines(), t.cancel()};
    }
    case v1::ControllerMessage::kKillForDrill:
      return KillForDrill{header, m.kill_for_drill().job(), m.kill_for_drill().rank(),
                          m.kill_for_drill().signal()};
    case v1::ControllerMessage::BODY_NOT_SET: break;
  }
  *error = "a command this agent does not know; is the controller newer? upgrade the agent";
  return std::nullopt;
}

v1::HeldShard ToWire(const HeldShard& s) {
  v1::HeldShard m;
  m.set_rank(s.rank);
  m.set_world_size(s.world_size);
  m.set_generation(s.generation);
  m.set_step(s.step);
  m.set_crc_root(s.crc_root);
  m.set_bytes(s.bytes);
  m.set_replica(s.replica);
  m.set_replicated_layout(s.replicated_layout);
  return m;
}

v1::JobOnNode ToWire(const JobOnNode& job) {
  v1::JobOnNode m;
  m.set_job(job.job);
  m.set_generation(job.generation);
  m.set_activated(job.activated);
  for (const WorkerOnNode& w : job.workers) *m.add_workers() = WorkerToWire(w);
  for (const HeldShard& s : job.shards) *m.add_shards() = ToWire(s);
  return m;
}

v1::AgentMessage ToWire(const SendHeartbeat& e) {
  v1::AgentMessage m;
  v1::Heartbeat* beat = m.mutable_heartbeat();
  beat->set_sequence(e.sequence);
  beat->set_sent_ns(e.sent.ns);
  beat->set_interval_ms(static_cast<std::uint32_t>(ToMilliseconds(e.interval)));
  for (const JobProgress& job : e.jobs) {
    v1::JobProgress* p = beat->add_jobs();
    p->set_job(job.job);
    p->set_generation(job.generation);
    p->set_step(job.step);
    p->set_running(job.running);
  }
  return m;
}

v1::AgentMessage ToWire(const SendPrepared& e) {
  v1::AgentMessage m;
  v1::Prepared* p = m.mutable_prepared();
  p->set_job(e.holds.job);
  p->set_generation(e.holds.generation);
  p->set_store_port(e.store_port);
  *p->mutable_holds() = ToWire(e.holds);
  p->set_refused(e.refused);
  p->set_message(e.message);
  return m;
}

v1::AgentMessage ToWire(const SendActivated& e) {
  v1::AgentMessage m;
  v1::Activated* a = m.mutable_activated();
  a->set_job(e.job);
  a->set_generation(e.generation);
  for (const WorkerOnNode& w : e.workers) *a->add_workers() = WorkerToWire(w);
  a->set_failed(e.failed);
  a->set_message(e.message);
  return m;
}

v1::AgentMessage ToWire(const SendWorkerExited& e) {
  v1::AgentMessage m;
  v1::WorkerExited* w = m.mutable_worker_exited();
  w->set_job(e.job);
  w->set_generation(e.generation);
  w->set_rank(e.worker.rank);
  w->set_local_rank(e.worker.local_rank);
  w->set_pid(e.worker.pid);
  *w->mutable_exit() = ExitToWire(e.worker.exit);
  return m;
}

v1::AgentMessage ToWire(const SendWorkerStalled& e) {
  v1::AgentMessage m;
  v1::WorkerStalled* w = m.mutable_worker_stalled();
  w->set_job(e.stalled.job);
  w->set_generation(e.stalled.generation);
  w->set_rank(e.stalled.rank);
  w->set_kind(static_cast<v1::WorkerStalled::Kind>(e.stalled.kind));
  w->set_evidence(e.stalled.evidence);
  w->set_stalled_ms(ToMilliseconds(e.stalled.stalled));
  return m;
}

v1::AgentMessage ToWire(const SendShardCopied& e) {
  v1::AgentMessage m;
  m.mutable_shard_copied()->set_job(e.job);
  *m.mutable_shard_copied()->mutable_shard() = ToWire(e.shard);
  return m;
}

v1::AgentMessage ToWire(const SendNotice& e) {
  v1::AgentMessage m;
  m.mutable_notice()->set_source(e.notice.source);
  m.mutable_notice()->set_deadline_ms(ToMilliseconds(e.notice.deadline));
  return m;
}

v1::AgentMessage ToWire(const SendNodeWarm& e) {
  v1::AgentMessage m;
  m.mutable_node_warm()->set_job(e.job);
  m.mutable_node_warm()->set_warm(e.warm);
  m.mutable_node_warm()->set_message(e.message);
  return m;
}

v1::AgentMessage ToWire(const SendStopped& e) {
  v1::AgentMessage m;
  m.mutable_stopped()->set_job(e.job);
  m.mutable_stopped()->set_generation(e.generation);
  return m;
}

}  // namespace everstep::agent
