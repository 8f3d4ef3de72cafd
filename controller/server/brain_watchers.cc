// The brain's part about those who look on: events, followed jobs, logs. None of them can hold it
// up.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/server/brain.h"
#include "controller/server/status.h"

namespace everstep::controller {
namespace {

constexpr Duration kFollowInterval = Milliseconds(200);
// After a job's end agents send what its logs still hold: they look every 100 ms.
constexpr Duration kLastLines = Milliseconds(400);

}  // namespace

WatchId Brain::WatchEvents(EventSink sink) {
  if (watchers() >= config_.max_watchers) return 0;
  watchers_.emplace(++last_watch_, std::move(sink));
  return last_watch_;
}

WatchId Brain::FollowJob(const JobId& job, bool with_snapshot, StatusSink sink) {
  if (watchers() >= config_.max_watchers) return 0;
  if (followers_.empty()) followers_at_ = clock_->Now();
  followers_.push_back({++last_watch_, job, with_snapshot, std::move(sink), {}, 0});
  changed_.insert(job);
  return last_watch_;
}

void Brain::Unwatch(WatchId id) {
  watchers_.erase(id);
  std::erase_if(followers_, [id](const Follower& f) { return f.id == id; });
  const auto tail = tails_.find(id);
  if (tail == tails_.end()) return;
  relay_.Close(id);
  for (const NodeId& node : tail->second.asked) {
    v1::ControllerMessage message;
    message.mutable_tail_logs()->set_request(id);
    message.mutable_tail_logs()->set_job(tail->second.request.job());
    message.mutable_tail_logs()->set_cancel(true);
    SendTo(node, std::move(message));
  }
  tails_.erase(tail);
}

void Brain::TellWatchers(const JournalRecord& record) {
  std::erase_if(watchers_, [&](const auto& watcher) { return !watcher.second(record); });
}

void Brain::TellFollowers(Timestamp now) {
  const bool due = now >= followers_at_;
  if (due) followers_at_ = now + kFollowInterval;
  std::erase_if(followers_, [&](Follower& follower) {
    if (!due && !changed_.contains(follower.job)) return false;
    const auto job = state().jobs.find(follower.job);
    if (job == state().jobs.end()) return true;
    v1::JobStatus status = JobStatusOf(state(), job->second, now);
    const double age = status.age_seconds();
    status.clear_age_seconds();
    std::string text = status.SerializeAsString();
    const bool snapshot = follower.with_snapshot && follower.snapshot_version != durable_version_;
    if (text == follower.last && !snapshot) return false;
    follower.last = std::move(text);
    status.set_age_seconds(age);
    if (snapshot) {
      if (snapshot_version_ != durable_version_) {
        snapshot_ = SnapshotOf(state(), store_->info().cluster).SerializeAsString();
        snapshot_version_ = durable_version_;
      }
      status.set_snapshot(snapshot_);
      follower.snapshot_version = durable_version_;
    }
    const bool terminal = IsTerminal(job->second.record.state);
    return !follower.sink(std::move(status), terminal) || terminal;
  });
  for (const JobId& id : changed_) {
    const auto job = state().jobs.find(id);
    if (job == state().jobs.end() || !IsTerminal(job->second.record.state)) continue;
    for (auto& [watch, tail] : tails_) {
      if (tail.request.job() == id && tail.end_at.ns == 0) tail.end_at = now + kLastLines;
    }
  }
  changed_.clear();
}

WatchId Brain::TailLogs(const v1::TailJobLogsRequest& request, LogRelay::Reader reader,
                        std::string* error) {
  if (watchers() >= config_.max_watchers) {
    *error = fmt::format(
        "{} streams are open, the limit of this controller\nhint: end others first", watchers());
    return 0;
  }
  const JobStateView& job = state().jobs.at(request.job());
  std::string names;
  std::set<NodeId> nodes;
  for (const NodePlan& node : job.plan.nodes) {
    names += (names.empty() ? "" : ", ") + node.node;
    const bool wanted = request.follow() || request.rank() < 0 ||
                        std::any_of(node.workers.begin(), node.workers.end(),
                                    [&](const WorkerPlan& w) { return w.rank == request.rank(); });
    const auto bound = bound_.find(node.node);
    if (wanted && bound != bound_.end() && bound->second.stream) nodes.insert(node.node);
  }
  const JobState s = job.record.state;
  if (nodes.empty() && (!request.follow() || IsTerminal(s))) {
    *error = fmt::format(
        "no connected node has logs of job {}{}\nhint: {}", request.job(),
        request.rank() < 0 ? std::string() : fmt::format(" rank {}", request.rank()),
        names.empty() ? "everstep job show " + request.job()
        : LogDirOf(job.record.spec.command).empty()
            ? fmt::format("the files are on {}, in STATE/nodes/NODE/jobs/{}", names, request.job())
            : fmt::format("the files are on {}, in {}", names, LogDirOf(job.record.spec.command)));
    return 0;
  }
  const WatchId id = ++last_watch_;
  Tail& tail = tails_[id];
  tail.request = request;
  if (IsTerminal(s)) tail.request.set_follow(false);
  relay_.Open(id, std::move(reader), nodes, tail.request.follow());
  for (const NodeId& node : nodes) AskForLogs(node, id, &tail, request.tail_lines());
  return id;
}

void Brain::AskForLogs(const NodeId& node, WatchId id, Tail* tail, std::int64_t lines) {
  v1::ControllerMessage message;
  v1::TailLogs* ask = message.mutable_tail_logs();
  ask->set_request(id);
  ask->set_job(tail->request.job());
  ask->set_rank(tail->request.rank());
  ask->set_follow(tail->request.follow());
  ask->set_tail_lines(lines);
  if (SendTo(node, std::move(message))) tail->asked.insert(node);
}

// A node that joins a followed job (`activated`) sends its files from the beginning; one that
// registers again
// (`activated` is empty) only what is new: the rest was sent before its stream broke.
void Brain::TailsOf(const NodeId& node, const JobId& activated) {
  for (auto& [id, tail] : tails_) {
    if (!tail.request.follow() || tail.end_at.ns != 0 || tail.asked.contains(node)) continue;
    if (activated.empty()) {
      const auto job = state().jobs.find(tail.request.job());
      if (job == state().jobs.end()) continue;  // forgotten
      const auto& plan = job->second.plan.nodes;
      if (std::any_of(plan.begin(), plan.end(),
                      [&](const NodePlan& p) { return p.node == node; })) {
        AskForLogs(node, id, &tail, 0);
      }
    } else if (tail.request.job() == activated) {
      AskForLogs(node, id, &tail, -1);
    }
  }
}

void Brain::EndTails(Timestamp now) {
  std::vector<WatchId> over;
  for (const auto& [id, tail] : tails_) {
    if (tail.end_at.ns != 0 && now >= tail.end_at) over.push_back(id);
  }
  for (const WatchId id : over) {
    relay_.End(id);
    Unwatch(id);
  }
}

}  // namespace everstep::controller
