// The two-phase switch: prepare (stop the old, report what is held), persist the plan, activate. A
// loss in either phase supersedes the switch by generation g+1; nothing is half-applied.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/copies.h"
#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

// " stayed=0-2,5 anew=3-4": ranks whose process is one of `before`, and the others. Empty when none
// is.
std::string WhoStayed(const std::map<Rank, WorkerState>& workers,
                      const std::map<NodeId, std::set<std::int32_t>>& before) {
  const auto stays = [&before](const WorkerState& w) {
    const auto pids = before.find(w.node);
    return pids != before.end() && pids->second.contains(w.worker.pid);
  };
  std::string stayed;
  std::string anew;
  for (auto at = workers.begin(); at != workers.end();) {
    const bool same = stays(at->second);
    const Rank first = at->first;
    Rank last = first;
    for (++at; at != workers.end() && at->first == last + 1 && stays(at->second) == same; ++at) {
      last = at->first;
    }
    std::string& ranks = same ? stayed : anew;
    if (!ranks.empty()) ranks += ',';
    ranks += first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last);
  }
  if (stayed.empty()) return {};
  return fmt::format(" stayed={} anew={}", stayed, anew.empty() ? "-" : anew);
}

}  // namespace

void Controller::Impl::Prepare(JobStateView* job, Reason reason, const std::string& evidence,
                               bool failed, bool worker_failure) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  const std::vector<NodeId> nodes = ChooseNodes(*job, Cold::kToMinimum);
  const std::vector<NodePlan> old = job->plan.nodes;
  run.copies.clear();
  run.released = kNoStep;
  run.base_copies.clear();
  run.base_released = false;
  run.base_ordered = false;
  run.rebuilding.clear();
  run.rebuild_over = false;
  run.misreported.clear();
  run.store_ports.clear();
  run.surveyed.clear();
  run.heard.clear();
  run.last_call = {};
  run.grow_at = {};
  run.linger_at = {};
  run.ran = false;
  if (job->plan.phase == Phase::kRun) run.pids.clear();  // else those before it may live on
  for (const auto& [rank, worker] : job->workers) {
    if (worker.worker.running) run.pids[worker.node].insert(worker.worker.pid);
  }
  job->workers.clear();
  for (const NodeId& node : nodes) {
    job->newcomers.erase(node);
    if (run.formed && std::none_of(old.begin(), old.end(),
                                   [&node](const NodePlan& n) { return n.node == node; })) {
      run.joined.insert(node);
    }
  }
  std::erase_if(run.joined, [&nodes](const NodeId& node) {
    return std::find(nodes.begin(), nodes.end(), node) == nodes.end();
  });
  job->waiting_for.clear();
  dirty_jobs_.insert(id);
  if (nodes.size() < job->record.spec.min_nodes) {
    job->record.state = JobState::kWaiting;
    job->reason = Reason::kWaitingForNodes;
    job->message = fmt::format("{} of at least {} nodes", nodes.size(), job->record.spec.min_nodes);
    job->deadline = {};
    job->newcomers.clear();
    run.waiting_since = now_;
    run.formed = false;
    run.pids.clear();
    run.joined.clear();
    for (Fault& fault : job->record.faults) {
      if (fault.recovered.ns == 0) fault.action = "wait for nodes";
    }
    StartPersist(job, Reason::kLastBreath);
    for (const NodePlan& member : old) {
      Send(member.node, StopJobCommand{id, job->record.generation, false, failed, reason});
    }
    Journal({.type = "job_waiting",
             .severity = Severity::kWarning,
             .reason = Reason::kWaitingForNodes,
             .job = id,
             .generation = job->record.generation,
             .message = fmt::format("job {} waits for nodes: {}", id, job->message),
             .evidence = fmt::format("cause={} {}", ReasonName(reason), evidence)});
    return;
  }
  const Generation before = job->record.generation;
  const Generation generation = ++job->record.generation;
  job->record.state = JobState::kPreparing;
  job->reason = reason;
  job->message = evidence;
  job->deadline = now_ + options_.prepare_timeout;
  const std::uint32_t restarts = job->plan.restart_count + (worker_failure ? 1 : 0);
  if (job->plan.generation != 0) Forget(job->plan);
  job->plan = GenerationPlan{};
  job->plan.job = id;
  job->plan.generation = generation;
  job->plan.restart_count = restarts;
  job->plan.reason = reason;
  job->plan.evidence = evidence;
  for (const NodeId& node : nodes) {
    const NodeFacts& facts = state_.nodes.at(node).record.facts;
    NodePlan member;
    member.node = node;
    member.group_rank = static_cast<std::int32_t>(job->plan.nodes.size());
    member.address = facts.address;
    member.data_port = facts.data_port;
    job->plan.nodes.push_back(std::move(member));
    job->waiting_for.insert(node);
  }
  for (const NodePlan& member : old) {  // those that leave stop first, too
    if (state_.nodes.at(member.node).record.health != NodeHealth::kLost) {
      job->waiting_for.insert(member.node);
    }
  }
  for (Fault& fault : job->record.faults) {
    if (fault.recovered.ns != 0) continue;
    fault.generation_after = generation;
    const bool same = nodes.size() == old.size();
    fault.action = !same ? fmt::format("continue on {} nodes", nodes.size())
                   : std::equal(nodes.begin(), nodes.end(), old.begin(),
                                [](const NodeId& a, const NodePlan& b) { return a == b.node; })
                       ? "restart in place"
                       : "a spare takes over";
  }
  dirty_plans_.insert(id);
  Journal(
      {.type = "generation_prepare",
       .reason = reason,
       .job = id,
       .generation = generation,
       .message = fmt::format("job {}: generation {}{} on {} nodes", id, generation,
                              before == 0 ? "" : fmt::format(", after {},", before), nodes.size()),
       .evidence = evidence});
  for (const NodeId& node : job->waiting_for) SendPrepare(job, node, failed);
  if (Bug(kBugDoubleActivation)) Activate(job);
}

void Controller::Impl::SendPrepare(JobStateView* job, const NodeId& node, bool failed) {
  const JobSpec& spec = job->record.spec;
  // When two generations in a row did not come about, what outlives them may be the reason: all
  // begin anew.
  const bool park = IsMember(*job, node) && job->record.start_failures < 2;
  Send(node, PrepareCommand{spec.job, job->record.generation, spec.command, spec.nproc_per_node,
                            job->plan.nodes.front().node == node, failed, job->record.data_key,
                            job->record.given_up, park});
}

void Controller::Impl::On(const Prepared& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.holds.job);
  if (job == nullptr || job->record.state != JobState::kPreparing ||
      e.holds.generation != job->record.generation || job->waiting_for.count(e.node) == 0) {
    ++state_.stale_dropped;
    return;
  }
  Runtime& run = runtime_[e.holds.job];
  if (e.refused && IsMember(*job, e.node)) {
    Exclude(job, e.node);
    AddFault(job, Reason::kPrepareRefused, fmt::format("node {}", e.node), e.message);
    Prepare(job, Reason::kPrepareRefused, e.message, true);
    return;
  }
  run.surveyed.insert(e.node);
  if (!e.refused) {  // one that leaves and cannot says so, and holds the switch up no longer
    // A newcomer may prepare, and refuse its input all the same: its first step shows that it does
    // not.
    if (IsMember(*job, e.node) && !run.joined.contains(e.node)) run.excluded.erase(e.node);
    job->holdings[e.node] = e.holds;
  }
  run.store_ports[e.node] = e.store_port;
  job->waiting_for.erase(e.node);
  if (job->waiting_for.empty()) Activate(job);
}

// What a node said of its memory before this switch may no longer be so, and one that did not come
// back since the controller started has said nothing.
bool Controller::Impl::AskSources(JobStateView* job) {
  const std::set<NodeId>& surveyed = runtime_[job->record.spec.job].surveyed;
  for (const NodePlan& member : job->plan.nodes) {
    for (const WorkerPlan& worker : member.workers) {
      const NodeId& source = worker.restore.source_node;
      if (!source.empty() && surveyed.count(source) == 0) job->waiting_for.insert(source);
    }
  }
  for (const CutShard& shard : job->plan.cut.shards) {
    for (const CutHolder& holder : shard.holders) {
      if (surveyed.count(holder.node) == 0) job->waiting_for.insert(holder.node);
    }
  }
  const auto& commits = job->commits.commits;
  if (!commits.empty() && job->plan.restore_step < commits.front().step) {
    // Whoever is away may hold what is committed: it comes back or is lost, soon.
    for (const auto& [id, node] : state_.nodes) {
      if (!node.connected && node.record.health != NodeHealth::kLost && surveyed.count(id) == 0) {
        job->waiting_for.insert(id);
      }
    }
  }
  for (const NodeId& source : job->waiting_for) SendPrepare(job, source, false);
  return !job->waiting_for.empty();
}

void Controller::Impl::Activate(JobStateView* job) {
  if (FilesAreAhead(job)) return;
  const JobSpec& spec = job->record.spec;
  GenerationPlan& plan = job->plan;
  const GenerationPlan prepared = plan;
  plan.phase = Phase::kActivate;
  plan.master_addr = plan.nodes.front().address;
  plan.master_port = spec.master_port != 0
                         ? spec.master_port
                         : runtime_[spec.job].store_ports[plan.nodes.front().node];
  for (NodePlan& member : plan.nodes) {
    member.workers.clear();
    for (std::uint32_t local = 0; local < spec.nproc_per_node; ++local) {
      WorkerPlan worker;
      worker.rank = member.group_rank * static_cast<std::int32_t>(spec.nproc_per_node) +
                    static_cast<std::int32_t>(local);
      worker.local_rank = static_cast<std::int32_t>(local);
      member.workers.push_back(worker);
    }
  }
  AssignPeers(state_, *job, &plan);
  PlanRestore(job);
  const auto must_ask = [&] { return !Bug(kBugDoubleActivation) && AskSources(job); };
  const auto must_rebuild = [&] { return !Bug(kBugDoubleActivation) && RebuildLost(job); };
  if (must_ask() || must_rebuild() || (UndoRollBack(job) && must_ask())) {
    plan = prepared;
    return;
  }
  job->record.state = JobState::kActivating;
  std::uint64_t from_files = 0;  // of the node that reads most
  for (const NodePlan& member : plan.nodes) {
    from_files = std::max(from_files, FileRestoreBytes(member));
  }
  job->deadline = now_ + options_.activate_timeout + FileRestoreTime(from_files);
  job->waiting_for.clear();
  dirty_jobs_.insert(spec.job);
  dirty_plans_.insert(spec.job);
  Journal({.type = "generation_activate",
           .reason = plan.reason,
           .job = spec.job,
           .generation = plan.generation,
           .message = plan.restore_step == kNoStep
                          ? fmt::format("job {}: generation {} starts from nothing saved", spec.job,
                                        plan.generation)
                          : fmt::format("job {}: generation {} starts after step {}", spec.job,
                                        plan.generation, plan.restore_step),
           .evidence = fmt::format("master={}:{}", plan.master_addr, plan.master_port)});
  JournalRestore(*job);
  TrimLineage(job);
  const auto shared = std::make_shared<const GenerationPlan>(plan);
  for (const NodePlan& member : plan.nodes) {
    job->waiting_for.insert(member.node);
    SendActivate(job, member.node, shared);
  }
  for (const NodePlan& member : plan.nodes) TellCommits(job, member.node);
  for (const auto& [node, holds] : job->holdings) {
    for (const HeldShard& shard : holds.shards) {
      if (!shard.file) CountBase(job, node, shard);
    }
  }
  WatchCopies(job);
}

void Controller::Impl::SendActivate(JobStateView* job, const NodeId& node,
                                    std::shared_ptr<const GenerationPlan> plan) {
  ActivateCommand command;
  command.plan = std::move(plan);
  command.node = node;
  command.nproc_per_node = job->record.spec.nproc_per_node;
  command.command = job->record.spec.command;
  command.data_key = job->record.data_key;
  command.given_up = job->record.given_up;
  if (!job->commits.commits.empty()) command.committed_step = job->commits.commits.front().step;
  Send(node, std::move(command));
}

void Controller::Impl::On(const Activated& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || job->record.state != JobState::kActivating ||
      e.generation != job->record.generation || job->waiting_for.count(e.node) == 0) {
    ++state_.stale_dropped;
    return;
  }
  if (e.failed) {
    AddFault(job, Reason::kSpawnFailed, fmt::format("node {}", e.node), e.message);
    if (++job->record.start_failures > job->record.spec.max_start_failures) {
      Finish(job, JobState::kFailed, Reason::kSpawnFailed,
             fmt::format("node {} could not start its workers: {}", e.node, e.message), 1);
    } else {
      Prepare(job, Reason::kSpawnFailed, e.message, true);
    }
    return;
  }
  for (const WorkerOnNode& worker : e.workers) {
    if (!Hosts(*job, e.node, worker.rank)) continue;
    job->workers.try_emplace(worker.rank,
                             WorkerState{e.node, worker});  // an exit may be known already
  }
  job->waiting_for.erase(e.node);
  if (job->waiting_for.empty()) Running(job);
}

void Controller::Impl::Running(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  job->record.state = JobState::kRunning;
  job->plan.phase = Phase::kRun;
  job->deadline = {};
  run.running_since = now_;
  run.step_at_start = job->record.best_step;
  run.ran = true;
  run.formed = true;
  for (Fault& fault : job->record.faults) {
    // Without reported steps, running again is all that can be known.
    if (fault.recovered.ns == 0 && job->record.best_step == kNoStep) fault.recovered = now_;
  }
  dirty_jobs_.insert(id);
  dirty_plans_.insert(id);
  Journal({.type = "generation_running",
           .reason = job->plan.reason,
           .job = id,
           .generation = job->record.generation,
           .message = fmt::format("job {}: generation {} runs", id, job->record.generation),
           .evidence = fmt::format("workers={} restore_step={}{}", job->workers.size(),
                                   job->plan.restore_step, WhoStayed(job->workers, run.pids))});
  Consider(job);
}

void Controller::Impl::On(const Tick&) {
  JournalRecovery();
  // A late tick means that the controller itself stood still: silence in that time proves nothing.
  const std::optional<Timestamp> due = NextWakeup();
  if (due && now_ - *due > options_.heartbeat_interval) {
    const Duration late = now_ - *due;
    for (auto& [id, node] : state_.nodes) {  // and one more beat to be heard in
      node.last_heard = node.last_heard + late + options_.heartbeat_interval;
    }
  }
  std::vector<NodeId> silent;
  for (const auto& [id, node] : state_.nodes) {
    if (node.record.health != NodeHealth::kLost && now_ >= node.last_heard + node.lease / 2) {
      silent.push_back(id);
    }
  }
  for (const NodeId& id : silent) {
    const NodeState& node = state_.nodes.at(id);
    const std::string evidence =
        fmt::format("silent_ms={} lease_ms={}", ToMilliseconds(now_ - node.last_heard),
                    ToMilliseconds(node.lease));
    if (now_ >= node.last_heard + node.lease) {
      LoseNode(id, Reason::kNodeLost, evidence);
    } else if (node.record.health == NodeHealth::kAlive) {
      Suspect(id, Reason::kHeartbeatOverdue, evidence);
    }
  }
  LeaveNodes();
  for (auto& [id, job] : state_.jobs) {
    if (job.memory_until.ns != 0 && now_ >= job.memory_until) {
      FreeMemory(&job, Reason::kRetentionOver);
      Journal({.type = "memory_freed",
               .reason = Reason::kRetentionOver,
               .job = id,
               .generation = job.record.generation,
               .message = fmt::format("what failed job {} had in memory is given up", id),
               .evidence = fmt::format("kept_s={:.0f}", ToSeconds(options_.failed_retention))});
    }
    GiveUpPersist(&job);
    if (IsTerminal(job.record.state)) continue;
    Runtime& run = runtime_[id];
    const JobSpec& spec = job.record.spec;
    for (auto& [node, refused] : run.excluded) {
      if (refused.over || now_ < refused.until) continue;
      refused.over = true;  // whatever made it refuse may be over, too
      Consider(&job);
    }
    if (job.record.state == JobState::kWaiting) {
      if (run.last_call.ns != 0 && now_ >= run.last_call) {
        Prepare(&job, Reason::kCapacityReached,
                fmt::format("nodes={}", ChooseNodes(job, Cold::kAll).size()), false);
      } else if (spec.join_timeout.count() > 0 && now_ >= run.waiting_since + spec.join_timeout) {
        Finish(&job, JobState::kFailed, Reason::kJoinTimeout,
               fmt::format("fewer than {} nodes for {:.1f} s", spec.min_nodes,
                           ToSeconds(spec.join_timeout)),
               75);
      }
    } else if (job.deadline.ns != 0 && now_ >= job.deadline && !Bug(kBugLostWakeup)) {
      // Who owes an answer is fenced: its workers cannot be in two generations.
      const std::set<NodeId> late = job.waiting_for;
      const Generation generation = job.record.generation;
      for (const NodeId& node : late) {
        if (job.record.generation != generation && job.waiting_for.count(node) == 0) continue;
        Exclude(&job, node);
        LoseNode(node, Reason::kPrepareTimeout,
                 fmt::format("owed generation {} of {} an answer", generation, id));
      }
      if (late.empty() && job.record.generation == generation) GiveUpRebuild(&job);
    }
    TellLingerers(&job);
    Grow(&job);
  }
  node_wakeup_ = {};
  for (const auto& [id, node] : state_.nodes) Watch(node);
}

}  // namespace everstep::controller
