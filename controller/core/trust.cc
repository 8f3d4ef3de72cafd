// How far a checkpoint is trusted, and going back to one that is.
//
//   captured    a slot is whole                     (its node knows)
//   committed   every shard has its copies          (commit.cc)
//   verified    `verify_after` steps followed it in which nothing strange was reported
//
// What counts as strange: a worker that failed by itself, memory that failed a checksum, and what
// an operator says (`everstep ckpt anomaly`). The newest verified checkpoint in the job's directory
// is kept whatever the retention; the two newest commits are kept in memory anyway.
//
// A roll-back leaves a cut (generation, step) behind: what generations up to that one captured
// beyond the step is never restored from again, in memory or files, by any later generation.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kMostFiles = 16;  // checkpoints that may yet be verified

bool FromFiles(const GenerationPlan& plan) {
  for (const NodePlan& member : plan.nodes) {
    for (const WorkerPlan& worker : member.workers) {
      if (!worker.restore.file) return false;
    }
  }
  return true;
}

}  // namespace

bool GivenUp(const std::vector<Cut>& cuts, Generation generation, everstep::Step step) {
  return std::any_of(cuts.begin(), cuts.end(),
                     [&](const Cut& cut) { return Beyond(cut, generation, step); });
}

void Controller::Impl::NoteAnomaly(JobStateView* job, const std::string& why) {
  CommitRecord& commits = job->commits;
  if (commits.commits.empty() && job->record.spec.verify_after == 0) return;  // nothing to trust
  commits.job = job->record.spec.job;
  ++commits.anomalies;
  commits.anomaly_step = job->step;
  commits.anomaly_why = why;
  if (job->record.spec.verify_after > 0) dirty_commits_.insert(commits.job);
}

// A step was committed: which checkpoints have now been followed by enough quiet steps?
void Controller::Impl::VerifyOlder(JobStateView* job) {
  CommitRecord& record = job->commits;
  const std::int64_t after = job->record.spec.verify_after;
  if (after == 0 || record.commits.empty()) return;
  const everstep::Step newest = record.commits.front().step;
  if (record.anomalies > 0 && newest < record.anomaly_step + after) return;
  std::optional<Cut> best;
  const auto consider = [&](const Cut& c) {
    if (c.step + after <= newest && (!best || c.step > best->step)) best = c;
  };
  for (const Commit& commit : record.commits) {
    // Of an older generation only what the present one descends from.
    if (commit.generation == job->record.generation || commit.step <= job->plan.restore_step) {
      consider({commit.generation, commit.step});
    }
  }
  for (const Cut& file : record.files) consider(file);
  if (!best || (record.verified.step >= best->step && record.verified_at.ns != 0)) return;
  const bool in_files =
      std::find(record.files.begin(), record.files.end(), *best) != record.files.end();
  record.verified = *best;
  record.verified_at = now_;
  dirty_commits_.insert(record.job);
  // What memory alone holds goes by with each step; what stays is worth a line.
  if (!in_files) return;
  std::erase_if(record.files, [&](const Cut& c) { return c.step < best->step; });
  Journal({.type = "checkpoint_verified",
           .reason = Reason::kQuietSteps,
           .job = record.job,
           .generation = best->generation,
           .message =
               fmt::format("job {}: step {} in {} is verified: {} steps followed it in quiet",
                           record.job, best->step, job->record.spec.ckpt_dir, newest - best->step),
           .evidence = fmt::format("step={} newest={} after={} anomalies={}", best->step, newest,
                                   after, record.anomalies)});
}

// A checkpoint stands in the job's directory.
void Controller::Impl::NoteFile(JobStateView* job, Generation generation, everstep::Step step) {
  std::vector<Cut>& files = job->commits.files;
  const Cut file{generation, step};
  if (std::find(files.begin(), files.end(), file) != files.end()) return;
  files.insert(files.begin(), file);
  std::sort(files.begin(), files.end(), [](const Cut& a, const Cut& b) { return a.step > b.step; });
  // The newest ones have furthest to go; thinned in the middle, so that an old one gets there.
  if (files.size() > kMostFiles) files.erase(files.begin() + kMostFiles / 2);
  dirty_commits_.insert(job->record.spec.job);
}

// The generation descends from its restore step alone.
void Controller::Impl::TrimLineage(JobStateView* job) {
  std::vector<Cut>& files = job->commits.files;
  const std::size_t were = files.size();
  std::erase_if(files, [&](const Cut& c) { return c.step > job->plan.restore_step; });
  if (files.size() != were) dirty_commits_.insert(job->record.spec.job);
}

void Controller::Impl::On(const ReportAnomaly& e) {
  JobStateView* job = FindJob(e.job);
  if (job == nullptr) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no job is called '{}'", e.job),
           "everstep job list");
    return;
  }
  if (IsTerminal(job->record.state)) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' is {}", e.job, JobStateName(job->record.state)));
    return;
  }
  NoteAnomaly(job, e.why);
  Journal({.type = "anomaly",
           .severity = Severity::kWarning,
           .reason = Reason::kOperatorAnomaly,
           .job = e.job,
           .generation = job->record.generation,
           .message = fmt::format("job {}: {}", e.job, e.why.empty() ? "an anomaly" : e.why),
           .evidence = fmt::format("step={} verified={}", job->step, job->commits.verified.step)});
  Answer(e.request, ReplyCode::kOk, fmt::format("noted at step {}", job->step));
}

void Controller::Impl::On(const RollBack& e) {
  JobStateView* job = FindJob(e.job);
  if (job == nullptr) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no job is called '{}'", e.job),
           "everstep job list");
    return;
  }
  const JobState s = job->record.state;
  if (!Switches(s) && s != JobState::kWaiting) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' is {}", e.job, JobStateName(s)),
           "only a job that runs or waits can go back");
    return;
  }
  everstep::Step target = e.step;
  if (target == kNoStep) {
    if (job->commits.verified_at.ns == 0) {
      Answer(e.request, ReplyCode::kFailedPrecondition,
             fmt::format("job '{}' has no verified checkpoint", e.job),
             job->record.spec.verify_after == 0
                 ? "it was started without --verify-after; name a step with --to"
                 : "name a step with --to: everstep ckpt show " + e.job);
      return;
    }
    target = job->commits.verified.step;
  }
  const Cut cut{job->record.generation, target};
  // Would it be had? The restore's own choice, on a copy.
  std::set<everstep::Step> at_hand;
  for (const Cut& file : job->commits.files) at_hand.insert(file.step);
  if (job->commits.persisted.ns != 0) at_hand.insert(job->commits.persisted_step);
  if (job->commits.verified_at.ns != 0 && !job->record.spec.ckpt_dir.empty()) {
    at_hand.insert(job->commits.verified.step);
  }
  Impl copy = *this;
  JobStateView& trial = copy.state_.jobs.at(e.job);
  trial.record.given_up.push_back(cut);
  for (int i = 0; i < 8; ++i) {  // every complete cut, newest first
    copy.PlanRestore(&trial);
    if (trial.plan.restore_step == kNoStep) break;
    // While workers run, they overwrite what is not the newest commit before they have stopped.
    const bool newest = !job->commits.commits.empty() &&
                        trial.plan.restore_step == job->commits.commits.front().step;
    if (newest || s == JobState::kWaiting || FromFiles(trial.plan)) {
      at_hand.insert(trial.plan.restore_step);
    }
    trial.record.given_up.push_back({cut.generation, trial.plan.restore_step - 1});
  }
  if (at_hand.count(target) == 0) {
    const std::set<everstep::Step> older(at_hand.begin(), at_hand.upper_bound(target));
    Answer(
        e.request, ReplyCode::kFailedPrecondition,
        fmt::format("step {} of job '{}' is neither its newest committed one nor in a checkpoint "
                    "directory",
                    target, e.job),
        older.empty() ? "everstep ckpt show " + e.job
                      : fmt::format("there are: {}", fmt::join(older, ", ")));
    return;
  }
  const everstep::Step from = job->step;
  GiveUpBeyond(job, cut);
  Journal({.type = "rolled_back",
           .severity = Severity::kWarning,
           .reason = Reason::kRolledBack,
           .job = e.job,
           .generation = job->record.generation,
           .message = fmt::format(
               "job {} goes back to step {}: what was captured beyond is given up", e.job, target),
           .evidence = fmt::format("step={} from={} verified={}", target, from,
                                   e.step == kNoStep ? "yes" : "no")});
  if (Switches(s)) {
    Prepare(job, Reason::kRolledBack, fmt::format("to step {} from {}", target, from), false);
  }
  Answer(e.request, ReplyCode::kOk, fmt::format("job '{}' goes back to step {}", e.job, target));
}

void Controller::Impl::GiveUpBeyond(JobStateView* job, const Cut& cut) {
  const JobId& id = job->record.spec.job;
  std::vector<Cut>& cuts = job->record.given_up;
  // One that says less than the new one goes.
  std::erase_if(cuts,
                [&](const Cut& c) { return c.generation <= cut.generation && c.step >= cut.step; });
  cuts.push_back(cut);
  if (cuts.size() > kMostFiles) cuts.erase(cuts.begin());
  const auto gone = [&](Generation generation, everstep::Step step) {
    return Beyond(cut, generation, step);
  };
  for (auto& [node, holds] : job->holdings) {
    std::erase_if(holds.shards, [&](const HeldShard& s) { return gone(s.generation, s.step); });
  }
  CommitRecord& record = job->commits;
  record.job = id;
  std::erase_if(record.commits, [&](const Commit& c) { return gone(c.generation, c.step); });
  std::erase_if(record.files, [&](const Cut& c) { return gone(c.generation, c.step); });
  if (record.verified_at.ns != 0 && gone(record.verified.generation, record.verified.step)) {
    record.verified = {};
    record.verified_at = {};
  }
  if (record.persisted.ns != 0 && gone(record.persisted_generation, record.persisted_step)) {
    record.persisted_generation = record.files.empty() ? 0 : record.files.front().generation;
    record.persisted_step = record.files.empty() ? kNoStep : record.files.front().step;
    if (record.files.empty()) record.persisted = {};
  }
  if (record.anomalies > 0) record.anomaly_step = std::min(record.anomaly_step, cut.step);
  job->damaged.clear();
  if (!job->files.empty() && gone(job->files.front().generation, job->files.front().step)) {
    job->files.clear();
  }
  job->step = std::min(job->step, cut.step);
  job->record.best_step = std::min(job->record.best_step, cut.step);
  dirty_jobs_.insert(id);
  dirty_commits_.insert(id);
}

// A roll-back holds from the moment it is decided, but workers capture until its Prepare reaches
// them. If the controller dies in between, or a node is cut off, they overwrite the step to go back
// to. Weeks of training must not end in step 0 for that: what was given up is better than nothing.
bool Controller::Impl::UndoRollBack(JobStateView* job) {
  std::vector<Cut>& cuts = job->record.given_up;
  if (job->plan.restore_step != kNoStep || cuts.empty()) return false;
  const Cut cut = cuts.back();
  cuts.pop_back();
  PlanRestore(job);
  if (job->plan.restore_step == kNoStep) {
    cuts.push_back(cut);
    return false;
  }
  const JobId& id = job->record.spec.job;
  dirty_jobs_.insert(id);
  Journal({.type = "rollback_undone",
           .severity = Severity::kError,
           .reason = Reason::kTargetOverwritten,
           .job = id,
           .generation = job->plan.generation,
           .message = fmt::format("job {}: step {} was overwritten before the workers stopped and "
                                  "nothing older is left: it goes on from step {}",
                                  id, cut.step, job->plan.restore_step),
           .evidence = fmt::format("step={} of_generation={} restore_step={}", cut.step,
                                   cut.generation, job->plan.restore_step)});
  return true;
}

}  // namespace everstep::controller
