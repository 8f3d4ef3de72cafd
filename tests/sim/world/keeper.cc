// The keeper's half of a simulated node: processes, stores, slots, and the plane that moves slots.
#include <algorithm>

#include <fmt/format.h>

#include "checkpoint/core/parity_ranks.h"
#include "tests/sim/world/node.h"
#include "tests/sim/world/sim_controller.h"

namespace everstep::sim {
namespace {

constexpr Duration kRestoreTimeout = Seconds(20);
constexpr Duration kFormTimeout = Seconds(20);
constexpr Duration kCaptureWait = Milliseconds(500);
constexpr Duration kScrubEvery = Milliseconds(1500);
constexpr Duration kAgentSilence = Seconds(3);  // then a trainer takes its agent for dead

}  // namespace

void SimNode::CarryOutInKeeper(const agent::Effect& effect) {
  if (const auto* f = std::get_if<agent::StartForkServer>(&effect)) {
    keeper_->jobs[f->job].command = f->command;
    const bool hangs = env_.timeline->now() < imports_hang_until_;
    const bool fails = env_.timeline->now() < imports_fail_until_;
    AfterKeeper(Draw(200, 3000), "fork server", [this, hangs, fails, job = f->job] {
      if (hangs) return env_.truth->Count("fork servers that hang");
      if (fails) {
        env_.truth->Count("fork servers that fail");
        return Tell(agent::ForkServerState{job, false, "it ended while it started"});
      }
      if (KeeperJob* j = FindJob(job)) j->fork_server = true;
      Tell(agent::ForkServerState{job, true, ""});
    });
  } else if (const auto* s = std::get_if<agent::StartStore>(&effect)) {
    keeper_->jobs[s->job].command = s->command;
    AfterKeeper(Draw(10, 200), "store", [this, job = s->job, generation = s->generation] {
      KeeperJob* j = FindJob(job);
      if (j == nullptr || j->killed >= generation) return;
      if (env_.timeline->now() < stores_fail_until_) {
        Tell(agent::StoreFailed{job, generation, "address in use"});
      } else {
        Tell(agent::StoreReady{
            job, generation,
            static_cast<std::uint32_t>(20000 + env_.timeline->random().Below(20000))});
      }
    });
  } else if (const auto* w = std::get_if<agent::StartWorkers>(&effect)) {
    StartWorkers(w->activate);
  } else if (const auto* k = std::get_if<agent::KillWorkers>(&effect)) {
    Kill(k->job, k->generation, k->grace, k->park);
  } else if (const auto* g = std::get_if<agent::ForgetJob>(&effect)) {
    if (const KeeperJob* job = FindJob(g->job);
        job != nullptr && job->processes.empty() && job->parked.empty()) {
      keeper_->jobs.erase(g->job);
    }
  } else if (const auto* i = std::get_if<agent::RememberIncarnation>(&effect)) {
    keeper_->remembered = i->incarnation;
  } else if (const auto* p = std::get_if<agent::RememberPrepared>(&effect)) {
    KeeperJob& job = keeper_->jobs[p->job];
    job.generation = p->generation;
    job.command = p->command;
    job.activate.reset();
    job.exited.clear();
    job.step = kNoStep;
  } else if (const auto* a = std::get_if<agent::RememberActivated>(&effect)) {
    KeeperJob& job = keeper_->jobs[a->activate.job];
    job.generation = a->activate.generation;
    job.memory.GiveUp(a->activate.given_up);
    job.activate = a->activate;
    job.exited.clear();
  } else if (const auto* v = std::get_if<agent::Survey>(&effect)) {
    AfterKeeper(Draw(1, 40), "survey", [this, asked = *v] {
      Tell(agent::Surveyed{asked.job, asked.generation, Found(asked.job, asked.given_up)});
    });
  } else if (const auto* m = std::get_if<agent::MarkCommitted>(&effect)) {
    if (KeeperJob* job = FindJob(m->job)) {
      job->memory.MarkCommitted(m->generation, m->step);
      job->memory.MarkReleased(m->generation, m->released);
    }
  } else if (const auto* heard = std::get_if<agent::TellWorker>(&effect)) {
    HearWords(heard->ack);
  } else if (const auto* mend = std::get_if<agent::MendShard>(&effect)) {
    Mend(*mend);
  } else if (const auto* make = std::get_if<agent::MakeShard>(&effect)) {
    Build(std::make_shared<Building>(Building{make->job, make->generation, make->build, {}}));
  } else if (const auto* c = std::get_if<agent::ControllerAway>(&effect)) {
    keeper_->controller_away = controller_away_ = c->away;
  }
}

void SimNode::DropKeeper() {
  if (!keeper_) return;
  for (const auto& [id, job] : keeper_->jobs) {
    for (const auto& [key, process] : job.processes)
      env_.training->Leave(id, key.first, key.second);
  }
  const std::uint64_t id = keeper_->id;
  ++keeper_life_;
  keeper_paused_until_ = {};
  keeper_.reset();
  env_.controller->KeeperDied(name_, id);
}

SimNode::KeeperJob* SimNode::FindJob(const JobId& job) {
  if (!keeper_) return nullptr;
  const auto it = keeper_->jobs.find(job);
  return it == keeper_->jobs.end() ? nullptr : &it->second;
}

SimNode::Process* SimNode::FindProcess(const JobId& job, ProcessKey key) {
  KeeperJob* j = FindJob(job);
  if (j == nullptr) return nullptr;
  const auto it = j->processes.find(key);
  return it == j->processes.end() ? nullptr : &it->second;
}

std::vector<agent::AdoptedJob> SimNode::Adopted() const {
  std::vector<agent::AdoptedJob> all;
  for (const auto& [id, job] : keeper_->jobs) {
    agent::AdoptedJob adopted;
    adopted.holds.job = id;
    adopted.holds.generation = job.generation;
    adopted.holds.activated = job.activate.has_value();
    adopted.command = job.command;
    adopted.fork_server_ready = job.fork_server;
    adopted.step = job.step;
    if (job.activate) {
      adopted.group_rank = job.activate->plan.group_rank;
      for (const WorkerPlan& w : job.activate->plan.workers) {
        const ProcessKey key{job.generation, w.rank};
        WorkerOnNode worker;
        worker.rank = w.rank;
        worker.local_rank = w.local_rank;
        if (const auto p = job.processes.find(key); p != job.processes.end()) {
          worker.pid = p->second.pid;
          worker.running = true;
        } else if (const auto x = job.exited.find(key); x != job.exited.end()) {
          worker = x->second;
        }
        adopted.holds.workers.push_back(worker);
      }
    }
    for (const auto& [key, process] : job.processes) {
      if (job.activate && key.first == job.generation) continue;
      WorkerOnNode worker;
      worker.rank = key.second;
      worker.local_rank = process.local_rank;
      worker.pid = process.pid;
      worker.running = true;
      adopted.old_workers.emplace_back(key.first, worker);
    }
    for (const auto& [local_rank, parked] : job.parked) {
      WorkerOnNode worker;
      worker.rank = parked.first.second;
      worker.local_rank = local_rank;
      worker.pid = parked.second.pid;
      worker.running = true;
      adopted.old_workers.emplace_back(parked.first.first, worker);
    }
    all.push_back(std::move(adopted));
  }
  return all;
}

// --- processes ---

void SimNode::StartWorkers(const agent::Activate& activate) {
  KeeperJob& job = keeper_->jobs[activate.job];
  if (activate.generation < job.generation || activate.generation <= job.killed) {
    env_.truth->Violate(
        env_.timeline->now(), "stale_obeyed",
        fmt::format("{} starts generation {} of job {}, it knew {} and ended {}", name_,
                    activate.generation, activate.job, job.generation, job.killed));
  }
  const auto& workers = activate.plan.workers;
  if (std::any_of(workers.begin(), workers.end(), [](const auto& w) { return w.restore.file; })) {
    return LoadFiles(activate);
  }
  ForkAll(activate);
}

void SimNode::ForkAll(const agent::Activate& activate) {
  KeeperJob& job = keeper_->jobs[activate.job];
  for (const WorkerPlan& worker : activate.plan.workers) {
    job.starting.emplace(activate.generation, worker.rank);
    AfterKeeper(Draw(10, 250), "fork", [this, activate, worker] { Fork(activate, worker); });
  }
}

void SimNode::Fork(const agent::Activate& activate, const WorkerPlan& worker) {
  KeeperJob* job = FindJob(activate.job);
  const ProcessKey key{activate.generation, worker.rank};
  if (job == nullptr || job->starting.erase(key) == 0) return;
  const auto parked = job->parked.find(worker.local_rank);
  const bool resumed = parked != job->parked.end();
  if (!resumed && env_.timeline->now() < forks_fail_until_) {
    Tell(agent::WorkerStartFailed{activate.job, activate.generation, worker.rank,
                                  "fork: resource temporarily unavailable"});
    return;
  }
  for (const auto& [other, process] : job->processes) {
    if (other.first >= key.first) continue;
    env_.truth->Violate(
        env_.timeline->now(), "one_generation_per_node",
        fmt::format("{} forks rank {} of job {} generation {} while rank {} of "
                    "generation {} lives",
                    name_, worker.rank, activate.job, key.first, other.second, other.first));
  }
  Process process;
  process.pid = resumed ? parked->second.second.pid : next_pid_++;
  if (resumed) {
    if (parked->second.first.first >= key.first) {
      env_.truth->Violate(
          env_.timeline->now(), "stale_obeyed",
          fmt::format("{} resumes rank {} of job {} from generation {} in {}", name_, worker.rank,
                      activate.job, parked->second.first.first, key.first));
    }
    env_.truth->Count("workers resumed in place");
    job->parked.erase(parked);
  }
  process.local_rank = worker.local_rank;
  process.world_size = static_cast<std::int32_t>(activate.world_size);
  process.started = env_.timeline->now();
  process.patience = kCaptureWait;
  job->memory.NewProcess(worker.rank);
  job->processes.emplace(key, process);
  Tell(agent::WorkerStarted{activate.job, activate.generation, worker.rank, worker.local_rank,
                            process.pid});
  if (job->killed >= activate.generation) {
    return Die(activate.job, key, process.pid, -9, /*by_everstep=*/true);
  }
  WatchStart(activate.job, key);
  AfterKeeper(Draw(5, 100), "restore", [this, id = activate.job, key, plan = worker.restore] {
    Restore(id, key, plan, env_.timeline->now() + kRestoreTimeout);
  });
}

// Says again and again that a worker's group did not form; the agent passes it on.
void SimNode::WatchStart(const JobId& job, ProcessKey key) {
  AfterKeeper(kFormTimeout, "group check", [this, job, key] {
    if (FindProcess(job, key) == nullptr || env_.training->Formed(job, key.first)) return;
    Tell(agent::WorkerStalled{job, key.first, key.second, StallKind::kGroupNotFormed,
                              "no process group", kFormTimeout});
    WatchStart(job, key);
  });
}

void SimNode::Restore(const JobId& job, ProcessKey key, const RestorePlan& plan,
                      Timestamp give_up) {
  const Process* process = FindProcess(job, key);
  if (process == nullptr) return;
  if (plan.step == kNoStep) return JoinGroup(job, key, kFromNothing, 0);
  if (env_.training->Joined(job, key.first, key.second)) return;
  const auto mine = plan.ranges ? std::nullopt : Offer(job, plan);
  if (mine) return Restored(job, key, plan, *mine);
  if (env_.timeline->now() >= give_up) {
    env_.truth->Count("restores failed");
    return Die(job, key, process->pid, 1, false);
  }
  const auto again = [this, job, key, plan, give_up] { Restore(job, key, plan, give_up); };
  AfterKeeper(Milliseconds(500), "restore again", again);
  if (plan.ranges) {
    const auto& activate = FindJob(job)->activate;
    if (!activate || activate->generation != key.first) return;
    return Gather(job, key, std::make_shared<const RestoreCut>(activate->cut));
  }
  // Who passes the shard on may not have it yet, or never get it: holders are asked in between.
  const std::size_t turn =
      static_cast<std::size_t>((give_up - env_.timeline->now()) / Milliseconds(500));
  const std::size_t choices = plan.others.size() + 1;
  const bool first = plan.others.empty() || turn % 2 == 0;
  SimNode* source =
      env_.peer(first ? plan.source_node : plan.others[turn / 2 % (choices - 1)].node);
  if (source == nullptr || source == this) return;
  // Request and answer; either may be lost.
  env_.network->Send(name_, source->name_, name_ + " fetches",
                     [this, source, job, key, plan, first] {
                       const auto shard = source->Offer(job, plan);
                       if (!shard) return;
                       const bool passed_on = first && plan.relay > 0;
                       env_.network->Send(source->name_, name_, "fetched",
                                          [this, job, key, plan, s = *shard, passed_on, first] {
                                            if (passed_on) env_.truth->Count("shards passed on");
                                            if (!first)
                                              env_.truth->Count("shards from another holder");
                                            Restored(job, key, plan, s);
                                          });
                     });
}

// The shard lies in this node's memory now, as the rank's own.
void SimNode::Restored(const JobId& job, ProcessKey key, const RestorePlan& plan,
                       const HeldShard& shard) {
  if (FindProcess(job, key) == nullptr || env_.training->Joined(job, key.first, key.second)) return;
  const std::optional<Lineage> state = env_.truth->OfChecksum(shard.crc_root);
  if (!state || shard.crc_root != plan.crc_root) {
    env_.truth->Violate(env_.timeline->now(), "verified_restore",
                        fmt::format("{} restores checksum {:08x}, the plan names {:08x}", name_,
                                    shard.crc_root, plan.crc_root));
    return;
  }
  if (shard.share) {
    env_.truth->Violate(env_.timeline->now(), "shares_together",
                        fmt::format("{} restores rank {} from the share of rank {} alone", name_,
                                    key.second, shard.rank));
    return;
  }
  HeldShard own = shard;
  own.replica = false;
  FindJob(job)->memory.Restore(key.second, own);
  env_.truth->Copied(name_, keeper_->id, job, own);
  Tell(agent::ShardCopied{job, own});
  JoinGroup(job, key, *state, shard.step);
  Push(job, key.second, key.first);
}

// One shard after the other, each from this node or from any holder that answers.
void SimNode::Gather(const JobId& job, ProcessKey key,
                     const std::shared_ptr<const RestoreCut>& cut) {
  Process* process = FindProcess(job, key);
  if (process == nullptr || env_.training->Joined(job, key.first, key.second)) return;
  const auto wanted = [&cut](const CutShard& shard) {
    return RestorePlan{.step = cut->step,
                       .shard_rank = shard.rank,
                       .shard_generation = cut->generation,
                       .crc_root = shard.crc_root,
                       .source_node = {},
                       .source_address = {}};
  };
  const CutShard* next = nullptr;
  for (const CutShard& shard : cut->shards) {
    if (process->gathered.contains(shard.rank)) continue;
    if (Offer(job, wanted(shard)) ||
        (shard.file &&
         env_.files->Read(job, cut->generation, cut->step, shard.rank, shard.crc_root))) {
      process->gathered.insert(shard.rank);
    } else if (next == nullptr) {
      next = &shard;
    }
  }
  if (next == nullptr) return Assembled(job, key, *cut);
  if (next->holders.empty()) return;
  const auto turn = static_cast<std::size_t>(env_.timeline->random().Below(next->holders.size()));
  SimNode* source = env_.peer(next->holders[turn].node);
  if (source == nullptr || source == this) return;
  // Request and answer; either may be lost.
  env_.network->Send(name_, source->name_, name_ + " reads ranges",
                     [this, source, job, key, cut, plan = wanted(*next)] {
                       if (!source->Offer(job, plan)) return;
                       env_.network->Send(source->name_, name_, "ranges", [=, this] {
                         Process* reader = FindProcess(job, key);
                         if (reader == nullptr) return;
                         if (reader->gathered.insert(plan.shard_rank).second) {
                           Gather(job, key, cut);
                         }
                       });
                     });
}

// All of the cut was read: this rank's part of it lies in its arena, captured by this generation.
void SimNode::Assembled(const JobId& job, ProcessKey key, const RestoreCut& cut) {
  const std::optional<Lineage> state = env_.truth->OfChecksum(cut.shards.front().crc_root);
  if (!state) return;  // CheckRestore has told
  HeldShard own{.rank = key.second,
                .world_size = FindProcess(job, key)->world_size,
                .generation = key.first,
                .step = cut.step,
                .crc_root = env_.truth->Checksum(*state, key.second),
                .bytes = cut.shards.front().bytes};
  own.share = env_.options->shares && own.world_size > 1;
  FindJob(job)->memory.Assemble(key.second, own, cut);
  env_.truth->Copied(name_, keeper_->id, job, own);
  env_.truth->Count("restores by ranges");
  Tell(agent::ShardCopied{job, own});
  JoinGroup(job, key, *state, cut.step);
  Push(job, key.second, key.first);
}

void SimNode::JoinGroup(const JobId& job, ProcessKey key, Lineage state, Step step) {
  const Process& process = *FindProcess(job, key);
  const std::int32_t pid = process.pid;
  const auto is = [this, job, key, pid] {
    const Process* p = FindProcess(job, key);
    return p != nullptr && p->pid == pid;
  };
  Training::Member member;
  member.node = name_;
  member.restored = state;
  member.restored_step = step;
  member.runs = [this, is, job, key] { return is() && !FindProcess(job, key)->stopped; };
  member.capture = [this, job, key, pid, checkpoints = Checkpoints(job)](Lineage s, Step n) {
    if (!checkpoints) return;
    Capture(job, key, pid, s, n, env_.timeline->now());
  };
  member.leave = [this, is, job, key, pid](std::int32_t code) {
    if (is()) Die(job, key, pid, code, false);
  };
  member.ready = [this, is, job, key] { return is() && !FindProcess(job, key)->capturing; };
  member.tell = [this, job, key](const std::string& word) {
    return TellController(job, key, word);
  };
  member.acknowledged = [this, job, key]() -> std::uint64_t {
    const Process* p = FindProcess(job, key);
    return p == nullptr ? 0 : p->acknowledged;
  };
  env_.training->Join(job, key.first, process.world_size, key.second, std::move(member));
}

bool SimNode::Checkpoints(const JobId& job) const {
  return std::none_of(env_.options->jobs.begin(), env_.options->jobs.end(),
                      [&](const SimJob& j) { return j.spec.job == job && !j.checkpoints; });
}

bool SimNode::Sessions(const JobId& job) const {
  return std::any_of(env_.options->jobs.begin(), env_.options->jobs.end(),
                     [&](const SimJob& j) { return j.spec.job == job && j.sessions; });
}

void SimNode::Kill(const JobId& job, Generation generation, Duration grace, Duration park) {
  KeeperJob* j = FindJob(job);
  if (j == nullptr) return;
  j->killed = std::max(j->killed, generation);
  const bool parks = park > Duration{} && Sessions(job);
  for (const auto& [local_rank, parked] : j->parked) {
    const auto& [key, process] = parked;
    if (key.first > generation) continue;
    if (parks) {
      Tell(agent::WorkerParked{job, key.first, key.second, process.pid});
    } else {
      AfterKeeper(Draw(1, 300), "kill", [this, job, local = local_rank, pid = process.pid] {
        DieParked(job, local, pid, /*by_everstep=*/true);
      });
    }
  }
  for (auto& [key, process] : j->processes) {
    if (key.first > generation) continue;
    if (parks && !process.stopped && !process.ending) {
      // Some compute for so long that they are killed; some die while they are parked.
      const bool in_time = env_.timeline->random().Chance(850);
      AfterKeeper(in_time ? Draw(1, 500) : park, "park",
                  [this, job, k = key, pid = process.pid, in_time] {
                    if (in_time) return Park(job, k, pid);
                    Die(job, k, pid, -9, /*by_everstep=*/true);
                  });
      continue;
    }
    process.ending = true;
    // Most end on SIGTERM, some only on SIGKILL; a stopped process takes no SIGTERM.
    const bool term = !process.stopped && env_.timeline->random().Chance(800);
    const Duration after =
        term ? std::min(grace, Draw(1, 300)) : grace + std::chrono::microseconds(100);
    AfterKeeper(after, "kill", [this, job, k = key, pid = process.pid, term] {
      Die(job, k, pid, term ? -15 : -9, /*by_everstep=*/true);
    });
  }
}

// It holds nothing of its generation any more, but lives.
void SimNode::Park(const JobId& job, ProcessKey key, std::int32_t pid) {
  const Process* process = FindProcess(job, key);
  if (process == nullptr || process->pid != pid || process->ending) return;
  if (process->stopped) return Die(job, key, pid, -9, /*by_everstep=*/true);
  const Process parked = *process;
  KeeperJob& j = *FindJob(job);
  j.processes.erase(key);
  env_.training->Leave(job, key.first, key.second);
  env_.truth->Count("workers parked");
  j.parked[parked.local_rank] = {key, parked};
  if (env_.timeline->random().Chance(100)) {
    AfterKeeper(Draw(1, 400), "dies parked", [this, job, local = parked.local_rank, pid] {
      DieParked(job, local, pid, /*by_everstep=*/false);
    });
  }
  Tell(agent::WorkerParked{job, key.first, key.second, pid});
}

void SimNode::DieParked(const JobId& job, std::int32_t local_rank, std::int32_t pid,
                        bool by_everstep) {
  KeeperJob* j = FindJob(job);
  if (j == nullptr) return;
  const auto it = j->parked.find(local_rank);
  if (it == j->parked.end() || it->second.second.pid != pid) return;
  const auto [key, process] = it->second;
  j->parked.erase(it);
  ExitInfo exit;
  exit.code = -9;
  exit.by_everstep = by_everstep;
  exit.occurred = env_.timeline->now();
  exit.ran = env_.timeline->now() - process.started;
  Tell(agent::WorkerExited{job, key.first, key.second, pid, exit});
}

void SimNode::Die(const JobId& job, ProcessKey key, std::int32_t pid, std::int32_t code,
                  bool by_everstep) {
  const Process* process = FindProcess(job, key);
  if (process == nullptr || process->pid != pid) return;
  const Timestamp now = env_.timeline->now();
  if (now < process->unkillable_until) {
    AfterKeeper(
        process->unkillable_until - now, "dies at last",
        [this, job, key, pid, code, by_everstep] { Die(job, key, pid, code, by_everstep); });
    return;
  }
  WorkerOnNode worker;
  worker.rank = key.second;
  worker.local_rank = process->local_rank;
  worker.pid = pid;
  worker.running = false;
  worker.exit.code = code;
  if (code == kRefuses) worker.exit.refused = "a batch of 7 does not divide";
  worker.exit.by_everstep = by_everstep;
  worker.exit.occurred = now;
  worker.exit.ran = now - process->started;
  KeeperJob& j = *FindJob(job);
  j.processes.erase(key);
  if (j.activate && j.generation == key.first) j.exited[key] = worker;
  env_.training->Leave(job, key.first, key.second);
  Tell(agent::WorkerExited{job, key.first, key.second, pid, worker.exit});
}

std::optional<std::pair<JobId, SimNode::ProcessKey>> SimNode::Pick(std::int32_t local_rank) const {
  if (!keeper_) return std::nullopt;
  for (const auto& [id, job] : keeper_->jobs) {
    for (const auto& [key, process] : job.processes) {
      if (process.local_rank == local_rank) return std::pair(id, key);
    }
  }
  return std::nullopt;
}

void SimNode::Signal(std::int32_t local_rank, std::int32_t code) {
  if (const auto p = Pick(local_rank)) {
    Die(p->first, p->second, FindProcess(p->first, p->second)->pid, code, false);
  }
}

void SimNode::StopWorker(std::int32_t local_rank) {
  const auto p = Pick(local_rank);
  if (!p) return;
  Process* process = FindProcess(p->first, p->second);
  process->stopped = true;
  ReportStopped(p->first, p->second, process->pid);
}

void SimNode::ReportStopped(const JobId& job, ProcessKey key, std::int32_t pid) {
  AfterKeeper(Draw(1000, 2000), "state T", [this, job, key, pid] {
    const Process* process = FindProcess(job, key);
    if (process == nullptr || process->pid != pid) return;
    Tell(agent::WorkerStalled{job, key.first, key.second, StallKind::kStopped, "state T",
                              Seconds(1)});
    ReportStopped(job, key, pid);
  });
}

void SimNode::MakeUnkillable(std::int32_t local_rank, Timestamp until) {
  if (const auto p = Pick(local_rank)) {
    Process* process = FindProcess(p->first, p->second);
    process->unkillable_until = until;
  }
}

// --- the checkpoint plane ---

void SimNode::Capture(const JobId& job, ProcessKey key, std::int32_t pid, Lineage state, Step step,
                      Timestamp began) {
  Process* process = FindProcess(job, key);
  if (process == nullptr || process->pid != pid) return;
  KeeperJob& j = *FindJob(job);
  process->capturing = j.generation == key.first;
  if (!process->capturing) return;  // fenced: a newer generation is being prepared
  HeldShard shard;
  shard.rank = key.second;
  shard.world_size = process->world_size;
  shard.generation = key.first;
  shard.step = step;
  shard.replicated_layout = env_.options->replicated_layout;
  shard.share = env_.options->shares && shard.world_size > 1;
  if (env_.options->mixed && shard.rank == 0 && step % 9 == 4) shard.share = false;
  shard.crc_root = env_.truth->Checksum(state, key.second);
  shard.bytes = 1 << 20;
  Memory::Trainer trainer;
  trainer.peers = j.activate ? j.activate->plan.peers.size() : 0;
  trainer.kept_by_parity = j.activate && j.activate->kept_by_parity;
  trainer.agent_alive = Responsive() || env_.timeline->now() < agent_gone_since_ + kAgentSilence;
  trainer.controller_away = keeper_->controller_away;
  trainer.waited = env_.timeline->now() - began >= process->patience;
  const checkpoint::CaptureAction action = j.memory.Capture(shard, trainer);
  if (action == checkpoint::CaptureAction::kWait) {
    AfterKeeper(Milliseconds(15), "capture waits", [this, job, key, pid, state, step, began] {
      Capture(job, key, pid, state, step, began);
    });
    return;
  }
  process->capturing = false;
  process->patience =
      trainer.waited ? std::max(process->patience / 2, Milliseconds(1)) : kCaptureWait;
  if (action == checkpoint::CaptureAction::kSkip) {
    env_.truth->Count("captures skipped");
    return;
  }
  env_.truth->Count("captures");
  j.step = std::max(j.step, step);
  env_.truth->Copied(name_, keeper_->id, job, shard);
  Tell(agent::StepCaptured{job, key.first, step});
  Tell(agent::ShardCopied{job, shard});
  Push(job, key.second, key.first);
}

// Sends the rank's newest slot to each of the plan's peers until it is acknowledged or another
// came.
void SimNode::Push(const JobId& job, Rank rank, Generation generation) {
  KeeperJob* j = FindJob(job);
  if (j == nullptr || !agent_ || !j->activate || j->activate->generation != generation) return;
  for (const PeerPlan& peer : j->activate->plan.peers) PushTo(job, rank, generation, peer.node);
}

void SimNode::PushTo(const JobId& job, Rank rank, Generation generation, const NodeId& to) {
  KeeperJob* j = FindJob(job);
  const Memory::Slot* slot = j->memory.ToPush(rank, generation);
  if (slot == nullptr || slot->acknowledged.contains(to) || slot->pushing.contains(to)) return;
  const HeldShard shard = slot->shard;
  const std::optional<HeldShard> kept = j->memory.Committed(rank);
  j->memory.MarkPushing(shard, to, true);
  AfterKeeper(Draw(300, 600), "push ends", [this, to, job, rank, generation, shard] {
    KeeperJob* again = FindJob(job);
    if (again == nullptr) return;
    again->memory.MarkPushing(shard, to, false);
    Push(job, rank, generation);
  });
  env_.network->Send(name_, to, name_ + " pushes", [this, to, job, generation, shard, kept] {
    SimNode* peer = env_.peer(to);
    if (peer == nullptr || !peer->Receive(job, generation, shard, kept)) return;
    env_.network->Send(to, name_, to + " acknowledges", [this, to, job, shard] {
      KeeperJob* owner = FindJob(job);
      if (owner == nullptr) return;
      owner->memory.MarkReplicated(shard, to);
      owner->memory.MarkPushing(shard, to, false);
    });
  });
}

// A restarted agent goes on with what its keeper holds: copies that were never reported, slots that
// were never pushed.
void SimNode::PushAll() {
  if (!keeper_) return;
  std::vector<std::pair<JobId, ProcessKey>> all;
  for (const auto& [id, job] : keeper_->jobs) {
    for (const auto& [key, process] : job.processes) all.emplace_back(id, key);
  }
  for (const auto& [id, key] : all) Push(id, key.second, key.first);
}

// The agent's scrubber: says what is damaged, again and again while it is.
void SimNode::Scrub() {
  AfterKeeper(kScrubEvery, "scrub", [this] {
    if (agent_) {
      for (const auto& [id, job] : keeper_->jobs) {
        for (const HeldShard& shard : job.memory.Damaged()) {
          env_.truth->Count("damage found");
          Tell(agent::ShardDamaged{id, shard, 0, "scrub"});
        }
      }
    }
    Scrub();
  });
}

// Asks the source for the very bytes; either message may be lost, the next scrub finds it again.
void SimNode::Mend(const agent::MendShard& mend) {
  SimNode* source = env_.peer(mend.source_node);
  if (source == nullptr) return;
  RestorePlan wanted;
  wanted.step = mend.shard.step;
  wanted.shard_rank = mend.shard.rank;
  wanted.shard_generation = mend.shard.generation;
  wanted.crc_root = mend.shard.crc_root;
  if (source == this) {  // a copy beside it
    KeeperJob* job = FindJob(mend.job);
    if (job == nullptr || !agent_ || !Offer(mend.job, wanted) || !job->memory.Mend(mend.shard))
      return;
    env_.truth->Count("slots mended from beside");
    env_.truth->Copied(name_, keeper_->id, mend.job, mend.shard);
    return Tell(agent::ShardCopied{mend.job, mend.shard});
  }
  env_.network->Send(name_, source->name_, name_ + " mends", [this, source, mend, wanted] {
    if (!source->Offer(mend.job, wanted)) return;
    env_.network->Send(source->name_, name_, "mended", [this, mend] {
      KeeperJob* job = FindJob(mend.job);
      if (job == nullptr || !agent_ || !job->memory.Mend(mend.shard)) return;
      env_.truth->Count("slots mended");
      env_.truth->Copied(name_, keeper_->id, mend.job, mend.shard);
      Tell(agent::ShardCopied{mend.job, mend.shard});
    });
  });
}

// Every source is asked for again and again; any message may be lost. A parity takes one piece of
// each member of its codeword, a lost shard of each of its codewords as many as it has members.
void SimNode::Build(const std::shared_ptr<Building>& building) {
  KeeperJob* job = FindJob(building->job);
  if (job == nullptr || !agent_ || job->generation != building->generation) return;
  const ShardBuild& build = building->build;
  const auto words = checkpoint::CodewordsOf(build.group, build.parity, build.shard.world_size);
  const auto has = [&](Rank rank) { return building->gathered.contains(rank); };
  const bool enough = std::all_of(words.begin(), words.end(), [&](const checkpoint::Codeword& w) {
    const auto names = [&build](const std::vector<Rank>& ranks) {
      return std::find(ranks.begin(), ranks.end(), build.shard.rank) != ranks.end();
    };
    if (names(w.parities)) return std::all_of(w.members.begin(), w.members.end(), has);
    if (!names(w.members)) return true;
    return std::count_if(w.members.begin(), w.members.end(), has) +
               std::count_if(w.parities.begin(), w.parities.end(), has) >=
           static_cast<std::ptrdiff_t>(w.members.size());
  });
  if (enough) return Built(*building);
  for (const CutShard& source : build.sources) {
    if (has(source.rank)) continue;
    const RestorePlan wanted{.step = build.shard.step,
                             .shard_rank = source.rank,
                             .shard_generation = build.shard.generation,
                             .crc_root = source.crc_root,
                             .source_node = {},
                             .source_address = {}};
    SimNode* from = env_.peer(source.holders.front().node);
    if (from == nullptr) continue;
    if (from == this) {
      if (Offer(building->job, wanted)) building->gathered.insert(source.rank);
      continue;
    }
    env_.network->Send(name_, from->name_, name_ + " gathers", [this, from, wanted, building] {
      if (!from->Offer(building->job, wanted)) return;
      env_.network->Send(from->name_, name_, "gathered",
                         [building, rank = wanted.shard_rank] { building->gathered.insert(rank); });
    });
  }
  AfterKeeper(Draw(20, 300), "build", [this, building] { Build(building); });
}

void SimNode::Built(const Building& building) {
  KeeperJob* job = FindJob(building.job);
  HeldShard shard = building.build.shard;
  std::optional<Lineage> state;
  for (const CutShard& source : building.build.sources) {
    const std::optional<Lineage> of = env_.truth->OfChecksum(source.crc_root);
    if (!of || (state && *state != *of)) {
      env_.truth->Violate(env_.timeline->now(), "one_state",
                          fmt::format("{} makes rank {} of step {} out of different states", name_,
                                      shard.rank, shard.step));
      return;
    }
    state = of;
  }
  if (!state) return;
  // Parities of different plans are different bytes.
  const std::uint32_t crc_root =
      env_.truth->Checksum(*state, shard.rank + 100'000 * static_cast<Rank>(shard.built));
  if (shard.crc_root != 0 && shard.crc_root != crc_root) {
    env_.truth->Violate(env_.timeline->now(), "verified_restore",
                        fmt::format("{} makes rank {} with checksum {:08x}, {:08x} is wanted",
                                    name_, shard.rank, crc_root, shard.crc_root));
    return;
  }
  env_.truth->Count(shard.crc_root == 0 ? "parities made" : "lost shards made anew");
  shard.crc_root = crc_root;
  if (shard.bytes == 0) shard.bytes = 1 << 18;
  // The newest commit stays, whatever comes.
  if (!job->memory.Receive(shard, building.generation, std::nullopt)) return;
  env_.truth->Copied(name_, keeper_->id, building.job, shard);
  Tell(agent::ShardCopied{building.job, shard});
}

bool SimNode::Receive(const JobId& job, Generation generation, HeldShard shard,
                      const std::optional<HeldShard>& kept) {
  KeeperJob* j = FindJob(job);
  if (j == nullptr || !Responsive() || j->generation != generation || j->killed >= generation) {
    return false;
  }
  shard.replica = true;
  if (!j->memory.Receive(shard, generation, kept)) return false;
  env_.truth->Copied(name_, keeper_->id, job, shard);
  Tell(agent::ShardCopied{job, shard});
  return true;
}

std::optional<HeldShard> SimNode::Offer(const JobId& job, const RestorePlan& wanted) const {
  if (!Responsive()) return std::nullopt;
  const auto it = keeper_->jobs.find(job);
  if (it == keeper_->jobs.end()) return std::nullopt;
  return it->second.memory.Find(wanted.step, wanted.shard_generation, wanted.shard_rank,
                                wanted.crc_root);
}

std::vector<HeldShard> SimNode::Verified(const JobId& job) const {
  if (!keeper_) return {};
  const auto it = keeper_->jobs.find(job);
  if (it == keeper_->jobs.end()) return {};
  return it->second.memory.Verified();
}

std::string SimNode::DescribeMemory(const JobId& job) const {
  if (!keeper_) return " (no keeper)";
  const auto it = keeper_->jobs.find(job);
  return it == keeper_->jobs.end() ? "" : it->second.memory.Describe();
}

void SimNode::Corrupt(std::uint64_t n) {
  if (!keeper_ || keeper_->jobs.empty()) return;
  auto& [id, job] = *keeper_->jobs.begin();
  if (const auto spoiled = job.memory.Corrupt(n)) {
    env_.truth->Count("slots corrupted");
    env_.truth->Spoiled(name_, keeper_->id, id, *spoiled);
  }
}

std::set<Generation> SimNode::LiveGenerations(const JobId& job) const {
  std::set<Generation> live;
  if (!keeper_) return live;
  const auto it = keeper_->jobs.find(job);
  if (it == keeper_->jobs.end()) return live;
  for (const auto& [key, process] : it->second.processes) live.insert(key.first);
  for (const ProcessKey& key : it->second.starting) live.insert(key.first);
  return live;
}

}  // namespace everstep::sim
