#include "worker/agent/convert.h"

#include <fmt/format.h>

#include "proto/base/names.h"
#include "proto/wire/convert.h"
#include "worker/agent/log_layout.h"

namespace everstep::agent {
namespace {
namespace v1 = everstep::v1;

Duration Grace(const v1::Command& command, bool failed) {
  return Milliseconds(failed ? command.restart_grace_ms() : command.stop_grace_ms());
}

std::vector<Cut> CutsOf(const google::protobuf::RepeatedPtrField<v1::Cut>& from) {
  std::vector<Cut> cuts;
  cuts.reserve(static_cast<std::size_t>(from.size()));
  for (const v1::Cut& cut : from) cuts.push_back(wire::FromProto(cut));
  return cuts;
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
    case v1::ControllerMessage::kPersist: return &m.persist().job();
    case v1::ControllerMessage::kRepairShard: return &m.repair_shard().job();
    case v1::ControllerMessage::kBuildShard: return &m.build_shard().job();
    case v1::ControllerMessage::kKillForDrill: return &m.kill_for_drill().job();
    case v1::ControllerMessage::kToldAck: return &m.told_ack().job();
    default: return nullptr;
  }
}

}  // namespace

Activate ActivateFromWire(const v1::Activate& m) {
  Activate e;
  e.job = m.job();
  e.generation = m.generation();
  e.command = wire::FromProto(m.command());
  e.world_size = m.world_size();
  e.group_world_size = m.group_world_size();
  e.nproc_per_node = m.nproc_per_node();
  e.master_addr = m.master_addr();
  e.master_port = m.master_port();
  e.restart_count = m.restart_count();
  e.data_key = m.data_key();
  e.committed_step = m.committed_step();
  e.plan = wire::FromProto(m.plan());
  e.given_up = CutsOf(m.given_up());
  if (m.has_cut()) e.cut = wire::FromProto(m.cut());
  e.kept_by_parity = m.kept_by_parity();
  return e;
}

v1::Activate ToWire(const Activate& e) {
  v1::Activate m;
  m.set_job(e.job);
  m.set_generation(e.generation);
  wire::ToProto(e.command, m.mutable_command());
  m.set_world_size(e.world_size);
  m.set_group_world_size(e.group_world_size);
  m.set_nproc_per_node(e.nproc_per_node);
  m.set_master_addr(e.master_addr);
  m.set_master_port(e.master_port);
  m.set_restart_count(e.restart_count);
  m.set_data_key(e.data_key);
  m.set_committed_step(e.committed_step);
  wire::ToProto(e.plan, m.mutable_plan());
  for (const Cut& cut : e.given_up) wire::ToProto(cut, m.add_given_up());
  if (!e.cut.shards.empty()) wire::ToProto(e.cut, m.mutable_cut());
  m.set_kept_by_parity(e.kept_by_parity);
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
      return Warm{header, m.warm().job(), wire::FromProto(m.warm().command())};
    case v1::ControllerMessage::kPrepare: {
      const v1::Prepare& p = m.prepare();
      return Prepare{header,         p.job(),
                     p.generation(), wire::FromProto(p.command()),
                     p.host_store(), Grace(p.command(), p.failed()),
                     p.data_key(),   CutsOf(p.given_up()),
                     p.park(),       !p.failed()};
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
    case v1::ControllerMessage::kPersist: {
      const v1::Persist& p = m.persist();
      return Persist{header,
                     p.job(),
                     p.generation(),
                     p.step(),
                     {p.ranks().begin(), p.ranks().end()},
                     p.has_verified() ? wire::FromProto(p.verified()) : Cut{}};
    }
    case v1::ControllerMessage::kRepairShard: {
      const v1::RepairShard& r = m.repair_shard();
      return RepairShard{header, r.job(), wire::FromProto(r.shard()), r.source_node(),
                         r.source_address()};
    }
    case v1::ControllerMessage::kBuildShard: {
      const v1::BuildShard& b = m.build_shard();
      BuildShard e{header, b.job(), b.generation(), {}};
      e.build.shard = wire::FromProto(b.shard());
      e.build.parity = b.parity();
      e.build.group.assign(b.group().begin(), b.group().end());
      for (const v1::CutShard& s : b.sources()) e.build.sources.push_back(wire::FromProto(s));
      return e;
    }
    case v1::ControllerMessage::kToldAck: {
      const v1::ToldAck& t = m.told_ack();
      return ToldAck{header, t.job(), t.generation(), t.rank(), t.sequence()};
    }
    case v1::ControllerMessage::kTailLogs: {
      const v1::TailLogs& t = m.tail_logs();
      return TailLogs{header,     t.request(),    t.job(),   t.rank(),
                      t.follow(), t.tail_lines(), t.cancel()};
    }
    case v1::ControllerMessage::kKillForDrill:
      return KillForDrill{header, m.kill_for_drill().job(), m.kill_for_drill().rank(),
                          m.kill_for_drill().signal()};
    case v1::ControllerMessage::kHeard: return Heard{header};
    case v1::ControllerMessage::BODY_NOT_SET: break;
  }
  *error = "a command this agent does not know; is the controller newer? upgrade the agent";
  return std::nullopt;
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
  wire::ToProto(e.holds, p->mutable_holds());
  p->set_refused(e.refused);
  p->set_message(e.message);
  return m;
}

v1::AgentMessage ToWire(const SendActivated& e) {
  v1::AgentMessage m;
  v1::Activated* a = m.mutable_activated();
  a->set_job(e.job);
  a->set_generation(e.generation);
  for (const WorkerOnNode& w : e.workers) wire::ToProto(w, a->add_workers());
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
  wire::ToProto(e.worker.exit, w->mutable_exit());
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
  wire::ToProto(e.shard, m.mutable_shard_copied()->mutable_shard());
  return m;
}

v1::AgentMessage ToWire(const SendShardDamaged& e) {
  v1::AgentMessage m;
  v1::ShardDamaged* d = m.mutable_shard_damaged();
  d->set_job(e.damaged.job);
  wire::ToProto(e.damaged.shard, d->mutable_shard());
  d->set_chunk(e.damaged.chunk);
  d->set_found_by(e.damaged.found_by);
  return m;
}

v1::AgentMessage ToWire(const SendPersisted& e) {
  const Persisted& from = e.persisted;
  v1::AgentMessage m;
  v1::Persisted* p = m.mutable_persisted();
  p->set_job(from.job);
  p->set_generation(from.generation);
  p->set_step(from.step);
  p->set_sealed(from.sealed);
  p->set_bytes(from.bytes);
  p->set_ms(static_cast<std::uint32_t>(ToMilliseconds(from.took)));
  p->set_error(from.error);
  p->set_missing(from.missing);
  return m;
}

v1::AgentMessage ToWire(const SendTold& e) {
  v1::AgentMessage m;
  m.mutable_told()->set_job(e.told.job);
  m.mutable_told()->set_generation(e.told.generation);
  m.mutable_told()->set_rank(e.told.rank);
  m.mutable_told()->set_words(e.told.words);
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
