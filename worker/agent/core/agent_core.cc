#include "worker/agent/core/agent_core.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>

namespace everstep::agent {
namespace {

// How long workers of a job that the controller does not know may take to end.
constexpr Duration kUnknownJobGrace = Seconds(5);

// pid 0: the keeper was asked to fork it and has not answered yet.
bool Starting(const WorkerOnNode& w) {
  return w.pid == 0;
}
bool AliveOrStarting(const WorkerOnNode& w) {
  return w.running || Starting(w);
}

std::vector<WorkerOnNode> Forked(const std::vector<WorkerOnNode>& workers) {
  std::vector<WorkerOnNode> out;
  for (const WorkerOnNode& w : workers) {
    if (!Starting(w)) out.push_back(w);
  }
  return out;
}

WorkerOnNode* FindRank(std::vector<WorkerOnNode>* workers, Rank rank) {
  for (WorkerOnNode& w : *workers) {
    if (w.rank == rank) return &w;
  }
  return nullptr;
}

// What waits for the end of `job`'s processes, in words.
std::string Lingering(const JobView& job) {
  std::string out;
  for (const auto& [generation, w] : job.old_workers) {
    out += fmt::format("{}rank {} pid {} of generation {}", out.empty() ? "" : ", ", w.rank, w.pid,
                       generation);
  }
  return out;
}

// Workers of the current generation become old ones: their exits are awaited, no longer reported.
void RetireWorkers(JobView* job) {
  for (const WorkerOnNode& w : job->workers) {
    if (AliveOrStarting(w)) job->old_workers.emplace_back(job->generation, w);
  }
  job->workers.clear();
}

JobOnNode Holds(const JobId& id, const JobView& job) {
  JobOnNode holds;
  holds.job = id;
  holds.generation = job.generation;
  holds.activated = job.phase == JobView::Phase::kRunning && job.trouble.empty();
  holds.workers = Forked(job.workers);
  return holds;
}

}  // namespace

const char* PhaseName(JobView::Phase phase) {
  switch (phase) {
    case JobView::Phase::kIdle: return "idle";
    case JobView::Phase::kDraining: return "draining";
    case JobView::Phase::kSurveying: return "surveying";
    case JobView::Phase::kPrepared: return "prepared";
    case JobView::Phase::kStarting: return "starting";
    case JobView::Phase::kRunning: return "running";
    case JobView::Phase::kStopping: return "stopping";
  }
  return "unknown";
}

void AgentCore::Step(Timestamp now, const Event& event, Effects* out) {
  now_ = now;
  std::visit([&](const auto& e) { On(now, e, out); }, event);
}

std::optional<Timestamp> AgentCore::NextWakeup() const {
  std::optional<Timestamp> next = registered_ ? next_beat_ : std::nullopt;
  if (registered_ && away_at_ && !away_ && (!next || *away_at_ < *next)) next = away_at_;
  for (const auto& [id, job] : jobs_) {
    if (job.deadline && (!next || *job.deadline < *next)) next = job.deadline;
  }
  return next;
}

template <typename T>
void AgentCore::Say(T message, Effects* out) {
  // Without a registration nothing is said: the next one carries the state itself. What happens
  // while its answer is under way is in neither, and waits.
  if (registered_) {
    out->push_back(std::move(message));
  } else if (register_sent_ && unsaid_.size() < options_.max_unsaid) {
    unsaid_.push_back(std::move(message));
  }
}

bool AgentCore::Current(const Header& header, const char* what, Effects* out) {
  std::string why;
  if (!registered_) {
    why = "no registration stands";
  } else if (header.incarnation != incarnation_) {
    why = fmt::format("meant for registration {}, this is {}", header.incarnation, incarnation_);
  } else if (header.sequence <= last_sequence_) {
    why = fmt::format("number {} was seen, newest is {}", header.sequence, last_sequence_);
  } else {
    last_sequence_ = header.sequence;
    if (away_at_) away_at_ = now_ + lease_;
    if (std::exchange(away_, false)) out->push_back(ControllerAway{false});
    return true;
  }
  out->push_back(Dropped{what, std::move(why)});
  return false;
}

JobView* AgentCore::Find(const JobId& job) {
  const auto it = jobs_.find(job);
  return it == jobs_.end() ? nullptr : &it->second;
}

// --- the session ---

void AgentCore::On(Timestamp, const SessionOpened&, Effects* out) {
  session_open_ = true;
  registered_ = false;
  register_sent_ = false;
  SendRegistration(out);
}

void AgentCore::SendRegistration(Effects* out) {
  if (!session_open_ || !keeper_attached_ || register_sent_) return;
  SendRegister message{incarnation_, {}};
  for (const auto& [id, job] : jobs_) {
    if (job.generation > 0) message.jobs.push_back(Holds(id, job));
  }
  register_sent_ = true;
  unsaid_.clear();
  out->push_back(std::move(message));
}

void AgentCore::On(Timestamp, const SessionLost&, Effects* out) {
  session_open_ = false;
  register_sent_ = false;
  registered_ = false;
  next_beat_.reset();
  away_at_.reset();
  away_ = false;
  out->push_back(ControllerAway{true});
}

void AgentCore::On(Timestamp now, const Registered& e, Effects* out) {
  if (!session_open_ || !register_sent_ || registered_) {
    out->push_back(Dropped{"registered", "nothing was asked"});
    return;
  }
  // Registrations are durable and only grow. A smaller one comes from a controller whose state is
  // older than what this node obeyed already: its commands must not reach the workers.
  if (e.header.incarnation <= incarnation_) {
    out->push_back(CloseSession{fmt::format(
        "the controller gave registration {}, this node obeyed {} already: its state is "
        "older than this node's; point the node at the current controller, or stop the "
        "node's keeper to begin anew",
        e.header.incarnation, incarnation_)});
    return;
  }
  registered_ = true;
  incarnation_ = e.header.incarnation;
  last_sequence_ = e.header.sequence;
  interval_ =
      e.heartbeat_interval > Duration{} ? e.heartbeat_interval : options_.heartbeat_interval;
  beat_ = 0;
  lease_ = e.lease;
  away_at_.reset();
  away_ = false;
  out->push_back(RememberIncarnation{incarnation_});
  out->push_back(ControllerAway{false});
  Beat(now, out);
  out->insert(out->end(), std::make_move_iterator(unsaid_.begin()),
              std::make_move_iterator(unsaid_.end()));
  unsaid_.clear();
  if (!keeper_loss_.empty() && keeper_attached_) keeper_loss_.clear();  // Register said it

  std::vector<JobId> unknown;
  for (const auto& [id, job] : jobs_) {
    if (std::find(e.known_jobs.begin(), e.known_jobs.end(), id) == e.known_jobs.end()) {
      unknown.push_back(id);
    }
  }
  for (const JobId& id : unknown) {
    JobView* job = Find(id);
    BeginStop(now, id, job, job->generation, /*forget=*/true, kUnknownJobGrace, out);
  }
  ResumeAnswers(out);
  if (notice_ && (!notice_deadline_ || now < *notice_deadline_)) {
    Notice left = *notice_;
    if (notice_deadline_) left.deadline = *notice_deadline_ - now;
    Say(SendNotice{left}, out);
  }
}

// A broken stream may have swallowed any answer: those that Register does not carry are given
// again.
void AgentCore::ResumeAnswers(Effects* out) {
  for (auto& [id, job] : jobs_) {
    if (job.fork_server_ready) Say(SendNodeWarm{id, true, ""}, out);
    if (job.phase == JobView::Phase::kPrepared) {
      job.phase = JobView::Phase::kSurveying;  // replicas may have come since
      job.survey_done = false;
      out->push_back(Survey{id, job.generation, job.command});
    } else if (!job.trouble.empty() && job.trouble_in_activate) {
      AnswerActivate(id, job, out);
    } else if (!job.trouble.empty()) {
      AnswerPrepare(id, job, out);
    }
  }
}

void AgentCore::Beat(Timestamp now, Effects* out) {
  SendHeartbeat beat{++beat_, now, interval_, {}};
  for (const auto& [id, job] : jobs_) {
    if (job.generation == 0) continue;
    const auto running = std::count_if(job.workers.begin(), job.workers.end(),
                                       [](const WorkerOnNode& w) { return w.running; });
    beat.jobs.push_back({id, job.generation, job.step, static_cast<std::uint32_t>(running)});
  }
  next_beat_ = now + interval_;
  Say(std::move(beat), out);
}

void AgentCore::On(Timestamp now, const Heard& e, Effects* out) {
  if (Current(e.header, "heard", out) && lease_ > Duration{}) away_at_ = now + lease_;
}

// A controller that is stopped, or whose host went away without a word, leaves the stream open. Its
// commits will not come: trainers need not wait for them.
void AgentCore::CheckController(Timestamp now, Effects* out) {
  if (!registered_ || !away_at_ || away_ || now < *away_at_) return;
  if (now - *away_at_ > interval_) {  // this agent itself stood still: the answers lie unread
    away_at_ = now + interval_;
    return;
  }
  away_ = true;
  out->push_back(ControllerAway{true});
}

// --- commands ---

void AgentCore::On(Timestamp, const Warm& e, Effects* out) {
  if (!Current(e.header, "warm", out)) return;
  if (!Find(e.job) && jobs_.size() >= options_.max_jobs) {
    Say(SendNodeWarm{e.job, false, fmt::format("this node holds {} jobs, the limit", jobs_.size())},
        out);
    return;
  }
  JobView& job = jobs_[e.job];
  if (job.fork_server_asked) {
    if (job.fork_server_ready) Say(SendNodeWarm{e.job, true, ""}, out);
    return;
  }
  job.fork_server_asked = true;
  if (job.generation == 0) job.command = e.command;
  out->push_back(StartForkServer{e.job, e.command});
}

void AgentCore::On(Timestamp now, const Prepare& e, Effects* out) {
  if (!Current(e.header, "prepare", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    if (jobs_.size() >= options_.max_jobs) {
      SendPrepared refusal{{e.job, e.generation, false, {}, {}}, 0, true, ""};
      refusal.message =
          fmt::format("this node holds {} jobs, the limit; end one first", jobs_.size());
      Say(std::move(refusal), out);
      return;
    }
    job = &jobs_[e.job];
  }
  if (e.generation < job->generation) {
    out->push_back(Dropped{"prepare", fmt::format("job {} is at generation {}, this is {}", e.job,
                                                  job->generation, e.generation)});
    return;
  }
  if (e.generation == job->generation && job->phase != JobView::Phase::kIdle) {
    if (job->phase == JobView::Phase::kPrepared) AnswerPrepare(e.job, *job, out);
    return;  // under way, or activated already
  }
  RetireWorkers(job);
  if (!job->old_workers.empty() || job->generation > 0) {
    out->push_back(KillWorkers{e.job, e.generation - 1, e.grace, /*stores=*/true});
  }
  job->phase = JobView::Phase::kDraining;
  job->generation = e.generation;
  job->command = e.command;
  job->step = kNoStep;
  job->host_store = e.host_store;
  job->store_port = 0;
  job->trouble.clear();
  job->survey_done = false;
  job->forget = false;
  job->deadline = now + std::max(e.grace + options_.reap_slack,
                                 e.host_store ? options_.store_timeout : Duration{});
  out->push_back(RememberPrepared{e.job, e.generation, e.command, e.data_key});
  if (e.host_store) out->push_back(StartStore{e.job, e.generation, e.command});
  Advance(e.job, out);
}

void AgentCore::AdvancePrepare(const JobId& id, JobView* job, Effects* out) {
  if (job->phase == JobView::Phase::kDraining && job->old_workers.empty()) {
    job->phase = JobView::Phase::kSurveying;
    out->push_back(Survey{id, job->generation, job->command});
  }
  if (job->phase == JobView::Phase::kSurveying && job->survey_done &&
      (!job->host_store || job->store_port != 0)) {
    job->phase = JobView::Phase::kPrepared;
    job->deadline.reset();
    AnswerPrepare(id, *job, out);
  }
}

void AgentCore::AnswerPrepare(const JobId& id, const JobView& job, Effects* out) {
  SendPrepared answer{Holds(id, job), job.store_port, !job.trouble.empty(), job.trouble};
  answer.holds.shards = job.surveyed;
  Say(std::move(answer), out);
}

void AgentCore::RefusePrepare(const JobId& id, JobView* job, std::string message, Effects* out) {
  job->phase = JobView::Phase::kIdle;
  job->deadline.reset();
  job->trouble = std::move(message);
  job->trouble_in_activate = false;
  AnswerPrepare(id, *job, out);
}

void AgentCore::On(Timestamp now, const Activate& e, Effects* out) {
  if (!Current(e.header, "activate", out)) return;
  JobView* job = Find(e.job);
  if (job != nullptr && e.generation < job->generation) {
    out->push_back(Dropped{"activate", fmt::format("job {} is at generation {}, this is {}", e.job,
                                                   job->generation, e.generation)});
    return;
  }
  const bool same = job != nullptr && e.generation == job->generation;
  if (same && job->phase == JobView::Phase::kRunning) return AnswerActivate(e.job, *job, out);
  if (same && job->phase == JobView::Phase::kStarting) return;
  // After a broken stream the node surveys again; it is prepared all the same.
  const bool prepared =
      same &&
      (job->phase == JobView::Phase::kPrepared ||
       (job->phase == JobView::Phase::kSurveying && (!job->host_store || job->store_port != 0)));
  if (!prepared) {
    Say(SendActivated{e.job,
                      e.generation,
                      {},
                      true,
                      fmt::format(
                          "generation {} is not prepared here (this node is {} at generation "
                          "{}); prepare it first",
                          e.generation, job ? PhaseName(job->phase) : "without the job",
                          job ? job->generation : 0)},
        out);
    return;
  }
  job->phase = JobView::Phase::kStarting;
  job->command = e.command;
  job->group_rank = e.plan.group_rank;
  job->deadline = now + options_.start_timeout + FileRestoreTime(FileRestoreBytes(e.plan));
  job->workers.clear();
  for (const WorkerPlan& w : e.plan.workers) {
    WorkerOnNode worker;
    worker.rank = w.rank;
    worker.local_rank = w.local_rank;
    job->workers.push_back(worker);
  }
  out->push_back(RememberActivated{e});
  out->push_back(StartWorkers{e});
  if (job->workers.empty()) {
    job->phase = JobView::Phase::kRunning;
    job->deadline.reset();
    AnswerActivate(e.job, *job, out);
  }
}

void AgentCore::AnswerActivate(const JobId& id, const JobView& job, Effects* out) {
  Say(SendActivated{id, job.generation, Forked(job.workers), !job.trouble.empty(), job.trouble},
      out);
}

void AgentCore::FailActivate(const JobId& id, JobView* job, std::string message, Effects* out) {
  // Those that run wait for their peers; the controller's next prepare ends them.
  job->phase = JobView::Phase::kRunning;
  job->deadline.reset();
  job->trouble = std::move(message);
  job->trouble_in_activate = true;
  AnswerActivate(id, *job, out);
}

void AgentCore::On(Timestamp now, const StopJob& e, Effects* out) {
  if (!Current(e.header, "stop_job", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    Say(SendStopped{e.job, e.generation}, out);
    if (e.forget) out->push_back(ForgetJob{e.job});
    return;
  }
  BeginStop(now, e.job, job, e.generation, e.forget, e.grace, out);
}

void AgentCore::BeginStop(Timestamp now, const JobId& id, JobView* job, Generation generation,
                          bool forget, Duration grace, Effects* out) {
  job->stop_answer = generation;
  if (generation >= job->generation) {
    RetireWorkers(job);
    job->generation = generation;  // nothing older may start any more
    job->phase = JobView::Phase::kStopping;
    job->forget = forget;
    job->host_store = false;
    job->store_port = 0;
    job->trouble.clear();
    job->deadline = now + grace + options_.reap_slack;
  }
  out->push_back(KillWorkers{id, generation, grace, /*stores=*/true});
  Advance(id, out);
}

void AgentCore::Advance(const JobId& id, Effects* out) {
  JobView* job = Find(id);
  if (job == nullptr) return;
  AdvancePrepare(id, job, out);
  if (!job->stop_answer) return;
  for (const auto& [generation, w] : job->old_workers) {
    if (generation <= *job->stop_answer) return;
  }
  if (job->persisting > 0) return;  // its last breath
  SendStopped answer{id, *job->stop_answer};
  job->stop_answer.reset();
  if (job->phase == JobView::Phase::kStopping) {
    job->phase = JobView::Phase::kIdle;
    job->deadline.reset();
    if (job->forget) {
      // Before the answer: after it the controller forgets the job, and nobody would ask again.
      jobs_.erase(answer.job);
      out->push_back(ForgetJob{answer.job});
    }
  }
  Say(std::move(answer), out);
}

void AgentCore::On(Timestamp, const Committed& e, Effects* out) {
  if (!Current(e.header, "committed", out)) return;
  if (Find(e.job) == nullptr) {
    out->push_back(Dropped{"committed", fmt::format("job {} is not here", e.job)});
    return;
  }
  out->push_back(MarkCommitted{e.job, e.generation, e.step, e.released});
}

void AgentCore::On(Timestamp, const Persist& e, Effects* out) {
  if (!Current(e.header, "persist", out)) return;
  JobView* job = Find(e.job);
  if (job == nullptr) {
    Say(SendPersisted{{.job = e.job,
                       .generation = e.generation,
                       .step = e.step,
                       .error = "this node does not have the job"}},
        out);
    return;
  }
  ++job->persisting;
  out->push_back(PersistStep{e.job, job->command, e.generation, e.step, e.ranks});
}

void AgentCore::On(Timestamp, const TailLogs& e, Effects* out) {
  if (!Current(e.header, "tail_logs", out)) return;
  Tail tail{e, 0, {}};
  if (const JobView* job = Find(e.job)) {
    tail.generation = job->generation;
    for (const WorkerOnNode& w : Forked(job->workers)) {
      if (e.rank < 0 || e.rank == w.rank) tail.workers.push_back(w);
    }
  }
  out->push_back(std::move(tail));
}

void AgentCore::On(Timestamp, const KillForDrill& e, Effects* out) {
  if (!Current(e.header, "kill_for_drill", out)) return;
  JobView* job = Find(e.job);
  const WorkerOnNode* w = job ? FindRank(&job->workers, e.rank) : nullptr;
  if (w == nullptr || !w->running) {
    out->push_back(Dropped{"kill_for_drill",
                           fmt::format("rank {} of job {} does not run here", e.rank, e.job)});
    return;
  }
  out->push_back(KillRank{e.job, job->generation, e.rank, e.signal});
}

// --- the keeper ---

void AgentCore::On(Timestamp, const KeeperAttached& e, Effects* out) {
  keeper_attached_ = true;
  incarnation_ = std::max(incarnation_, registered_ ? incarnation_ : e.remembered);
  for (const AdoptedJob& adopted : e.jobs) {
    JobView& job = jobs_[adopted.holds.job];
    if (job.generation > adopted.holds.generation) continue;
    job.generation = adopted.holds.generation;
    job.command = adopted.command;
    job.group_rank = adopted.group_rank;
    job.workers = adopted.holds.workers;
    job.old_workers = adopted.old_workers;
    job.step = adopted.step;
    job.fork_server_asked = job.fork_server_ready = adopted.fork_server_ready;
    // A prepare that was under way begins again when the controller repeats it.
    job.phase = adopted.holds.activated ? JobView::Phase::kRunning : JobView::Phase::kIdle;
    const auto missing = std::count_if(job.workers.begin(), job.workers.end(), Starting);
    if (missing > 0) {
      std::erase_if(job.workers, Starting);
      job.trouble = fmt::format("the agent ended while it started workers: {} never ran", missing);
      job.trouble_in_activate = true;
    }
  }
  if (e.fresh) {
    for (auto& [id, job] : jobs_) {
      if (job.fork_server_asked) out->push_back(StartForkServer{id, job.command});
    }
  }
  if (registered_ && e.fresh) {
    Say(SendKeeperLost{keeper_loss_.empty() ? "the keeper was replaced" : keeper_loss_}, out);
    keeper_loss_.clear();
  } else if (register_sent_ && !registered_ && e.fresh) {
    out->push_back(CloseSession{"the keeper was replaced while the node registered"});
  }
  SendRegistration(out);
}

void AgentCore::On(Timestamp, const KeeperGone& e, Effects*) {
  keeper_attached_ = false;
  keeper_loss_ = e.message;
  for (auto& [id, job] : jobs_) {
    // Generations stay as a fence; all that stood on them is gone.
    job.phase = JobView::Phase::kIdle;
    job.workers.clear();
    job.old_workers.clear();
    job.surveyed.clear();
    job.survey_done = false;
    job.store_port = 0;
    job.fork_server_ready = false;
    job.trouble.clear();
    job.deadline.reset();
    job.stop_answer.reset();
  }
}

void AgentCore::On(Timestamp, const WorkerStarted& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  if (e.generation != job->generation || job->phase == JobView::Phase::kStopping) {
    for (auto& [generation, w] : job->old_workers) {
      if (generation != e.generation || w.rank != e.rank) continue;
      w.pid = e.pid;
      w.running = true;
    }
    return;
  }
  WorkerOnNode* w = FindRank(&job->workers, e.rank);
  if (w == nullptr || !Starting(*w)) return;
  w->pid = e.pid;
  w->running = true;
  const bool all = std::none_of(job->workers.begin(), job->workers.end(), Starting);
  if (job->phase == JobView::Phase::kStarting && all) {
    job->phase = JobView::Phase::kRunning;
    job->deadline.reset();
    AnswerActivate(e.job, *job, out);
  }
}

void AgentCore::On(Timestamp, const WorkerStartFailed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  std::erase_if(job->old_workers, [&](const auto& old) {
    return old.first == e.generation && old.second.rank == e.rank && Starting(old.second);
  });
  if (e.generation == job->generation) {
    std::erase_if(job->workers,
                  [&](const WorkerOnNode& w) { return w.rank == e.rank && Starting(w); });
  }
  // Of several only the first is told; those after it must not be waited for either.
  if (e.generation == job->generation && job->phase == JobView::Phase::kStarting) {
    FailActivate(e.job, job, fmt::format("rank {} did not start: {}", e.rank, e.message), out);
  }
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const WorkerExited& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  const auto before = job->old_workers.size();
  std::erase_if(job->old_workers, [&](const auto& old) {
    return old.first == e.generation && old.second.rank == e.rank;
  });
  if (job->old_workers.size() != before) return Advance(e.job, out);
  if (e.generation != job->generation) return;
  WorkerOnNode* w = FindRank(&job->workers, e.rank);
  if (w == nullptr || !w->running || w->pid != e.pid) return;
  w->running = false;
  w->exit = e.exit;
  Say(SendWorkerExited{e.job, e.generation, *w}, out);
}

void AgentCore::On(Timestamp, const WorkerStalled& e, Effects* out) {
  const JobView* job = Find(e.job);
  if (job != nullptr && job->generation == e.generation) Say(SendWorkerStalled{e}, out);
}

void AgentCore::On(Timestamp, const ForkServerState& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr) return;
  job->fork_server_ready = e.ready;
  if (!e.ready) job->fork_server_asked = false;  // the next Warm tries again
  Say(SendNodeWarm{e.job, e.ready, e.message}, out);
}

void AgentCore::On(Timestamp, const StoreReady& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation || !job->host_store) return;
  job->store_port = e.port;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const StoreFailed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation) return;
  if (job->phase != JobView::Phase::kDraining && job->phase != JobView::Phase::kSurveying) return;
  RefusePrepare(e.job, job, fmt::format("the store host did not start: {}", e.message), out);
}

// --- the checkpoint plane ---

void AgentCore::On(Timestamp, const Surveyed& e, Effects* out) {
  JobView* job = Find(e.job);
  if (job == nullptr || job->generation != e.generation) return;
  if (job->phase != JobView::Phase::kSurveying) return;
  job->surveyed = e.shards;
  job->survey_done = true;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const ShardCopied& e, Effects* out) {
  if (Find(e.job) != nullptr) Say(SendShardCopied{e.job, e.shard}, out);
}

void AgentCore::On(Timestamp, const Persisted& e, Effects* out) {
  Say(SendPersisted{e}, out);
  JobView* job = Find(e.job);
  if (job == nullptr || job->persisting == 0) return;
  --job->persisting;
  Advance(e.job, out);
}

void AgentCore::On(Timestamp, const StepCaptured& e, Effects*) {
  JobView* job = Find(e.job);
  if (job != nullptr && job->generation == e.generation) job->step = std::max(job->step, e.step);
}

// --- this machine ---

void AgentCore::On(Timestamp now, const Notice& e, Effects* out) {
  notice_ = e;
  notice_deadline_.reset();
  if (e.deadline > Duration{}) notice_deadline_ = now + e.deadline;
  Say(SendNotice{e}, out);
}

void AgentCore::On(Timestamp now, const Tick&, Effects* out) {
  CheckController(now, out);
  if (registered_ && next_beat_ && now >= *next_beat_) Beat(now, out);
  for (auto& [id, job] : jobs_) {
    if (!job.deadline || now < *job.deadline) continue;
    job.deadline.reset();
    switch (job.phase) {
      case JobView::Phase::kDraining:
        RefusePrepare(id, &job,
                      fmt::format("workers outlived SIGKILL: {}; see /proc/PID/stack on the node",
                                  Lingering(job)),
                      out);
        break;
      case JobView::Phase::kSurveying:
        RefusePrepare(id, &job,
                      job.survey_done ? "the store host does not listen; see the keeper's log"
                                      : "the checkpoint memory was not read in time",
                      out);
        break;
      case JobView::Phase::kStarting: {
        const auto missing = std::count_if(job.workers.begin(), job.workers.end(), Starting);
        FailActivate(id, &job,
                     fmt::format("the keeper did not fork {} of {} workers within {} ms", missing,
                                 job.workers.size(), ToMilliseconds(options_.start_timeout)),
                     out);
        break;
      }
      case JobView::Phase::kStopping:
        job.deadline = now + options_.reap_slack;
        if (job.old_workers.empty()) break;  // what it writes takes its time
        out->push_back(Dropped{"stop_job", fmt::format("still there: {}", Lingering(job))});
        out->push_back(KillWorkers{id, job.generation, Duration{}, true});
        break;
      case JobView::Phase::kIdle:
      case JobView::Phase::kPrepared:
      case JobView::Phase::kRunning: break;
    }
  }
}

}  // namespace everstep::agent
