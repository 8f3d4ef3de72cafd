#include "controller/server/convert.h"

#include <fmt/format.h>

#include <algorithm>

#include "controller/store/convert.h"
#include "proto/base/names.h"
#include "proto/base/version.h"
#include "proto/wire/convert.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kMaxAddress = 255;
constexpr int kMaxLabels = 64;
constexpr std::size_t kMaxLabelBytes = 1024;

// What an agent writes for people is cut here: it goes into records and logs.
std::string Cut(const std::string& text, std::size_t limit = 4096) {
  return text.size() <= limit ? text : text.substr(0, limit) + "...";
}

// The wire bounds an exit's JSON itself.
ExitInfo FromProto(const v1::ExitInfo& from) {
  ExitInfo to = wire::FromProto(from);
  to.error_file = Cut(to.error_file);
  return to;
}

WorkerOnNode FromProto(const v1::WorkerOnNode& from) {
  WorkerOnNode to = wire::FromProto(from);
  to.exit.error_file = Cut(to.exit.error_file);
  return to;
}

JobOnNode FromProto(const v1::JobOnNode& from) {
  JobOnNode to = wire::FromProto(from);
  for (WorkerOnNode& worker : to.workers) worker.exit.error_file = Cut(worker.exit.error_file);
  return to;
}

PlanNumbers NumbersOf(const std::shared_ptr<const GenerationPlan>& plan) {
  PlanNumbers numbers{plan, PlanCrc(*plan), 0, 0};
  for (const NodePlan& node : plan->nodes) {
    numbers.world_size += static_cast<std::uint32_t>(node.workers.size());
  }
  return numbers;
}

struct Writer {
  v1::ControllerMessage* m;
  PlanNumbers* numbers;

  void operator()(const RegisteredCommand& c) const {
    v1::Registered* to = m->mutable_registered();
    to->set_heartbeat_interval_ms(static_cast<std::uint32_t>(ToMilliseconds(c.heartbeat_interval)));
    to->set_lease_ms(static_cast<std::uint32_t>(ToMilliseconds(c.lease)));
    to->set_controller_version(kVersion);
    for (const JobId& job : c.known_jobs) to->add_known_jobs(job);
  }
  void operator()(const WarmCommand& c) const {
    v1::Warm* to = m->mutable_warm();
    to->set_job(c.job);
    wire::ToProto(c.command, to->mutable_command());
    to->set_nproc_per_node(c.nproc_per_node);
  }
  void operator()(const PrepareCommand& c) const {
    v1::Prepare* to = m->mutable_prepare();
    to->set_job(c.job);
    to->set_generation(c.generation);
    wire::ToProto(c.command, to->mutable_command());
    to->set_nproc_per_node(c.nproc_per_node);
    to->set_host_store(c.host_store);
    to->set_failed(c.failed);
    to->set_data_key(c.data_key);
    for (const everstep::Cut& cut : c.given_up) wire::ToProto(cut, to->add_given_up());
    to->set_park(c.park);
  }
  void operator()(const ActivateCommand& c) const {
    v1::Activate* to = m->mutable_activate();
    to->set_job(c.plan->job);
    to->set_generation(c.plan->generation);
    if (numbers->plan != c.plan) *numbers = NumbersOf(c.plan);
    const std::vector<NodePlan>& nodes = c.plan->nodes;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      const std::size_t at = (numbers->next + i) % nodes.size();
      if (nodes[at].node != c.node) continue;
      wire::ToProto(nodes[at], to->mutable_plan());
      numbers->next = at + 1;
      break;
    }
    to->set_world_size(numbers->world_size);
    to->set_group_world_size(static_cast<std::uint32_t>(c.plan->nodes.size()));
    to->set_nproc_per_node(c.nproc_per_node);
    to->set_master_addr(c.plan->master_addr);
    to->set_master_port(c.plan->master_port);
    to->set_restart_count(c.plan->restart_count);
    wire::ToProto(c.command, to->mutable_command());
    to->set_data_key(c.data_key);
    to->set_committed_step(c.committed_step);
    to->set_plan_crc(numbers->crc);
    for (const everstep::Cut& cut : c.given_up) wire::ToProto(cut, to->add_given_up());
    if (!c.plan->cut.shards.empty()) wire::ToProto(c.plan->cut, to->mutable_cut());
    to->set_kept_by_parity(!c.plan->parity.groups.empty());
  }
  void operator()(const StopJobCommand& c) const {
    v1::StopJob* to = m->mutable_stop_job();
    to->set_job(c.job);
    to->set_generation(c.generation);
    to->set_forget(c.forget);
    to->set_reason(ReasonName(c.reason));
    to->set_failed(c.failed);
  }
  void operator()(const CommittedCommand& c) const {
    v1::Committed* to = m->mutable_committed();
    to->set_job(c.job);
    to->set_generation(c.generation);
    to->set_step(c.step);
    if (c.released != kNoStep) to->set_released_step(c.released);
  }
  void operator()(const PersistCommand& c) const {
    v1::Persist* to = m->mutable_persist();
    to->set_job(c.job);
    to->set_generation(c.generation);
    to->set_step(c.step);
    for (const Rank rank : c.ranks) to->add_ranks(rank);
    if (c.verified.step != kNoStep) wire::ToProto(c.verified, to->mutable_verified());
  }
  void operator()(const ToldAckCommand& c) const {
    v1::ToldAck* to = m->mutable_told_ack();
    to->set_job(c.job);
    to->set_generation(c.generation);
    to->set_rank(c.rank);
    to->set_sequence(c.sequence);
  }
  void operator()(const RepairShardCommand& c) const {
    v1::RepairShard* to = m->mutable_repair_shard();
    to->set_job(c.job);
    wire::ToProto(c.shard, to->mutable_shard());
    to->set_source_node(c.source_node);
    to->set_source_address(c.source_address);
  }
  void operator()(const BuildShardCommand& c) const {
    v1::BuildShard* to = m->mutable_build_shard();
    to->set_job(c.job);
    to->set_generation(c.generation);
    wire::ToProto(c.build.shard, to->mutable_shard());
    to->set_parity(c.build.parity);
    for (const Rank rank : c.build.group) to->add_group(rank);
    for (const CutShard& source : c.build.sources) wire::ToProto(source, to->add_sources());
  }
};

}  // namespace

std::uint64_t KeeperId(const std::string& boot_id, std::uint64_t pid_namespace,
                       std::int32_t keeper_pid, std::uint64_t keeper_start_time) {
  // FNV-1a over one text: stable across versions and machines.
  const std::string text =
      fmt::format("{}/{}/{}/{}", boot_id, pid_namespace, keeper_pid, keeper_start_time);
  std::uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : text) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001b3ULL;
  }
  return hash;
}

std::string CheckRegister(const v1::Register& message) {
  if (message.protocol_version() != kProtocolVersion) {
    return fmt::format(
        "agent {} {} speaks protocol {}, this controller ({}) speaks {}\nhint: install the same "
        "version of everstep on every node; agents may be restarted while jobs run",
        message.node(), message.version(), message.protocol_version(), kVersion, kProtocolVersion);
  }
  if (!IsNodeName(message.node())) {
    return fmt::format(
        "node name '{}' is not [a-z0-9.-]{{1,63}}\nhint: start the agent with "
        "another --node",
        message.node().substr(0, 80));
  }
  if (message.address().empty() || message.address().size() > kMaxAddress ||
      message.data_port() > 65535) {
    return fmt::format(
        "node {} names no address by which others reach it ('{}', port {})\nhint: start the agent "
        "with --address HOST",
        message.node(), message.address().substr(0, 80), message.data_port());
  }
  const bool long_label = std::any_of(
      message.labels().begin(), message.labels().end(),
      [](const auto& label) { return label.first.size() + label.second.size() > kMaxLabelBytes; });
  if (message.labels_size() > kMaxLabels || long_label) {
    return fmt::format(
        "node {} has {} labels; at most {} of at most {} bytes are taken\nhint: start the agent "
        "with "
        "fewer --label",
        message.node(), message.labels_size(), kMaxLabels, kMaxLabelBytes);
  }
  return {};
}

NodeRegistered FromWire(const v1::Register& m, std::uint64_t session) {
  NodeRegistered e;
  e.node = m.node();
  e.session = session;
  e.keeper_id = KeeperId(m.boot_id(), m.pid_namespace(), m.keeper_pid(), m.keeper_start_time());
  e.previous_incarnation = m.previous_incarnation();
  e.facts.address = m.address();
  e.facts.data_port = m.data_port();
  e.facts.slots = m.slots();
  e.facts.labels.insert(m.labels().begin(), m.labels().end());
  for (const v1::JobOnNode& job : m.jobs()) e.jobs.push_back(FromProto(job));
  return e;
}

std::optional<Event> FromWire(const NodeId& node, const v1::AgentMessage& m,
                              const v1::Register& keeper) {
  const Incarnation incarnation = m.incarnation();
  switch (m.body_case()) {
    case v1::AgentMessage::kHeartbeat: {
      Heartbeat e{node, incarnation, m.heartbeat().sequence(), {m.heartbeat().sent_ns()}, {}};
      for (const v1::JobProgress& job : m.heartbeat().jobs()) {
        e.jobs.push_back({job.job(), job.generation(), job.step(), job.running()});
      }
      return e;
    }
    case v1::AgentMessage::kPrepared: {
      const v1::Prepared& p = m.prepared();
      Prepared e{node,           incarnation, FromProto(p.holds()),
                 p.store_port(), p.refused(), Cut(p.message())};
      // Which prepare this answers; `holds` tells of the newest generation that ran here.
      e.holds.job = p.job();
      e.holds.generation = p.generation();
      return e;
    }
    case v1::AgentMessage::kActivated: {
      const v1::Activated& a = m.activated();
      Activated e{node, incarnation, a.job(), a.generation(), {}, a.failed(), Cut(a.message())};
      for (const v1::WorkerOnNode& w : a.workers()) {
        e.workers.push_back(FromProto(w));
      }
      return e;
    }
    case v1::AgentMessage::kWorkerExited: {
      const v1::WorkerExited& w = m.worker_exited();
      return WorkerExited{node,     incarnation,    w.job(), w.generation(),
                          w.rank(), w.local_rank(), w.pid(), FromProto(w.exit())};
    }
    case v1::AgentMessage::kWorkerStalled: {
      const v1::WorkerStalled& w = m.worker_stalled();
      if (w.kind() != v1::WorkerStalled::STOPPED &&
          w.kind() != v1::WorkerStalled::GROUP_NOT_FORMED) {
        return std::nullopt;
      }
      return WorkerStalled{node,
                           incarnation,
                           w.job(),
                           w.generation(),
                           w.rank(),
                           static_cast<StallKind>(w.kind()),
                           Cut(w.evidence()),
                           Milliseconds(w.stalled_ms())};
    }
    case v1::AgentMessage::kShardCopied:
      return ShardCopied{node, incarnation, m.shard_copied().job(),
                         wire::FromProto(m.shard_copied().shard())};
    case v1::AgentMessage::kShardDamaged:
      return ShardDamaged{node,
                          incarnation,
                          m.shard_damaged().job(),
                          wire::FromProto(m.shard_damaged().shard()),
                          m.shard_damaged().chunk(),
                          Cut(m.shard_damaged().found_by(), 32)};
    case v1::AgentMessage::kPersisted: {
      const v1::Persisted& p = m.persisted();
      return Persisted{node,           incarnation,     p.job(),   p.generation(),
                       p.step(),       p.sealed(),      p.bytes(), Milliseconds(p.ms()),
                       Cut(p.error()), Cut(p.missing())};
    }
    case v1::AgentMessage::kTold: {
      const v1::Told& t = m.told();
      std::optional<std::vector<ToldWord>> words = DecodeTold(t.words());
      if (!words) return std::nullopt;  // the worker's word is never taken: it says so in the end
      return Told{node, incarnation, t.job(), t.generation(), t.rank(), *std::move(words)};
    }
    case v1::AgentMessage::kNotice:
      return Notice{node, incarnation, Cut(m.notice().source(), 256),
                    Milliseconds(m.notice().deadline_ms())};
    case v1::AgentMessage::kNodeWarm:
      return NodeWarm{node, incarnation, m.node_warm().job(), m.node_warm().warm(),
                      Cut(m.node_warm().message())};
    case v1::AgentMessage::kKeeperLost:
      return KeeperLost{
          node, incarnation,
          KeeperId(keeper.boot_id(), keeper.pid_namespace(), m.keeper_lost().new_keeper_pid(),
                   m.keeper_lost().new_keeper_start_time()),
          Cut(m.keeper_lost().message())};
    case v1::AgentMessage::kStopped:
      return Stopped{node, incarnation, m.stopped().job(), m.stopped().generation()};
    case v1::AgentMessage::kRegister:
    case v1::AgentMessage::kLogLines:
    case v1::AgentMessage::BODY_NOT_SET: break;
  }
  return std::nullopt;
}

v1::ControllerMessage ToWire(const Command& command, PlanNumbers* numbers) {
  v1::ControllerMessage message;
  std::visit(Writer{&message, numbers}, command.body);
  return message;
}

}  // namespace everstep::controller
