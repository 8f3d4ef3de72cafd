// What workers tell: each word is taken in once, in order, made durable, and acknowledged. The
// worker keeps what is not acknowledged and says it again, so nothing here waits and nothing is
// lost with an agent or a controller; what a generation that is over still says dies at the door.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

const char* ToldKindName(ToldKind kind) {
  switch (kind) {
    case ToldKind::kLedger: return "ledger";
    case ToldKind::kProfile: return "profile";
    case ToldKind::kPlan: return "plan";
  }
  return "unknown";
}

}  // namespace

std::vector<NodeId> Controller::Impl::NodesByRank(const JobStateView& job) const {
  std::vector<NodeId> nodes;
  for (const NodePlan& member : job.plan.nodes) {
    for (const WorkerPlan& worker : member.workers) {
      const auto place = static_cast<std::size_t>(worker.rank);
      nodes.resize(std::max(nodes.size(), place + 1));
      nodes[place] = member.node;
    }
  }
  return nodes;
}

void Controller::Impl::On(const Told& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  JobStateView* job = FindJob(e.job);
  const bool runs = job != nullptr && (job->record.state == JobState::kRunning ||
                                       job->record.state == JobState::kActivating);
  if (!runs || e.generation != job->record.generation || e.words.empty()) {
    ++state_.stale_dropped;
    return;
  }
  if (!Hosts(*job, e.node, e.rank)) return;
  Runtime& run = runtime_[e.job];
  if (now_ - run.told_since >= Seconds(1)) {
    run.told_since = now_;
    run.told_bundles = 0;
  }
  if (++run.told_bundles > kMaxToldPerSecond) return;  // said again, later
  // A controller that has just started knows no sequence: the worker begins with what was never
  // acknowledged.
  const auto [heard, first] = run.heard.try_emplace(e.rank, e.words.front().sequence - 1);
  for (const ToldWord& word : e.words) {
    if (word.sequence != heard->second + 1) continue;  // known, or one before it is missing
    heard->second = word.sequence;
    if (word.kind == ToldKind::kLedger) {
      TakeLedger(job, e, word);
      continue;
    }
    ToldRecord& told = job->told[ToldKindName(word.kind)];
    told = {e.job, ToldKindName(word.kind), e.generation, e.rank, word.body,
            now_,  NodesByRank(*job)};
    out_->records.emplace_back(told);
  }
  if (heard->second == 0) return;
  Send(e.node, ToldAckCommand{e.job, e.generation, e.rank, heard->second});
}

void Controller::Impl::TakeLedger(JobStateView* job, const Told& e, const ToldWord& word) {
  LedgerRecord& ledger = job->ledger;
  ledger.job = e.job;
  const LedgerContext context{now_, e.generation, job->plan.reason, job->plan.evidence,
                              NodesByRank(*job)};
  const LedgerChange change = TakeLedgerWord(word.body, context, &ledger, &job->layouts);
  dirty_ledgers_.insert(e.job);
  if (change.layout) out_->records.emplace_back(job->layouts.at(ledger.generation));
  for (const Generation generation : change.forgotten) {
    out_->deletions.push_back({Deletion::Table::kLayout, fmt::format("{}/{}", e.job, generation)});
  }
  if (change.roll_back) {
    const LedgerRollBack& back = *change.roll_back;
    Journal({.type = "ledger_taken_back",
             .severity = Severity::kWarning,
             .reason = back.reason,
             .job = e.job,
             .generation = back.generation,
             .message = fmt::format("job {}: generation {} began with step {}: the lines of steps "
                                    "{} to {} do not count any more",
                                    e.job, back.generation, back.to, back.to, back.from - 1),
             .evidence = fmt::format("from={} to={}", back.from, back.to)});
  }
  if (change.finding) {
    Journal(
        {.type = "ledger_fault",
         .severity = Severity::kError,
         .reason = Reason::kLedgerRefuted,
         .job = e.job,
         .node = e.node,
         .rank = e.rank,
         .generation = e.generation,
         .message = fmt::format("job {}: {}", e.job, change.finding->what),
         .evidence = fmt::format("kind={} step={}", change.finding->kind, change.finding->step)});
  }
}

void Controller::Impl::ForgetTold(const JobId& id, JobStateView* job) {
  if (!job->ledger.job.empty()) out_->deletions.push_back({Deletion::Table::kLedger, id});
  for (const auto& [generation, layout] : job->layouts) {
    out_->deletions.push_back({Deletion::Table::kLayout, fmt::format("{}/{}", id, generation)});
  }
  for (const auto& [kind, told] : job->told) {
    out_->deletions.push_back({Deletion::Table::kTold, fmt::format("{}/{}", id, kind)});
  }
  job->ledger = {};
  job->layouts.clear();
  job->told.clear();
  dirty_ledgers_.erase(id);
}

}  // namespace everstep::controller
