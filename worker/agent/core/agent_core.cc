#include "worker/agent/core/agent_core.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>

namespace everstep::agent {
namespace {

// How long workers of a job that the controller does not know may take to end.
constexpr Duration kUnknownJobGrace = Seconds(5);

}  // namespace

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
      out->push_back(Survey{id, job.generation, job.command, job.given_up});
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
