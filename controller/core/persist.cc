// The file tier as the controller sees it: which committed step goes to the job's checkpoint
// directory, when, and which node writes which rank's shard. Nodes write from their own memory; the
// one that finds all ranks' files there seals the checkpoint (checkpoint/files), so that a step is
// in the directory whole or not at all, whatever happens here.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "controller/core/impl.h"

namespace everstep::controller {

void Controller::Impl::PersistIfDue(JobStateView* job) {
  const JobSpec& spec = job->record.spec;
  if (spec.ckpt_dir.empty() || job->commits.commits.empty()) return;
  Runtime& run = runtime_[spec.job];
  if (run.persist || now_ < run.persist_again) return;
  const Commit& newest = job->commits.commits.front();
  if (newest.generation != job->record.generation) return;
  if (run.persist_since.ns == 0) {
    run.persist_since = std::max(job->commits.persisted, run.running_since);
  }
  // Steps that are a multiple; one that was not committed gives way to the next that is.
  const auto every = static_cast<std::int64_t>(spec.ckpt_every_steps);
  const everstep::Step last = job->commits.persisted_generation == newest.generation
                                  ? job->commits.persisted_step
                                  : job->plan.restore_step;
  const bool by_step = every > 0 && newest.step / every > std::max<everstep::Step>(last, 0) / every;
  const bool by_time = spec.ckpt_every > Duration{} && now_ - run.persist_since >= spec.ckpt_every;
  if (by_step || by_time) StartPersist(job, Reason::kPersistDue);
}

bool Controller::Impl::StartPersist(JobStateView* job, Reason reason, RequestId request) {
  const JobSpec& spec = job->record.spec;
  if (spec.ckpt_dir.empty() || job->commits.commits.empty()) return false;
  Runtime& run = runtime_[spec.job];
  const Commit& commit = job->commits.commits.front();
  if (commit.step == job->commits.persisted_step &&
      commit.generation == job->commits.persisted_generation) {
    Answer(request, ReplyCode::kOk, fmt::format("step {} is in {}", commit.step, spec.ckpt_dir));
    return true;
  }
  if (run.persist) {
    if (run.persist->step == commit.step && run.persist->generation == commit.generation &&
        run.persist->trouble.empty()) {
      if (request != 0) run.persist->requests.push_back(request);
      return true;
    }
    if (reason == Reason::kPersistDue) return false;
    if (run.persist->trouble.empty()) run.persist->trouble = "a newer step took its place";
    EndPersist(job);
  }
  // Who writes which rank: the rank's own node, else one that keeps its copy.
  std::map<NodeId, std::vector<Rank>> parts;
  std::string lacking;
  std::int32_t next = 0;
  for (const HeldShard& shard : commit.shards) {
    if (shard.rank != next++) lacking = "the step is of another world";
    const NodeId* holder = nullptr;
    bool own = false;
    for (const auto& [id, holds] : job->holdings) {
      const auto node = state_.nodes.find(id);
      if (node == state_.nodes.end() || !node->second.connected) continue;
      for (const HeldShard& h : holds.shards) {
        const bool same = !h.file && h.rank == shard.rank && h.step == commit.step &&
                          h.generation == commit.generation && h.crc_root == shard.crc_root;
        if (!same || (holder != nullptr && (own || h.replica))) continue;
        holder = &id;
        own = !h.replica;
      }
    }
    if (holder == nullptr) {
      lacking = fmt::format("nobody here holds rank {}", shard.rank);
      break;
    }
    parts[*holder].push_back(shard.rank);
  }
  if (next != commit.world_size && lacking.empty()) lacking = "the step is of another world";
  if (!lacking.empty()) {
    // A step that a generation was restored from may have fewer shards than it once had.
    Answer(request, ReplyCode::kFailedPrecondition,
           fmt::format("step {} of job '{}' cannot be written: {}", commit.step, spec.job, lacking),
           "wait for the next committed step");
    return false;
  }
  Runtime::Persist persist{.generation = commit.generation,
                           .step = commit.step,
                           .reason = reason,
                           .began = now_,
                           .waiting_for = {},
                           .trouble = {},
                           .requests = {},
                           .shards = commit.shards};
  if (request != 0) persist.requests.push_back(request);
  for (const auto& [node, ranks] : parts) persist.waiting_for.insert(node);
  run.persist = std::move(persist);
  run.persist_since = now_;
  for (auto& [node, ranks] : parts) {
    Send(node,
         PersistCommand{spec.job, commit.generation, commit.step, ranks, job->commits.verified});
  }
  return true;
}

void Controller::Impl::On(const Persisted& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr) return;
  Runtime& run = runtime_[e.job];
  CommitRecord& commits = job->commits;
  if (e.sealed &&
      (commits.persisted_step < e.step || commits.persisted_generation < e.generation)) {
    commits.job = e.job;
    commits.persisted_generation = e.generation;
    commits.persisted_step = e.step;
    commits.persisted = now_;
    dirty_commits_.insert(e.job);
  }
  if (e.sealed) NoteFile(job, e.generation, e.step);
  if (!run.persist || run.persist->step != e.step || run.persist->generation != e.generation ||
      run.persist->waiting_for.erase(e.node) == 0) {
    return;
  }
  Runtime::Persist& persist = *run.persist;
  persist.bytes += e.bytes;
  persist.sealed = persist.sealed || e.sealed;
  if (e.sealed) {
    job->files = persist.shards;
    for (HeldShard& shard : job->files) {
      shard.file = true;
      shard.replica = false;
    }
  }
  if (!e.error.empty() && persist.trouble.empty()) {
    persist.trouble = fmt::format("node {}: {}", e.node, e.error);
  }
  // The last to end sees all files, unless the directory is not one and the same.
  if (persist.waiting_for.empty() && !persist.sealed && persist.trouble.empty()) {
    persist.trouble = fmt::format("node {}: {}; is the directory shared by all nodes of the job?",
                                  e.node, e.missing.empty() ? "not sealed" : e.missing);
  }
  if (persist.waiting_for.empty()) EndPersist(job);
}

void Controller::Impl::EndPersist(JobStateView* job) {
  const JobId& id = job->record.spec.job;
  Runtime& run = runtime_[id];
  const Runtime::Persist persist = *std::exchange(run.persist, std::nullopt);
  const std::string& dir = job->record.spec.ckpt_dir;
  const Duration took = now_ - persist.began;
  if (persist.sealed) {
    run.persist_retry = {};
    run.persist_again = {};
    Journal({.type = "checkpoint_persisted",
             .reason = persist.reason,
             .job = id,
             .generation = persist.generation,
             .message = fmt::format("job {}: step {} is in {}", id, persist.step, dir),
             .evidence = fmt::format("step={} bytes={} ms={}", persist.step, persist.bytes,
                                     ToMilliseconds(took))});
  } else {
    run.persist_retry = std::clamp(run.persist_retry * 2, Duration(options_.persist_retry),
                                   Duration(options_.persist_timeout));
    run.persist_again = now_ + run.persist_retry;
    run.persist_since = {};  // the interval is over still
    Journal({.type = "checkpoint_not_persisted",
             .severity = Severity::kError,
             .reason = Reason::kPersistFailed,
             .job = id,
             .generation = persist.generation,
             .message = fmt::format("job {}: step {} is not in {}", id, persist.step, dir),
             .evidence = fmt::format("{} again_in_ms={}", persist.trouble,
                                     ToMilliseconds(run.persist_retry))});
  }
  for (const RequestId request : persist.requests) {
    if (persist.sealed) {
      Answer(request, ReplyCode::kOk, fmt::format("step {} is in {}", persist.step, dir));
    } else {
      Answer(request, ReplyCode::kFailedPrecondition,
             fmt::format("step {} of job '{}' could not be written to {}: {}", persist.step, id,
                         dir, persist.trouble),
             "everstep events --job " + id);
    }
  }
}

void Controller::Impl::PersistBreaks(const NodeId& node, const std::string& why) {
  for (auto& [id, job] : state_.jobs) {
    auto& persist = runtime_[id].persist;
    if (!persist || persist->waiting_for.erase(node) == 0) continue;
    if (persist->trouble.empty()) persist->trouble = fmt::format("node {}: {}", node, why);
    if (persist->waiting_for.empty()) EndPersist(&job);
  }
}

void Controller::Impl::GiveUpPersist(JobStateView* job) {
  auto& persist = runtime_[job->record.spec.job].persist;
  if (!persist || now_ - persist->began < options_.persist_timeout) return;
  persist->trouble =
      fmt::format("no answer within {:.0f} s from {}", ToSeconds(options_.persist_timeout),
                  fmt::join(persist->waiting_for, ", "));
  EndPersist(job);
}

void Controller::Impl::On(const SaveCheckpoint& e) {
  JobStateView* job = FindJob(e.job);
  if (job == nullptr) {
    Answer(e.request, ReplyCode::kNotFound, fmt::format("no job is called '{}'", e.job),
           "everstep job list");
    return;
  }
  if (job->record.spec.ckpt_dir.empty()) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' has no checkpoint directory", e.job),
           "start it with --ckpt-dir DIR");
    return;
  }
  if (IsTerminal(job->record.state)) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' is {}", e.job, JobStateName(job->record.state)),
           "everstep ckpt list " + job->record.spec.ckpt_dir);
    return;
  }
  if (job->commits.commits.empty()) {
    Answer(e.request, ReplyCode::kFailedPrecondition,
           fmt::format("job '{}' has committed no step yet", e.job),
           "its script captures with everstep.Checkpointer");
    return;
  }
  StartPersist(job, Reason::kOperatorSave, e.request);
}

// Numbers of generations are never given out twice in one directory: what an earlier job left there
// must not be taken for this one's.
bool Controller::Impl::FilesAreAhead(JobStateView* job) {
  Generation newest = 0;
  for (const auto& [node, holds] : job->holdings) {
    for (const HeldShard& shard : holds.shards) {
      if (shard.file) newest = std::max(newest, shard.generation);
    }
  }
  if (newest < job->record.generation) return false;
  const Reason reason = job->plan.reason;
  const std::string evidence = job->plan.evidence;
  Forget(job->plan);
  job->plan.generation = 0;
  job->record.generation = newest;
  Prepare(job, reason, evidence, false);
  return true;
}

}  // namespace everstep::controller
