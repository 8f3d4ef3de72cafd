#include "tests/sim/world/world.h"

#include <algorithm>
#include <deque>
#include <memory>

#include <fmt/format.h>

#include "proto/base/check.h"
#include "tests/sim/world/checkers.h"
#include "tests/sim/world/node.h"
#include "tests/sim/world/sim_controller.h"

namespace everstep::sim {
namespace {

// Consequences of a fault may show this much later: a lease at its longest, a switch's deadline.
constexpr Duration kAftermath = Seconds(60);
constexpr Duration kInspection = Seconds(2);
constexpr std::size_t kPaceInspections = 3;
constexpr Step kSkipped = 3;  // captures a slow commit may cost

class World {
 public:
  World(const WorldOptions& options, const std::vector<Fault>& faults)
      : options_(options),
        faults_(faults),
        timeline_(options.seed, Timestamp{1'700'000'000'000'000'000}, 5'000'000),
        start_(timeline_.now()),
        network_(&timeline_, options.network),
        training_(&timeline_, &network_, &truth_, &options_),
        checkers_(
            {&truth_, &options_, &nodes_, &files_, &training_, [this] { return Disturbed(); }}),
        controller_({&timeline_, &network_, &truth_, &checkers_, &options_,
                     [this](const NodeId& id) { return nodes_.at(id).get(); }}) {}

  RunResult Run(const Storyteller& storyteller, bool every_event);

 private:
  void Build();
  void Apply(const Fault& fault);
  void EndFaults();
  void Submit(const SimJob& job);
  bool RunsAgain(const SimJob& job) const;
  void Cancel(const JobId& job);
  void Undrain(const NodeId& node, const std::shared_ptr<bool>& done);
  void Inspect();
  void CheckPace(Timestamp now);
  bool Disturbed() const;
  bool Over() const;
  bool WithCheckpoints(const JobId& id) const;
  void CheckEnd();
  void CheckJobEnd(const SimJob& sim_job, const controller::JobStateView& job);
  void At(Duration at, std::string label, std::function<void()> action) {
    timeline_.At(start_ + at, std::move(label), std::move(action));
  }
  // Faults end with the fault phase at the latest.
  Timestamp Until(Duration lasts) const {
    return std::min(timeline_.now() + lasts, start_ + options_.fault_phase);
  }
  std::pair<SimNode*, std::int32_t> Target(const std::string& target);

  const WorldOptions options_;
  const std::vector<Fault> faults_;
  Timeline timeline_;
  const Timestamp start_;
  Truth truth_{start_};
  Network network_;
  Training training_;
  Files files_;
  std::map<NodeId, std::unique_ptr<SimNode>> nodes_;
  Checkers checkers_;
  SimController controller_;
  Timestamp paused_or_slow_until_;
  struct Pace {
    Generation generation = 0;
    std::deque<Step> steps;  // at the newest inspections
  };
  std::map<JobId, Pace> pace_;
  std::set<JobId> ran_again_, cancelled_;
};

void World::Build() {
  for (std::uint32_t i = 1; i <= options_.nodes; ++i) {
    const NodeId name = fmt::format("n{}", i);
    NodeEnv env;
    env.timeline = &timeline_;
    env.network = &network_;
    env.truth = &truth_;
    env.training = &training_;
    env.controller = &controller_;
    env.options = &options_;
    env.files = &files_;
    env.peer = [this](const NodeId& id) -> SimNode* {
      const auto it = nodes_.find(id);
      return it == nodes_.end() ? nullptr : it->second.get();
    };
    nodes_.emplace(name, std::make_unique<SimNode>(name, std::move(env)));
  }
  Random& random = timeline_.random();
  At(Milliseconds(random.Between(0, 500)), "controller starts", [this] { controller_.Start(); });
  for (auto& [id, node] : nodes_) {
    At(Milliseconds(random.Between(0, 2000)), id + " boots", [n = node.get()] { n->Boot(); });
  }
  for (const SimJob& job : options_.jobs) {
    At(Milliseconds(random.Between(0, 4000)), "submit", [this, job] { Submit(job); });
    if (job.cancel_at.count() > 0) {
      At(job.cancel_at, "cancel", [this, id = job.spec.job] { Cancel(id); });
    }
  }
  for (const Fault& fault : faults_) {
    At(fault.at, "fault " + fault.kind, [this, fault] { Apply(fault); });
  }
  At(options_.fault_phase, "faults end", [this] { EndFaults(); });
  timeline_.After(kInspection, "inspection", [this] { Inspect(); });
}

// A person submits until the job is there, and once more under its name when it has ended.
void World::Submit(const SimJob& job) {
  const JobId& id = job.spec.job;
  timeline_.After(Milliseconds(1500), "submit again", [this, job] { Submit(job); });
  const controller::ClusterState* state = controller_.state();
  if (state == nullptr) return;
  const auto it = state->jobs.find(id);
  if (it != state->jobs.end() &&
      (!RunsAgain(job) || !controller::IsTerminal(it->second.record.state))) {
    return;
  }
  controller_.Request(
      [&job](controller::RequestId request) {
        return controller::SubmitJob{request, job.spec, "key"};
      },
      [this, id, again = it != state->jobs.end()](const controller::Reply& reply) {
        if (reply.code != controller::ReplyCode::kOk) return;
        checkers_.Acknowledged(id);
        if (again) ran_again_.insert(id);
      });
}

bool World::RunsAgain(const SimJob& job) const {
  return job.again && !ran_again_.contains(job.spec.job);
}

void World::Cancel(const JobId& job) {
  if (cancelled_.contains(job)) return;
  const auto cancel = [&job](controller::RequestId request) {
    return controller::CancelJob{request, job, "not wanted any more"};
  };
  controller_.Request(cancel, [this, job](const controller::Reply& reply) {
    if (reply.code != controller::ReplyCode::kNotFound) cancelled_.insert(job);
  });
  timeline_.After(Milliseconds(1500), "cancel again", [this, job] { Cancel(job); });
}

// The operator asks until somebody says that the node takes part again.
void World::Undrain(const NodeId& node, const std::shared_ptr<bool>& done) {
  if (*done) return;
  controller_.Request(
      [&node](controller::RequestId id) {
        return controller::UndrainNode{id, node};
      },
      [done](const controller::Reply&) { *done = true; });
  timeline_.After(Milliseconds(1500), "undrain again", [this, node, done] { Undrain(node, done); });
}

std::pair<SimNode*, std::int32_t> World::Target(const std::string& target) {
  const std::size_t slash = target.find('/');
  const auto it = nodes_.find(target.substr(0, slash));
  const std::int32_t rank = slash == std::string::npos ? 0 : std::atoi(target.c_str() + slash + 1);
  return {it == nodes_.end() ? nodes_.begin()->second.get() : it->second.get(), rank};
}

void World::Apply(const Fault& fault) {
  if (timeline_.now() >= start_ + options_.fault_phase) return;
  truth_.Note(timeline_.now(), "fault " + FormatFault(fault));
  truth_.Count("fault " + fault.kind);
  const Timestamp until = Until(fault.lasts);
  const auto then = [&](std::string label, std::function<void()> action) {
    timeline_.At(until, std::move(label), std::move(action));
  };
  auto [node, rank] = Target(fault.target);
  const std::string& kind = fault.kind;
  if (kind == "node_crash") {
    node->Crash();
    then("boots", [n = node] { n->Boot(); });
  } else if (kind == "agent_crash") {
    node->CrashAgent();
    then("agent starts", [n = node] { n->StartAgent(); });
  } else if (kind == "agent_stop") {
    node->PauseAgent(until);
  } else if (kind == "keeper_stop") {
    node->PauseKeeper(until);
  } else if (kind == "keeper_crash") {
    node->CrashKeeper();
  } else if (kind == "worker_kill") {
    node->Signal(rank, -9);
  } else if (kind == "worker_exit") {
    node->Signal(rank, 1);
  } else if (kind == "worker_refuse") {
    node->Signal(rank, SimNode::kRefuses);
  } else if (kind == "worker_abort") {
    node->Signal(rank, -6);
  } else if (kind == "worker_stop") {
    node->StopWorker(rank);
  } else if (kind == "worker_unkillable") {
    node->MakeUnkillable(rank, until);
  } else if (kind == "partition" || kind == "deaf" || kind == "mute") {
    if (kind != "mute") network_.PartitionOneWay(kControllerName, node->name());
    if (kind != "deaf") network_.PartitionOneWay(node->name(), kControllerName);
    then("heals", [this, n = node] { network_.Heal(n->name(), kControllerName); });
  } else if (kind == "isolate") {
    for (const auto& [other, unused] : nodes_) {
      if (other != node->name()) network_.Partition(node->name(), other);
    }
    network_.Partition(node->name(), kControllerName);
    then("heals", [this, n = node] {
      for (const auto& [other, unused] : nodes_) network_.Heal(n->name(), other);
      network_.Heal(n->name(), kControllerName);
    });
  } else if (kind == "stream_break") {
    if (const StreamId stream = node->stream(); stream != 0) {
      network_.Break(stream);
      controller_.StreamGone(stream, "connection reset");
      timeline_.After(std::chrono::microseconds(timeline_.random().Between(0, 300'000)), "reset",
                      [n = node, stream] { n->OnStreamLost(stream, "connection reset"); });
    }
  } else if (kind == "controller_crash") {
    controller_.Crash();
    then("controller starts", [this] { controller_.Start(); });
  } else if (kind == "controller_stop") {
    controller_.PauseUntil(until);
  } else if (kind == "disk_fail") {
    controller_.FailDiskOnce();
  } else if (kind == "slow_disk") {
    controller_.SlowDiskUntil(until);
  } else if (kind == "drain") {
    controller_.Request(
        [&, n = node](controller::RequestId id) {
          return controller::DrainNode{id, n->name(), "maintenance",
                                       timeline_.random().Chance(300)};
        },
        [](const controller::Reply&) {});
    then("undrain", [this, n = node] { Undrain(n->name(), std::make_shared<bool>(false)); });
  } else if (kind == "notice") {
    node->Notice(until - timeline_.now());
    then("goes away", [this, n = node] {
      n->Crash();
      timeline_.After(Milliseconds(timeline_.random().Between(200, 4000)), "boots",
                      [n] { n->Boot(); });
    });
  } else if (kind == "all_keepers") {
    for (const auto& [id, each] : nodes_) each->CrashKeeper();
  } else if (kind == "rollback" || kind == "rollback_far") {
    const controller::ClusterState* state = controller_.state();
    if (state == nullptr) return;
    const auto job = state->jobs.find("j1");
    if (job == state->jobs.end() || job->second.commits.commits.empty()) return;
    const auto& files = job->second.commits.files;
    const Step step = kind == "rollback_far" && !files.empty()
                          ? files.back().step
                          : job->second.commits.commits.front().step;
    controller_.Request(
        [step](controller::RequestId id) {
          return controller::RollBack{id, "j1", step};
        },
        [this](const controller::Reply& reply) {
          if (reply.code == controller::ReplyCode::kOk) checkers_.RolledBack("j1");
        });
  } else if (kind == "files_fail") {
    files_.FailUntil(until);
  } else if (kind == "files_damage") {
    if (files_.Damage("j1")) truth_.Count("checkpoints damaged");
  } else if (kind == "corrupt") {
    node->Corrupt(timeline_.random().Below(64));
  } else if (kind == "fork_fail") {
    node->FailForksUntil(until);
  } else if (kind == "imports_hang") {
    node->HangImportsUntil(until);
  } else if (kind == "imports_fail") {
    node->FailImportsUntil(until);
  } else if (kind == "store_host_fail") {
    node->FailStoresUntil(until);
  } else if (kind == "slow_network") {
    network_.options().slow_per_mille = 300;
    then("network is itself",
         [this] { network_.options().slow_per_mille = options_.network.slow_per_mille; });
  } else if (kind == "packet_loss") {
    network_.options().drop_per_mille = 500;
    then("network is itself",
         [this] { network_.options().drop_per_mille = options_.network.drop_per_mille; });
  } else {
    EVERSTEP_CHECK(false, "a fault of an unknown kind");
  }
  if (kind == "controller_stop" || kind == "slow_disk") {
    paused_or_slow_until_ = std::max(paused_or_slow_until_, until + Seconds(2));
  }
}

// From here on the world is kind: everything that can come back is back.
void World::EndFaults() {
  truth_.Note(timeline_.now(), "faults end");
  network_.HealAll();
  network_.options().drop_per_mille = 0;
  controller_.Start();
  for (auto& [id, node] : nodes_) {
    node->Boot();
    node->StartAgent();
  }
}

bool World::Disturbed() const {
  const Duration now = timeline_.now() - start_;
  return std::any_of(faults_.begin(), faults_.end(), [&](const Fault& f) {
    return f.at <= now && now <= std::min(f.at + f.lasts, options_.fault_phase) + kAftermath;
  });
}

void World::Inspect() {
  const Timestamp now = timeline_.now();
  if (controller_.up() && controller_.idle()) {
    checkers_.CompareStore(now, *controller_.state(), controller_.store());
    if (now > paused_or_slow_until_ && now > controller_.started() + Seconds(5)) {
      checkers_.CheckDeadlines(now, *controller_.state());
    }
  }
  if (now > start_ + options_.fault_phase + Seconds(10) && controller_.up()) CheckPace(now);
  timeline_.After(kInspection, "inspection", [this] { Inspect(); });
}

// In peace whatever was done some inspections ago is committed by this one.
void World::CheckPace(Timestamp now) {
  // A step whose only copy was spoiled waits for its release.
  const bool spoiled =
      std::any_of(faults_.begin(), faults_.end(),
                  [](const Fault& f) { return f.kind == "corrupt"; }) &&
      now < start_ + options_.fault_phase + options_.controller.commit_patience + Seconds(10);
  // Where news takes longer than a trainer's patience, commits come when they come.
  if (options_.network.max_delay > Milliseconds(100)) return;
  for (const auto& [id, job] : controller_.state()->jobs) {
    const Generation generation = job.record.generation;
    Pace& pace = pace_[id];
    const auto& commits = job.commits.commits;
    if (pace.generation != generation) pace = {generation, {}};
    pace.steps.push_back(training_.GroupStep(id, generation));
    if (pace.steps.size() <= kPaceInspections) continue;
    const Step before = pace.steps.front();
    pace.steps.pop_front();
    const Step committed = commits.empty() ? kNoStep : commits.front().step;
    if (job.record.state != controller::JobState::kRunning || !WithCheckpoints(id) ||
        before <= job.plan.restore_step || pace.steps.back() >= options_.total_steps) {
      continue;
    }
    if (committed < before - kSkipped && !spoiled) {
      checkers_.TellMemory(now, *controller_.state(), id);
      truth_.Violate(
          now, "commits_live",
          fmt::format("job {} generation {} had done step {} {} s ago; step {} is committed", id,
                      generation, before, kPaceInspections * 2, committed));
    }
  }
}

bool World::WithCheckpoints(const JobId& id) const {
  return std::any_of(options_.jobs.begin(), options_.jobs.end(),
                     [&](const SimJob& j) { return j.spec.job == id && j.checkpoints; });
}

bool World::Over() const {
  if (!truth_.violations().empty()) return true;
  const controller::ClusterState* state = controller_.state();
  if (state == nullptr || timeline_.now() < start_ + options_.fault_phase) return false;
  return std::all_of(options_.jobs.begin(), options_.jobs.end(), [&](const SimJob& job) {
    const auto it = state->jobs.find(job.spec.job);
    return it != state->jobs.end() && controller::IsTerminal(it->second.record.state) &&
           !RunsAgain(job) && (job.cancel_at.count() == 0 || cancelled_.contains(job.spec.job));
  });
}

// Succeeded means that every rank of a generation came to the script's end. Small budgets may be
// spent.
void World::CheckJobEnd(const SimJob& sim_job, const controller::JobStateView& job) {
  using controller::JobState;
  using controller::Reason;
  const controller::JobRecord& record = job.record;
  const JobId& id = record.spec.job;
  const Timestamp now = timeline_.now();
  const auto wrong = [&](const std::string& what) {
    std::string owed;
    for (const NodeId& node : job.waiting_for) owed += " " + node;
    truth_.Violate(
        now, "live",
        fmt::format(
            "job {} is {} (reason {}, {}) at generation {}, step {} of {}, waits for:{}: {}", id,
            controller::JobStateName(record.state),
            controller::ReasonName(controller::IsTerminal(record.state) ? record.end_reason
                                                                        : job.reason),
            controller::IsTerminal(record.state) ? record.end_message : job.message,
            record.generation, training_.best_step(id), options_.total_steps,
            owed.empty() ? " nobody" : owed, what));
  };
  truth_.Count(std::string("ended: ") + controller::ReasonName(record.end_reason));
  switch (record.state) {
    case JobState::kSucceeded:
      if (training_.Finished(id) != record.generation) wrong("no generation came to its end");
      if (record.exit_code != 0) wrong(fmt::format("exit code {}", record.exit_code));
      if (sim_job.tells) checkers_.CheckLedgerEnd(now, job);
      return;
    case JobState::kCancelled:
      if (!cancelled_.contains(id)) wrong("nobody cancelled it");
      return;
    case JobState::kFailed: {
      if (record.end_reason == Reason::kInputRefused) {
        const bool refused = std::any_of(faults_.begin(), faults_.end(), [](const Fault& fault) {
          return fault.kind == "worker_refuse";
        });
        if (!refused) wrong("nobody refused anything");
        if (record.exit_code != 1) wrong(fmt::format("exit code {}", record.exit_code));
        return;
      }
      if (!sim_job.tight) return wrong("its budgets are far from spent");
      std::int32_t code = 1;
      bool spent = false;
      switch (record.end_reason) {
        case Reason::kRestartsExhausted:
        case Reason::kCrashAtStart:
          spent = record.restarts >= static_cast<std::uint32_t>(record.spec.max_restarts);
          break;
        case Reason::kNoProgress:
          spent = record.no_progress >= record.spec.max_no_progress;
          code = 93;
          break;
        case Reason::kStartFailures:
        case Reason::kSpawnFailed:
          spent = record.start_failures > record.spec.max_start_failures;
          break;
        case Reason::kJoinTimeout:
          spent = record.spec.join_timeout.count() > 0;
          code = 75;
          break;
        default: break;
      }
      if (!spent) wrong("the budget it names is not spent");
      if (record.exit_code != code) wrong(fmt::format("exit code {}", record.exit_code));
      return;
    }
    default: wrong("it did not end");
  }
}

void World::CheckEnd() {
  if (!truth_.violations().empty()) return;
  const controller::ClusterState* state = controller_.state();
  for (const SimJob& job : options_.jobs) {
    const bool there = state != nullptr && state->jobs.contains(job.spec.job);
    if (there) {
      CheckJobEnd(job, state->jobs.at(job.spec.job));
    } else {
      truth_.Violate(timeline_.now(), "live", fmt::format("job {} is not there", job.spec.job));
    }
  }
  if (timeline_.exhausted()) {
    truth_.Violate(timeline_.now(), "live", "the world spins: the bound on events is reached");
  }
}

RunResult World::Run(const Storyteller& storyteller, bool every_event) {
  if (storyteller) {
    truth_.storyteller = [&](Timestamp now, const std::string& line) {
      storyteller(Timestamp{(now - start_).count()}, line);
    };
    if (every_event) {
      timeline_.set_tracer(
          [this](Timestamp now, const std::string& label) { truth_.Note(now, label); });
    }
  }
  Build();
  timeline_.RunUntil(start_ + options_.fault_phase + options_.settle, [this] { return Over(); });
  CheckEnd();
  RunResult result;
  result.violations = truth_.violations();
  result.digest = timeline_.digest().value();
  result.events = timeline_.events_run();
  result.virtual_seconds = ToSeconds(timeline_.now() - start_);
  result.counts = truth_.counts();
  return result;
}

}  // namespace

RunResult RunWorld(const WorldOptions& options, const std::vector<Fault>& faults,
                   const Storyteller& storyteller, bool every_event) {
  World world(options, faults);
  return world.Run(storyteller, every_event);
}

}  // namespace everstep::sim
