#include "controller/core/controller.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {

Controller::Controller(Options options) : impl_(std::make_unique<Impl>(options)) {}
Controller::~Controller() = default;
void Controller::Recover(Timestamp now, std::span<const Record> records, Decisions* out) {
  impl_->Recover(now, records, out);
}
void Controller::Step(Timestamp now, const Event& event, Decisions* out) {
  impl_->Handle(now, event, out);
}
std::optional<Timestamp> Controller::NextWakeup() const {
  return impl_->NextWakeup();
}
const ClusterState& Controller::state() const {
  return impl_->state();
}

void Controller::Impl::Handle(Timestamp now, const Event& event, Decisions* out) {
  now_ = std::max(now, now_);
  out_ = out;
  std::visit([this](const auto& e) { On(e); }, event);
  Flush();
  out_ = nullptr;
}

void Controller::Impl::Recover(Timestamp now, std::span<const Record> records, Decisions* out) {
  now_ = now;
  out_ = out;
  for (const Record& record : records) {
    if (const auto* node = std::get_if<NodeRecord>(&record)) {
      state_.nodes[node->node].record = *node;
    } else if (const auto* job = std::get_if<JobRecord>(&record); job && job->forgotten) {
      state_.forgotten[job->spec.job] = *job;
    } else if (job != nullptr) {
      state_.jobs[job->spec.job].record = *job;
    } else if (const auto* plan = std::get_if<GenerationRecord>(&record)) {
      // Older generations' records may still be there: the newest counts, whatever the order.
      JobStateView& view = state_.jobs[plan->plan.job];
      const GenerationPlan& older =
          plan->plan.generation >= view.plan.generation ? view.plan : plan->plan;
      if (older.generation != 0) Forget(older);
      if (plan->plan.generation >= view.plan.generation) view.plan = plan->plan;
    } else if (const auto* commit = std::get_if<CommitRecord>(&record)) {
      state_.jobs[commit->job].commits = *commit;
    } else if (const auto* line = std::get_if<JournalRecord>(&record)) {
      state_.journal.push_back(*line);
    } else if (const auto* ledger = std::get_if<LedgerRecord>(&record)) {
      state_.jobs[ledger->job].ledger = *ledger;
    } else if (const auto* layout = std::get_if<LayoutRecord>(&record)) {
      state_.jobs[layout->job].layouts[layout->generation] = *layout;
    } else if (const auto* told = std::get_if<ToldRecord>(&record)) {
      state_.jobs[told->job].told[told->kind] = *told;
    }
  }
  // What is left of a job whose own record is gone is no job.
  for (auto it = state_.jobs.begin(); it != state_.jobs.end();) {
    if (!it->second.record.spec.job.empty()) {
      ++it;
      continue;
    }
    if (it->second.plan.generation != 0) Forget(it->second.plan);
    if (!it->second.commits.job.empty()) {
      out_->deletions.push_back({Deletion::Table::kCommit, it->first});
    }
    ForgetTold(it->first, &it->second);
    it = state_.jobs.erase(it);
  }
  std::sort(state_.journal.begin(), state_.journal.end(),
            [](const auto& a, const auto& b) { return a.sequence < b.sequence; });
  if (!state_.journal.empty()) {
    state_.next_journal_sequence = state_.journal.back().sequence + 1;
  }
  for (auto& [id, node] : state_.nodes) {
    node.lease = std::max(options_.lease, options_.rejoin_grace);
    node.last_heard = now;
    if (node.record.health == NodeHealth::kAlive) {
      node.record.health = NodeHealth::kSuspect;
      node.reason = Reason::kControllerRestarted;
      node.since = now;
    }
    Watch(node);
  }
  RecallNodes();
  for (auto& [id, job] : state_.jobs) {
    Runtime& run = runtime_[id];
    run.waiting_since = now;
    run.running_since = now;
    run.step_at_start = job.record.best_step;
    run.ran = job.record.state == JobState::kRunning;
    run.formed = Switches(job.record.state);
    // As it was said before: status tells the same story.
    const JobState s = job.record.state;
    if (IsTerminal(s) || s == JobState::kStopping) {
      job.reason = job.record.end_reason;
      job.message = job.record.end_message;
      job.memory_until = MemoryEnd(job);
    } else if (s == JobState::kWaiting) {
      job.reason = job.record.generation == 0 ? Reason::kSubmitted : Reason::kWaitingForNodes;
      job.message = fmt::format("at least {} nodes", job.record.spec.min_nodes);
    } else {
      job.reason = job.plan.reason;
      job.message = job.plan.evidence;
    }
    job.step = job.record.best_step;
    if (job.record.state == JobState::kPreparing || job.record.state == JobState::kActivating ||
        job.record.state == JobState::kStopping) {
      // Each node is told again what it owes when it registers; one that does not is lost by lease.
      for (const NodePlan& member : job.plan.nodes) {
        const auto node = state_.nodes.find(member.node);
        if (node != state_.nodes.end() && node->second.record.health != NodeHealth::kLost) {
          job.waiting_for.insert(member.node);
        }
      }
      job.deadline = now + options_.activate_timeout;
    }
  }
  for (auto& [id, job] : state_.jobs) {
    if (job.record.state == JobState::kStopping && job.waiting_for.empty()) FinishStop(&job);
  }
  if (!records.empty()) {
    recovered_ = fmt::format("nodes={} jobs={} records={}", state_.nodes.size(), state_.jobs.size(),
                             records.size());
  }
  Flush();
  out_ = nullptr;
}

// Why and since when a node is lost or drained: the journal has it.
void Controller::Impl::RecallNodes() {
  for (const JournalRecord& line : state_.journal) {
    const auto it = line.node.empty() ? state_.nodes.end() : state_.nodes.find(line.node);
    if (it == state_.nodes.end()) continue;
    NodeState& node = it->second;
    if (line.type == "node_draining") node.drain_since = line.time;
    if (line.type == "memory_suspect") node.memory_suspect = line.evidence;
    if (line.type == "node_lost" && node.record.health == NodeHealth::kLost) {
      node.reason = line.reason;
      node.evidence = line.evidence;
      node.since = line.time;
    }
  }
}

std::optional<Timestamp> Controller::Impl::NextWakeup() const {
  std::optional<Timestamp> next;
  const auto at = [&next](Timestamp t) {
    if (t.ns != 0 && (!next || t < *next)) next = t;
  };
  at(node_wakeup_);
  for (const auto& [id, job] : state_.jobs) {
    at(job.memory_until);
    if (IsTerminal(job.record.state)) continue;
    if (!Bug(kBugLostWakeup)) at(job.deadline);
    const Runtime& run = runtime_.at(id);
    at(run.grow_at);
    if (run.persist) at(run.persist->began + options_.persist_timeout);
    if (job.record.state == JobState::kRunning) at(run.linger_at);
    for (const auto& [node, refused] : run.excluded) {
      if (!refused.over) at(refused.until);
    }
    if (job.record.state == JobState::kWaiting) {
      at(run.last_call);
      if (job.record.spec.join_timeout.count() > 0) {
        at(run.waiting_since + job.record.spec.join_timeout);
      }
    }
  }
  return next;
}

void Controller::Impl::Send(const NodeId& node, decltype(Command::body) body) {
  NodeState& to = state_.nodes.at(node);
  if (!to.connected) return;  // told again when it registers
  out_->commands.push_back({node, to.record.incarnation, to.next_sequence++, std::move(body)});
}

void Controller::Impl::Answer(RequestId request, ReplyCode code, std::string message,
                              std::string hint) {
  if (request == 0) return;
  out_->replies.push_back({request, code, std::move(message), std::move(hint)});
}

void Controller::Impl::Journal(JournalRecord record) {
  record.sequence = state_.next_journal_sequence++;
  record.time = now_;
  state_.journal.push_back(record);
  out_->records.emplace_back(std::move(record));
  while (state_.journal.size() > options_.journal_limit) {
    std::string key(8, '\0');  // big-endian sequence
    for (unsigned i = 0; i < 8; ++i) {
      key[i] = static_cast<char>((state_.journal.front().sequence >> (56 - 8 * i)) & 0xff);
    }
    out_->deletions.push_back({Deletion::Table::kJournal, std::move(key)});
    state_.journal.pop_front();
  }
}

void Controller::Impl::JournalRecovery() {
  if (recovered_.empty()) return;
  Journal({.type = "controller_recovered",
           .severity = Severity::kWarning,
           .reason = Reason::kControllerRestarted,
           .message = "a controller took over from what the store held",
           .evidence = std::exchange(recovered_, "")});
}

void Controller::Impl::Flush() {
  for (const NodeId& id : dirty_nodes_) out_->records.emplace_back(state_.nodes.at(id).record);
  for (const JobId& id : dirty_jobs_) out_->records.emplace_back(state_.jobs.at(id).record);
  for (const JobId& id : dirty_plans_) {
    out_->records.emplace_back(GenerationRecord{state_.jobs.at(id).plan});
  }
  for (const JobId& id : dirty_commits_) out_->records.emplace_back(state_.jobs.at(id).commits);
  for (const JobId& id : dirty_ledgers_) out_->records.emplace_back(state_.jobs.at(id).ledger);
  dirty_nodes_.clear();
  dirty_jobs_.clear();
  dirty_plans_.clear();
  dirty_commits_.clear();
  dirty_ledgers_.clear();
}

void Controller::Impl::Forget(const GenerationPlan& plan) {
  out_->deletions.push_back(
      {Deletion::Table::kGeneration, fmt::format("{}/{}", plan.job, plan.generation)});
}

JobStateView* Controller::Impl::FindJob(const JobId& id) {
  const auto it = state_.jobs.find(id);
  return it == state_.jobs.end() ? nullptr : &it->second;
}

}  // namespace everstep::controller
