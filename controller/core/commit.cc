// Which step is safe (CopiesOf nodes hold each rank's shard) and where a generation starts from.
// GEMINI (SOSP '23) section 4 places the replicas; here they are counted.
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <tuple>

#include "checkpoint/core/parity_ranks.h"
#include "controller/core/copies.h"
#include "controller/core/impl.h"

namespace everstep::controller {

void Controller::Impl::On(const ShardCopied& e) {
  if (Fresh(e.node, e.incarnation) == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || IsTerminal(job->record.state)) return;
  // Of what runs now, of what it started from, or of a commit whose copies are being made whole.
  const bool current =
      ((e.shard.generation == job->record.generation || IsBase(*job, e.shard) ||
        IsCommitted(*job, e.shard)) &&
       (job->record.state == JobState::kRunning || job->record.state == JobState::kActivating)) ||
      Rebuilds(*job, e);
  if (!current && !Bug(kBugMissingFence)) {
    ++state_.stale_dropped;
    return;
  }
  // A node keeps two slots per rank: the two newest steps.
  std::vector<HeldShard>& held = job->holdings[e.node].shards;
  std::erase_if(held, [&e](const HeldShard& s) {
    return s.rank == e.shard.rank &&
           checkpoint::IsParity(s.rank, s.world_size) ==
               checkpoint::IsParity(e.shard.rank, e.shard.world_size) &&
           (s.step + 2 <= e.shard.step ||
            (s.step == e.shard.step && s.generation == e.shard.generation));
  });
  held.push_back(e.shard);
  if (Rebuilds(*job, e)) return Rebuilt(job, e);
  const bool repaired = Repaired(job, e.node, e.shard);
  if (job->record.state == JobState::kRunning) MendBeside(*job, e.node, e.shard);
  CountCopy(job, e.node, e.shard);
  if (repaired || runtime_[e.job].short_since.ns != 0) WatchCopies(job);
}

void Controller::Impl::CountCopy(JobStateView* job, const NodeId& node, const HeldShard& copy) {
  const JobState s = job->record.state;
  if (s != JobState::kRunning && s != JobState::kActivating) return;
  if (copy.generation != job->record.generation) return CountBase(job, node, copy);
  const JobId& id = job->record.spec.job;
  const everstep::Step step = copy.step;
  if (!job->commits.commits.empty() && job->commits.commits.front().step >= step &&
      job->commits.commits.front().generation == job->record.generation) {
    return;  // committed already
  }
  Runtime& run = runtime_[id];
  if (step <= run.released) return;
  // A rank has one uncommitted step at a time: who captured this one has given up those before, in
  // whatever order a new controller hears of them.
  if (!run.copies.empty() && run.copies.rbegin()->first > step) return Release(job, step);
  if (!run.copies.empty() && run.copies.begin()->first < step) {
    Release(job, std::prev(run.copies.lower_bound(step))->first);
  }
  const auto [copies_of_step, first] = run.copies.try_emplace(step);
  if (first) copies_of_step->second.since = now_;
  auto& by_rank = copies_of_step->second.by_rank;
  by_rank[copy.rank][node] = copy;
  const std::size_t world = job->plan.nodes.size() * job->record.spec.nproc_per_node;
  const auto parities = by_rank.lower_bound(static_cast<Rank>(world));
  if (static_cast<std::size_t>(std::distance(by_rank.begin(), parities)) < world) return;
  const std::size_t needed =
      Bug(kBugPrematureCommit) ? 1 : CopiesOf(job->record.spec, job->plan.nodes.size());
  Commit commit{.generation = job->record.generation,
                .step = step,
                .world_size = static_cast<std::int32_t>(world),
                .copies = static_cast<std::uint32_t>(needed),
                .replicated_layout = by_rank.begin()->second.begin()->second.replicated_layout,
                .shards = {}};
  for (auto it = by_rank.begin(); it != parities; ++it) {
    const auto& copies = it->second;
    std::map<std::uint32_t, std::size_t> equal;  // copies that agree, by checksum
    for (const auto& [holder, shard] : copies) ++equal[shard.crc_root];
    const auto best =
        std::max_element(equal.begin(), equal.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    if (best->second < needed) return;
    const auto source = std::find_if(copies.begin(), copies.end(), [&best](const auto& c) {
      return c.second.crc_root == best->first;
    });
    commit.shards.push_back(source->second);
    commit.replicated_layout = commit.replicated_layout && source->second.replicated_layout;
    // Shares beside whole states put nothing together: the step before stays the one to go back to.
    if (source->second.share != commit.shards.front().share) return Release(job, step);
  }
  if (!AddParities(job, &commit, by_rank, &copies_of_step->second.ordered)) return;
  if (needed > 1 || !commit.parities.empty()) {
    std::map<NodeId, std::uint64_t> sent;
    for (const auto& [rank, copies] : by_rank) {
      for (const auto& [holder, shard] : copies) {
        if (!shard.replica) sent[holder] += shard.bytes;
      }
    }
    job->copied_bytes = 0;
    for (const auto& [holder, bytes] : sent) job->copied_bytes = std::max(job->copied_bytes, bytes);
    job->copy_took = now_ - copies_of_step->second.since;
  }
  run.copies.erase(run.copies.begin(), run.copies.upper_bound(step));
  Progress(job,
           step);  // every rank made this step, though the heartbeats that say so may be behind
  AddCommit(job, std::move(commit));
}

void Controller::Impl::AddCommit(JobStateView* job, Commit commit) {
  const JobId& id = job->record.spec.job;
  job->commits.job = id;
  auto& commits = job->commits.commits;
  commits.insert(commits.begin(), std::move(commit));
  if (commits.size() > 2) commits.resize(2);
  dirty_commits_.insert(id);
  for (const NodePlan& member : job->plan.nodes) TellCommits(job, member.node);
  ForgetDamage(job);
  VerifyOlder(job);
  PersistIfDue(job);
}

bool Controller::Impl::IsBase(const JobStateView& job, const HeldShard& shard) const {
  const GenerationPlan& plan = job.plan;
  // A cut of ranges is committed, or in files.
  if (plan.restore_step == kNoStep || !plan.cut.shards.empty() || shard.step != plan.restore_step ||
      plan.nodes.empty() || plan.nodes.front().workers.empty() ||
      shard.generation != plan.nodes.front().workers.front().restore.shard_generation) {
    return false;
  }
  if (job.commits.commits.empty()) return true;
  const Commit& newest = job.commits.commits.front();
  return newest.generation != plan.generation &&
         std::pair(newest.generation, newest.step) != std::pair(shard.generation, shard.step);
}

void Controller::Impl::CountBase(JobStateView* job, const NodeId& node, const HeldShard& copy) {
  if (!IsBase(*job, copy)) return SealAnew(job);
  runtime_[job->record.spec.job].base_copies[copy.rank][node] = copy;
  CommitBase(job);
}

// A copy on CopiesOf nodes: of each rank's shard, or with a replicated layout of any.
void Controller::Impl::CommitBase(JobStateView* job) {
  const auto& copies = runtime_[job->record.spec.job].base_copies;
  const std::size_t needed = CopiesOf(job->record.spec, job->plan.nodes.size());
  std::set<NodeId> any;
  for (const auto& [rank, holders] : copies) {
    for (const auto& [node, shard] : holders) any.insert(node);
  }
  Commit commit;
  commit.copies = static_cast<std::uint32_t>(needed);
  commit.replicated_layout = true;
  for (const NodePlan& member : job->plan.nodes) {
    for (const WorkerPlan& worker : member.workers) {
      const auto holders = copies.find(worker.restore.shard_rank);
      if (holders == copies.end()) return;
      std::size_t equal = 0;
      const HeldShard* shard = nullptr;
      for (const auto& [node, copy] : holders->second) {
        if (copy.crc_root != worker.restore.crc_root) continue;
        ++equal;
        shard = &copy;
      }
      if (shard == nullptr) return;
      if ((shard->replicated_layout ? any.size() : equal) < needed) return;
      commit.generation = shard->generation;
      commit.step = shard->step;
      commit.world_size = shard->world_size;
      commit.replicated_layout = commit.replicated_layout && shard->replicated_layout;
      commit.shards.push_back(*shard);
    }
  }
  if (!AddParities(job, &commit, copies, &runtime_[job->record.spec.job].base_ordered)) return;
  AddCommit(job, std::move(commit));
}

void Controller::Impl::Release(JobStateView* job, everstep::Step step) {
  Runtime& run = runtime_[job->record.spec.job];
  run.released = step;
  run.copies.erase(run.copies.begin(), run.copies.upper_bound(step));
  for (const NodePlan& member : job->plan.nodes) TellCommits(job, member.node);
}

void Controller::Impl::GiveUpCopies(JobStateView* job) {
  Runtime& run = runtime_[job->record.spec.job];
  if (!run.copies.empty() && now_ - run.copies.begin()->second.since >= options_.commit_patience) {
    Release(job, run.copies.begin()->first);
  }
  if (run.base_released || run.base_copies.empty() ||
      now_ - run.running_since < options_.commit_patience ||
      !IsBase(*job, run.base_copies.begin()->second.begin()->second)) {
    return;
  }
  run.base_released = true;
  for (const NodePlan& member : job->plan.nodes) TellCommits(job, member.node);
}

void Controller::Impl::TellCommits(JobStateView* job, const NodeId& node) {
  const JobId& id = job->record.spec.job;
  const Generation generation = job->record.generation;
  const everstep::Step released = runtime_[id].released;
  const Commit* newest = job->commits.commits.empty() ? nullptr : &job->commits.commits.front();
  const bool of_this = newest != nullptr && newest->generation == generation;
  if (runtime_[id].base_released && !of_this) {
    const RestorePlan& base = job->plan.nodes.front().workers.front().restore;
    Send(node, CommittedCommand{id, base.shard_generation, kNoStep, base.step});
  }
  if (newest != nullptr && !of_this) {
    Send(node, CommittedCommand{id, newest->generation, newest->step, kNoStep});
  }
  if (of_this || released != kNoStep) {
    Send(node, CommittedCommand{id, generation, of_this ? newest->step : kNoStep, released});
  }
}

void Controller::Impl::PlanRestore(JobStateView* job) {
  job->plan.cut = {};
  runtime_[job->record.spec.job].unserved.clear();
  // One candidate is one consistent cut: shards of the same step, generation and world size, and of
  // memory or of files: what a directory holds may be of an earlier run. Memory is tried first.
  std::map<std::tuple<everstep::Step, Generation, std::int32_t, bool>, std::vector<Holder>>
      candidates;
  for (const auto& [id, holds] : job->holdings) {
    const auto node = state_.nodes.find(id);
    if (node == state_.nodes.end() || node->second.record.health == NodeHealth::kLost) continue;
    for (const HeldShard& shard : holds.shards) {
      if (!shard.file && shard.generation <= job->record.earlier_runs) continue;
      if (GivenUp(job->record.given_up, shard.generation, shard.step)) continue;
      if (checkpoint::IsParity(shard.rank, shard.world_size)) continue;
      candidates[{shard.step, shard.generation, shard.world_size, !shard.file}].push_back(
          {id, shard});
    }
  }
  const auto world =
      static_cast<std::int32_t>(job->plan.nodes.size() * job->record.spec.nproc_per_node);
  for (auto it = candidates.rbegin(); it != candidates.rend(); ++it) {
    const auto& [step, generation, captured_world, memory] = it->first;
    std::vector<Holder> holders = it->second;
    if (!memory) {
      // A rank whose memory has the very bytes of the files need not read them.
      const auto same = candidates.find({step, generation, captured_world, true});
      const std::size_t files = holders.size();
      for (std::size_t i = 0; same != candidates.end() && i < same->second.size(); ++i) {
        const HeldShard& shard = same->second[i].shard;
        const bool equal = std::any_of(
            holders.begin(), holders.begin() + static_cast<long>(files), [&shard](const Holder& h) {
              return h.shard.rank == shard.rank && h.shard.crc_root == shard.crc_root;
            });
        if (equal) holders.push_back(same->second[i]);
      }
    }
    const bool replicated = std::all_of(holders.begin(), holders.end(),
                                        [](const Holder& h) { return h.shard.replicated_layout; });
    const bool shares =
        std::any_of(holders.begin(), holders.end(), [](const Holder& h) { return h.shard.share; });
    const bool served = replicated || (captured_world == world && !shares)
                            ? ServeFrom(job, holders, replicated)
                            : ServeRanges(job,
                                          {.step = step,
                                           .generation = generation,
                                           .world_size = captured_world,
                                           .shards = {}},
                                          holders);
    if (served) {
      job->plan.restore_step = step;
      return;
    }
  }
  job->plan.restore_step = kNoStep;
  for (NodePlan& member : job->plan.nodes) {
    for (WorkerPlan& worker : member.workers) worker.restore = {};
  }
}

void Controller::Impl::JournalRestore(const JobStateView& job) {
  const GenerationPlan& plan = job.plan;
  const everstep::Step committed =
      job.commits.commits.empty() ? kNoStep : job.commits.commits.front().step;
  std::size_t local = 0, peer = 0, files = 0, ranges = 0, passed_on = 0;
  std::uint64_t bytes = 0;
  for (const NodePlan& member : plan.nodes) {
    for (const WorkerPlan& worker : member.workers) {
      if (worker.restore.step == kNoStep) continue;
      if (worker.restore.ranges) {
        ++ranges;
        for (const auto& [from, part] : CutMoves(plan.cut, member.node, worker)) bytes += part;
        continue;
      }
      if (worker.restore.file) {
        ++files;
        bytes += worker.restore.bytes;
        continue;
      }
      const bool here = worker.restore.source_node == member.node;
      ++(here && worker.restore.relay == 0 ? local : peer);
      passed_on += worker.restore.relay > 0 ? 1 : 0;
      bytes += here ? 0 : worker.restore.bytes;
    }
  }
  const std::string& unserved = runtime_[plan.job].unserved;
  if (local + peer + files + ranges == 0 && committed == kNoStep && unserved.empty()) {
    return;  // there was nothing to restore
  }
  const bool lost = plan.restore_step < committed;
  const JobId& id = job.record.spec.job;
  Journal({.type = "restore",
           .severity = lost ? Severity::kError : Severity::kInfo,
           .reason = plan.restore_step == kNoStep ? Reason::kNoCommonStep
                     : ranges > 0                 ? Reason::kRestoredByRanges
                     : files > 0                  ? Reason::kRestoredFromFiles
                     : peer > 0                   ? Reason::kRestoredFromPeer
                                                  : Reason::kRestoredFromLocal,
           .job = id,
           .generation = plan.generation,
           .message = plan.restore_step == kNoStep
                          ? fmt::format("job {} starts from nothing: no step is complete", id)
                          : fmt::format("job {} goes back to step {}", id, plan.restore_step),
           .evidence = fmt::format(
               "step={} committed={} ranks_local={} ranks_from_peers={}{}{}{} bytes={}{}",
               plan.restore_step, committed, local, peer,
               passed_on == 0 ? "" : fmt::format(" passed_on={}", passed_on),
               files == 0 ? "" : fmt::format(" ranks_from_files={}", files),
               CutEvidence(plan.cut, ranges), bytes, unserved)});
}

void Controller::Impl::Progress(JobStateView* job, everstep::Step step) {
  if (step == kNoStep) return;
  job->step = std::max(job->step, step);
  Runtime& run = runtime_[job->record.spec.job];
  const bool first_of_generation = step > job->plan.restore_step;
  for (Fault& fault : job->record.faults) {
    if (first_of_generation && fault.recovered.ns == 0 &&
        fault.generation_after == job->record.generation) {
      fault.recovered = now_;
      fault.step_after = step;
      dirty_jobs_.insert(job->record.spec.job);
    }
  }
  if (step > job->record.best_step) {
    const bool first = job->record.best_step <= run.step_at_start;
    job->record.best_step = step;
    for (const NodeId& node : run.joined) run.excluded.erase(node);
    run.joined.clear();
    if (first) {  // not each step: the store is for what recovery needs
      job->record.no_progress = 0;
      job->record.start_failures = 0;
      dirty_jobs_.insert(job->record.spec.job);
    }
  }
}

}  // namespace everstep::controller
