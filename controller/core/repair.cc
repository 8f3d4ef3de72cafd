// Copies that went bad or missing: what a damaged one means, who puts it right, when every copy is
// there again. Nodes find damage (scrub, survey, push) and repair it from where this file says;
// it counts, explains, and names a node whose memory fails again and again.
//
//   ShardDamaged --> the copy counts no longer --> RepairShard to its node, from another holder
//   ShardCopied  --> it counts again: shard_repaired; all of them: copies_restored
//
// A node that still finds the damage says so again, and is told a source anew: nothing here waits.
#include <fmt/format.h>

#include <algorithm>

#include "controller/core/copies.h"
#include "controller/core/impl.h"

namespace everstep::controller {
namespace {

bool Same(const HeldShard& a, const HeldShard& b) {
  return a.rank == b.rank && a.generation == b.generation && a.step == b.step &&
         a.crc_root == b.crc_root && a.file == b.file;
}

std::string WhatOf(const HeldShard& shard) {
  return fmt::format("step {} of rank {}", shard.step, shard.rank);
}

}  // namespace

bool Controller::Impl::IsCommitted(const JobStateView& job, const HeldShard& shard) const {
  return std::any_of(
      job.commits.commits.begin(), job.commits.commits.end(), [&shard](const Commit& c) {
        return c.step == shard.step && c.generation == shard.generation &&
               (std::any_of(c.shards.begin(), c.shards.end(),
                            [&shard](const HeldShard& s) { return s.rank == shard.rank; }) ||
                std::any_of(c.parities.begin(), c.parities.end(),
                            [&shard](const HeldShard& s) { return s.rank == shard.rank; }));
      });
}

void Controller::Impl::On(const ShardDamaged& e) {
  NodeState* node = Fresh(e.node, e.incarnation);
  if (node == nullptr) return;
  JobStateView* job = FindJob(e.job);
  if (job == nullptr || IsTerminal(job->record.state)) {
    ++state_.stale_dropped;
    return;
  }
  // It is no copy any more: of what it held, of what waits for its commit.
  std::erase_if(job->holdings[e.node].shards, [&e](const HeldShard& s) {
    return Same(s, e.shard) && s.replica == e.shard.replica;
  });
  Runtime& run = runtime_[e.job];
  if (const auto step = run.copies.find(e.shard.step);
      step != run.copies.end() && e.shard.generation == job->record.generation) {
    auto& holders = step->second.by_rank[e.shard.rank];
    if (const auto it = holders.find(e.node); it != holders.end() && Same(it->second, e.shard)) {
      holders.erase(it);
    }
    if (holders.empty()) step->second.by_rank.erase(e.shard.rank);
  }
  const NodeId source = RepairSource(*job, e.node, e.shard);
  std::optional<Remedy> remedy;
  if (source.empty()) remedy = RemedyOf(*job, e.node, e.shard);
  const DamageKey key{e.node, e.shard.rank, e.shard.generation, e.shard.step, e.shard.replica};
  if (job->damaged.insert(key).second) {
    ++job->record.shards_damaged;
    dirty_jobs_.insert(e.job);
    Journal({.type = "shard_damaged",
             .severity = Severity::kError,
             .reason = Reason::kChecksumFailed,
             .job = e.job,
             .node = e.node,
             .rank = e.shard.rank,
             .generation = e.shard.generation,
             .message = fmt::format("{} in node {}'s memory fails its checksum; {}",
                                    WhatOf(e.shard), e.node,
                                    remedy ? std::string("it is made anew out of parities")
                                    : source.empty() ? std::string("no other copy is known")
                                                     : fmt::format("node {} has it whole", source)),
             .evidence = fmt::format("step={} chunk={} copy={} found_by={} source={}", e.shard.step,
                                     e.chunk < 0 ? "table" : std::to_string(e.chunk),
                                     e.shard.replica ? "replica" : "own", e.found_by,
                                     remedy           ? "parity"
                                     : source.empty() ? "none"
                                                      : source)});
    NoteMemoryFinding(node);
    run.short_since = run.short_since.ns == 0 ? now_ : run.short_since;
    if (e.found_by != "survey") NoteAnomaly(job, fmt::format("memory of node {}", e.node));
  }
  if (job->record.state != JobState::kRunning) return;
  if (remedy) SendRemedy(e.node, std::move(*remedy));
  if (source.empty()) return;
  Send(e.node, RepairShardCommand{e.job, e.shard, source, DataAddress(source)});
}

// A node that holds these bytes, one whose memory is not suspect first; empty: none that can be
// asked.
NodeId Controller::Impl::RepairSource(const JobStateView& job, const NodeId& damaged,
                                      const HeldShard& shard) const {
  NodeId suspect;
  for (const auto& [id, holds] : job.holdings) {
    const auto node = state_.nodes.find(id);
    if (id == damaged || node == state_.nodes.end() || !node->second.connected ||
        node->second.record.health != NodeHealth::kAlive) {
      continue;
    }
    if (std::none_of(holds.shards.begin(), holds.shards.end(),
                     [&shard](const HeldShard& s) { return !s.file && Same(s, shard); })) {
      continue;
    }
    if (node->second.memory_suspect.empty()) return id;
    if (suspect.empty()) suspect = id;
  }
  return suspect;
}

void Controller::Impl::NoteMemoryFinding(NodeState* node) {
  std::deque<Timestamp>& found = node->memory_findings;
  while (!found.empty() && now_ - found.front() >= options_.suspect_window) found.pop_front();
  if (found.empty()) node->memory_suspect.clear();
  found.push_back(now_);
  if (found.size() < options_.suspect_findings || !node->memory_suspect.empty()) return;
  const NodeId& id = node->record.node;
  node->memory_suspect =
      fmt::format("findings={} window_s={:.0f}", found.size(), ToSeconds(options_.suspect_window));
  Journal({.type = "memory_suspect",
           .severity = Severity::kError,
           .reason = Reason::kChecksumFailed,
           .node = id,
           .message = fmt::format("{} copies in node {}'s memory failed their checksums: drain it "
                                  "(everstep node drain {}) and test its memory",
                                  found.size(), id, id),
           .evidence = node->memory_suspect});
}

// A copy was made out of parities beside a damaged one.
void Controller::Impl::MendBeside(const JobStateView& job, const NodeId& node,
                                  const HeldShard& shard) {
  HeldShard damaged = shard;
  damaged.replica = false;
  const DamageKey key{node, shard.rank, shard.generation, shard.step, damaged.replica};
  if (!shard.replica || !job.damaged.contains(key)) return;
  if (auto remedy = RemedyOf(job, node, damaged)) SendRemedy(node, std::move(*remedy));
}

// A copy came (again). True: it was known to be damaged.
bool Controller::Impl::Repaired(JobStateView* job, const NodeId& node, const HeldShard& shard) {
  const DamageKey key{node, shard.rank, shard.generation, shard.step, shard.replica};
  if (job->damaged.erase(key) == 0) return false;
  ++job->record.shards_repaired;
  dirty_jobs_.insert(job->record.spec.job);
  Journal(
      {.type = "shard_repaired",
       .reason = Reason::kChecksumFailed,
       .job = job->record.spec.job,
       .node = node,
       .rank = shard.rank,
       .generation = shard.generation,
       .message = fmt::format("{} is whole again in node {}'s memory", WhatOf(shard), node),
       .evidence = fmt::format("step={} copy={}", shard.step, shard.replica ? "replica" : "own")});
  return true;
}

// What is older than both commits is of no use to anybody, damaged or not; what a lost node had is
// gone.
void Controller::Impl::ForgetDamage(JobStateView* job) {
  const auto& commits = job->commits.commits;
  std::erase_if(job->damaged, [&](const DamageKey& d) {
    const auto node = state_.nodes.find(d.node);
    return node == state_.nodes.end() || node->second.record.health == NodeHealth::kLost ||
           (!commits.empty() && std::pair(d.generation, d.step) <
                                    std::pair(commits.back().generation, commits.back().step));
  });
}

// Level-triggered: looked at whenever a copy comes while some were missing.
void Controller::Impl::WatchCopies(JobStateView* job) {
  Runtime& run = runtime_[job->record.spec.job];
  const std::size_t wanted = CopiesOf(job->record.spec, job->plan.nodes.size());
  const CopySets copies = CopiesNow(state_, *job);
  const bool full =
      copies.step != kNoStep && LeastCopies(copies) >= wanted && copies.parities == copies.wanted;
  if (!full) {
    if (run.short_since.ns == 0 && copies.step != kNoStep) run.short_since = now_;
    return;
  }
  if (run.short_since.ns == 0) return;
  Journal({.type = "copies_restored",
           .reason = Reason::kCommitted,
           .job = job->record.spec.job,
           .generation = job->record.generation,
           .message = fmt::format("job {}: step {} has {} again of every rank's state{}",
                                  job->record.spec.job, copies.step,
                                  wanted == 1 ? "its copy" : fmt::format("{} copies", wanted),
                                  copies.wanted > 0 ? ", and every parity" : ""),
           .evidence = fmt::format("step={} copies={} short_ms={}", copies.step, wanted,
                                   ToMilliseconds(now_ - run.short_since))});
  run.short_since = {};
}

}  // namespace everstep::controller
