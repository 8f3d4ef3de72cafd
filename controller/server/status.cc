#include "controller/server/status.h"

#include <fmt/format.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <vector>

#include "controller/core/copies.h"
#include "controller/store/convert.h"
#include "proto/base/clock.h"
#include "proto/base/version.h"
#include "proto/wire/convert.h"

namespace everstep::controller {
namespace {

std::string TimeText(Timestamp t) {
  return t.ns == 0 ? std::string() : FormatTimestamp(t);
}

std::string CommandText(const CommandSpec& spec) {
  v1::Command command;
  if (!wire::ToProto(spec, &command)) return {};
  std::string text;
  switch (command.kind()) {
    case v1::Command::MODULE: text = "python -m " + command.target(); break;
    case v1::Command::PROGRAM: text = command.target(); break;
    default: text = "python " + command.target();
  }
  for (const std::string& arg : command.args()) text += " " + arg;
  constexpr std::size_t kLimit = 400;
  if (text.size() > kLimit) text = text.substr(0, kLimit) + "...";
  return text;
}

bool IsMemberOf(const JobStateView& job, const NodeId& node) {
  return std::any_of(job.plan.nodes.begin(), job.plan.nodes.end(),
                     [&](const NodePlan& p) { return p.node == node; });
}

bool IsWarm(const NodeState& node, const JobId& job) {
  const auto warm = node.warm.find(job);
  return warm != node.warm.end() && warm->second == Warmth::kReady;
}

bool HoldsNodes(const JobStateView& job) {
  return !IsTerminal(job.record.state) && job.record.state != JobState::kWaiting;
}

void FillFault(const Fault& f, v1::FaultStatus* to) {
  to->set_id(f.id);
  to->set_reason(ReasonName(f.reason));
  to->set_subject(f.subject);
  to->set_evidence(f.evidence);
  to->set_action(f.action);
  to->set_detected(TimeText(f.detected));
  to->set_recovery_seconds(f.recovered.ns == 0 ? -1.0 : ToSeconds(f.recovered - f.detected));
  // The occurrence is told by the node's clock: a difference out of this range says that the clocks
  // differ.
  const double detect = f.occurred.ns == 0 ? -1.0 : ToSeconds(f.detected - f.occurred);
  to->set_detect_seconds(
      f.occurred.ns == 0 || detect < -1.0 || detect > 3600.0 ? -1.0 : std::max(detect, 0.0));
  to->set_generation_before(f.generation_before);
  to->set_generation_after(f.generation_after);
  to->set_step_before(f.step_before);
  to->set_step_after(f.step_after);
  const bool known = f.step_before >= 0 && f.step_after >= 0;
  // step_after is the first new step: the restored one is the step before it.
  to->set_steps_lost(known ? std::max<Step>(0, f.step_before - (f.step_after - 1)) : -1);
}

void FillRanks(const JobStateView& job, const NodePlan& node, v1::JobStatus* to) {
  for (const WorkerPlan& plan : node.workers) {
    v1::RankStatus* rank = to->add_ranks();
    rank->set_rank(plan.rank);
    rank->set_local_rank(plan.local_rank);
    rank->set_node(node.node);
    rank->set_state("STARTING");
    const auto worker = job.workers.find(plan.rank);
    if (worker == job.workers.end()) continue;
    const WorkerOnNode& w = worker->second.worker;
    rank->set_pid(w.pid);
    rank->set_state(!w.running ? "EXITED" : worker->second.stopped ? "STOPPED" : "RUNNING");
    if (!w.running) rank->set_exit_code(w.exit.code);
  }
}

// Nodes that would be taken now if there were enough of them.
std::size_t Candidates(const ClusterState& state, const JobSpec& spec) {
  return static_cast<std::size_t>(
      std::count_if(state.nodes.begin(), state.nodes.end(), [&](const auto& entry) {
        const bool named = spec.only_nodes.empty() ||
                           std::find(spec.only_nodes.begin(), spec.only_nodes.end(), entry.first) !=
                               spec.only_nodes.end();
        return named && entry.second.record.health == NodeHealth::kAlive &&
               !entry.second.record.draining;
      }));
}

// torch's error file: {"message": {"message": "RuntimeError: ...", ...}} or {"message": "..."};
// empty: neither.
std::string MessageOf(const std::string& error_json) {
  google::protobuf::Struct file;
  if (error_json.empty() || !google::protobuf::util::JsonStringToMessage(error_json, &file).ok())
    return {};
  const auto outer = file.fields().find("message");
  if (outer == file.fields().end()) return {};
  if (outer->second.has_string_value()) return outer->second.string_value();
  const auto& fields = outer->second.struct_value().fields();
  const auto inner = fields.find("message");
  return inner == fields.end() ? std::string() : inner->second.string_value();
}

void FillCause(const WorkerOnNode& w, const JobStateView& job, v1::RootCause* to) {
  to->set_rank(w.rank);
  to->set_local_rank(w.local_rank);
  const auto worker = job.workers.find(w.rank);
  if (worker != job.workers.end()) {
    to->set_node(worker->second.node);
  } else {
    for (const NodePlan& node : job.plan.nodes) {
      for (const WorkerPlan& plan : node.workers) {
        if (plan.rank == w.rank) to->set_node(node.node);
      }
    }
  }
  to->set_pid(w.pid);
  to->set_exit_code(w.exit.code);
  to->set_time(TimeText(w.exit.error_time.ns != 0 ? w.exit.error_time : w.exit.occurred));
  to->set_error_file(w.exit.error_file);
  to->set_error_json(w.exit.error_json);
  if (std::string said = MessageOf(w.exit.error_json); !said.empty()) {
    to->set_message(std::move(said));
  } else if (!w.exit.refused.empty()) {
    to->set_message(w.exit.refused);
  } else if (w.exit.oom_killed) {
    to->set_message("killed by the kernel: out of memory");
  } else if (w.exit.code < 0) {
    to->set_message(fmt::format("ended by signal {}", -w.exit.code));
  } else {
    to->set_message(fmt::format("exit code {}", w.exit.code));
  }
}

}  // namespace

std::string LogDirOf(const CommandSpec& spec) {
  v1::Command command;
  return wire::ToProto(spec, &command) ? command.log_dir() : std::string();
}

v1::NodeStatus NodeStatusOf(const ClusterState& state, const NodeState& node, Timestamp now) {
  v1::NodeStatus to;
  const NodeRecord& r = node.record;
  to.set_node(r.node);
  bool busy = false;
  for (const auto& [id, job] : state.jobs) {
    if (IsTerminal(job.record.state)) continue;
    if (HoldsNodes(job) && IsMemberOf(job, r.node)) {
      busy = true;
      std::vector<Rank> ranks;
      for (const NodePlan& plan : job.plan.nodes) {
        if (plan.node != r.node) continue;
        for (const WorkerPlan& w : plan.workers) ranks.push_back(w.rank);
      }
      if (ranks.empty()) {
        to.add_jobs(id + ":preparing");
      } else if (ranks.size() == 1) {
        to.add_jobs(fmt::format("{}:rank {}", id, ranks.front()));
      } else {
        to.add_jobs(fmt::format("{}:ranks {}-{}", id, ranks.front(), ranks.back()));
      }
    } else if (!r.draining && IsWarm(node, id)) {
      to.add_jobs(id + ":spare");
    } else if (job.newcomers.contains(r.node)) {
      to.add_jobs(id + ":warming");
    }
  }
  std::string health = NodeHealthName(r.health);
  if (r.health == NodeHealth::kAlive && r.draining) health = busy ? "DRAINING" : "DRAINED";
  to.set_state(health);
  to.set_address(r.facts.address);
  to.set_incarnation(r.incarnation);
  // A node that is leaving and lost is lost in the first place; drain_reason tells the rest.
  const bool leaving = r.draining && r.health == NodeHealth::kAlive;
  const std::size_t colon = r.drain_reason.find(": ");  // "node_drained: memory errors"
  to.set_reason(leaving ? r.drain_reason.substr(0, colon) : ReasonName(node.reason));
  to.set_evidence(!leaving                     ? node.evidence
                  : colon == std::string::npos ? std::string()
                                               : r.drain_reason.substr(colon + 2));
  to.set_since(TimeText(leaving ? node.drain_since : node.since));
  if (r.draining) {
    to.set_drain_reason(r.drain_reason);
    to.set_drain_since(TimeText(node.drain_since));
  }
  to.set_heartbeat_age_seconds(std::max(0.0, ToSeconds(now - node.last_heard)));
  to.set_lease_ms(static_cast<std::uint32_t>(ToMilliseconds(node.lease)));
  to.set_slots(r.facts.slots);
  to.mutable_labels()->insert(r.facts.labels.begin(), r.facts.labels.end());
  to.set_agent_restarts(static_cast<std::int32_t>(node.reattached));
  to.set_warm(std::any_of(node.warm.begin(), node.warm.end(),
                          [](const auto& w) { return w.second == Warmth::kReady; }));
  return to;
}

v1::JobStatus JobStatusOf(const ClusterState& state, const JobStateView& job, Timestamp now) {
  v1::JobStatus to;
  const JobRecord& r = job.record;
  to.set_job(r.spec.job);
  to.set_state(JobStateName(r.state));
  to.set_reason(ReasonName(IsTerminal(r.state) ? r.end_reason : job.reason));
  to.set_message(IsTerminal(r.state) && !r.end_message.empty() ? r.end_message : job.message);
  to.set_generation(r.generation);
  to.set_min_nodes(r.spec.min_nodes);
  to.set_max_nodes(r.spec.max_nodes);
  const bool holds = HoldsNodes(job);
  if (holds) to.set_nodes(static_cast<std::uint32_t>(job.plan.nodes.size()));
  if (holds || IsTerminal(r.state)) {  // an ended job tells where it ran last
    std::size_t world = 0;
    for (const NodePlan& node : job.plan.nodes) {
      to.add_members(node.node);
      world += node.workers.empty() ? r.spec.nproc_per_node : node.workers.size();
      if (holds) FillRanks(job, node, &to);
    }
    to.set_world_size(static_cast<std::uint32_t>(world));
  }
  std::sort(to.mutable_ranks()->begin(), to.mutable_ranks()->end(),
            [](const auto& x, const auto& y) { return x.rank() < y.rank(); });
  if (r.state == JobState::kWaiting && to.message().empty()) {
    to.set_message(
        fmt::format("{} of at least {} nodes", Candidates(state, r.spec), r.spec.min_nodes));
  }
  if (!IsTerminal(r.state)) {
    std::uint32_t spares = 0;
    for (const auto& [id, node] : state.nodes) {
      if (node.record.health == NodeHealth::kAlive && !node.record.draining &&
          IsWarm(node, r.spec.job) && !(HoldsNodes(job) && IsMemberOf(job, id))) {
        ++spares;
      }
    }
    to.set_spares(spares);
    for (const auto& [id, since] : job.newcomers) {
      if (IsWarm(state.nodes.at(id), r.spec.job)) continue;
      to.set_message(
          fmt::format("{}{}node {} is warming: the job trains on until it has imported "
                      "what it needs",
                      to.message(), to.message().empty() ? "" : "; ", id));
    }
  }
  // Word of a commit may be here before the heartbeat that tells of the step.
  const Step committed = job.commits.commits.empty() ? kNoStep : job.commits.commits.front().step;
  to.set_step(std::max(job.step, committed));
  to.set_committed_step(committed);
  to.set_ckpt_dir(r.spec.ckpt_dir);
  to.set_copies(CopiesOf(r.spec, job.plan.nodes.size()));
  to.set_redundancy(checkpoint::PrintRedundancy(RedundancyOf(r.spec, job.plan.nodes.size())));
  to.set_verified_step(job.commits.verified_at.ns == 0 ? kNoStep : job.commits.verified.step);
  to.set_persisted_step(job.commits.persisted.ns == 0 ? kNoStep : job.commits.persisted_step);
  to.set_persisted(TimeText(job.commits.persisted));
  to.set_restarts(r.restarts);
  to.set_max_restarts(r.spec.max_restarts);
  to.set_lost_capacity(r.lost_capacity);
  to.set_start_failures(r.start_failures);
  double seconds = 0;
  std::int64_t steps = 0;
  for (const Fault& fault : r.faults) {
    v1::FaultStatus* f = to.add_faults();
    FillFault(fault, f);
    seconds += std::max(0.0, f->recovery_seconds());
    steps += std::max<std::int64_t>(0, f->steps_lost());
  }
  to.set_seconds_lost(seconds);
  to.set_steps_lost(steps);
  to.set_exit_code(r.exit_code);
  to.set_submitted(TimeText(r.started));
  to.set_ended(TimeText(r.ended));
  to.set_age_seconds(std::max(0.0, ToSeconds((r.ended.ns != 0 ? r.ended : now) - r.started)));
  to.set_command(CommandText(r.spec.command));
  to.set_log_dir(LogDirOf(r.spec.command));
  if (r.state == JobState::kFailed && !r.memory_freed) {
    to.set_memory_kept_until(job.memory_until.ns == 0 ? "forever" : TimeText(job.memory_until));
  }
  if (!r.failures.empty()) {
    FillCause(r.failures.front(), job, to.mutable_root_cause());
    for (std::size_t i = 1; i < r.failures.size(); ++i) {
      FillCause(r.failures[i], job, to.mutable_root_cause()->add_others());
    }
  }
  return to;
}

v1::Event EventOf(const JournalRecord& r) {
  v1::Event to;
  to.set_sequence(r.sequence);
  to.set_time(TimeText(r.time));
  to.set_type(r.type);
  to.set_severity(r.severity == Severity::kInfo      ? "INFO"
                  : r.severity == Severity::kWarning ? "WARNING"
                                                     : "ERROR");
  to.set_reason(ReasonName(r.reason));
  to.set_job(r.job);
  to.set_node(r.node);
  to.set_rank(r.rank);
  to.set_generation(r.generation);
  to.set_message(r.message);
  to.set_evidence(r.evidence);
  return to;
}

v1::StoreSnapshot SnapshotOf(const ClusterState& state, const std::string& cluster) {
  std::vector<Record> records;
  for (const auto& [id, node] : state.nodes) records.emplace_back(node.record);
  for (const auto& [id, record] : state.forgotten) records.emplace_back(record);
  for (const auto& [id, job] : state.jobs) {
    records.emplace_back(job.record);
    if (job.plan.generation > 0) records.emplace_back(GenerationRecord{job.plan});
    if (!job.commits.commits.empty()) records.emplace_back(job.commits);
  }
  v1::StoreSnapshot to;
  to.mutable_header()->set_format(kRecordFormat);
  to.mutable_header()->set_cluster(cluster);
  to.mutable_header()->set_product_version(kVersion);
  ToSnapshot(records, &to);
  return to;
}

const JobStateView* FindJobByPrefix(const ClusterState& state, const std::string& id,
                                    std::string* error) {
  if (const auto exact = state.jobs.find(id); exact != state.jobs.end()) return &exact->second;
  std::vector<const JobStateView*> found;
  std::string names;
  if (id.size() >= 4) {
    for (auto it = state.jobs.lower_bound(id); it != state.jobs.end() && it->first.starts_with(id);
         ++it) {
      found.push_back(&it->second);
      if (found.size() <= 5) names += (names.empty() ? "" : ", ") + it->first;
    }
  }
  if (found.size() == 1) return found.front();
  if (found.empty()) {
    *error = fmt::format("there is no job '{}' here\nhint: everstep job list shows {} job{}", id,
                         state.jobs.size(), state.jobs.size() == 1 ? "" : "s");
  } else {
    *error =
        fmt::format("'{}' begins {} jobs: {}\nhint: type more of the id", id, found.size(), names);
  }
  return nullptr;
}

}  // namespace everstep::controller
