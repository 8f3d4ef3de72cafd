#include "tests/sim/world/checkers.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "checkpoint/core/parity_ranks.h"
#include "tests/sim/world/node.h"

namespace everstep::sim {
namespace {

using controller::ClusterState;
using controller::NodeHealth;

constexpr Duration kFilesKnown = Seconds(30);  // longer than a switch takes

// Node, incarnation, job and generation of an agent's report; generation 0: it carries none.
struct Origin {
  NodeId node;
  Incarnation incarnation = 0;
  JobId job;
  Generation generation = 0;
};

std::optional<Origin> OriginOf(const controller::Event& event) {
  return std::visit(
      [](const auto& e) -> std::optional<Origin> {
        if constexpr (requires { e.incarnation; }) {
          Origin origin{e.node, e.incarnation, {}, 0};
          if constexpr (requires { e.generation; }) {
            origin.job = e.job;
            origin.generation = e.generation;
          } else if constexpr (requires { e.holds; }) {
            origin.job = e.holds.job;
            origin.generation = e.holds.generation;
          } else if constexpr (requires { e.shard; }) {
            origin.job = e.job;
            origin.generation = e.shard.generation;
          }
          return origin;
        } else {
          return std::nullopt;
        }
      },
      event);
}

// What the job's owner asked for, said apart from the core's own rule.
std::size_t ParitiesWanted(const controller::JobSpec& spec, std::size_t nodes) {
  // As many as asked for, and at least two states under each, or it is copies.
  const std::size_t parities = spec.copies == 0 ? 1 : spec.copies - 1;
  return spec.parity_states >= 2 && nodes >= parities + 2 ? parities : 0;
}
std::size_t CopiesWanted(const controller::JobSpec& spec, std::size_t nodes) {
  if (ParitiesWanted(spec, nodes) > 0) return 1;
  return std::min<std::size_t>(spec.copies == 0 ? 2 : spec.copies, nodes);
}

// Copies of the step that the present generation started from are news of the present.
bool IsBase(const controller::JobStateView& job, Generation generation, Step step) {
  const controller::GenerationPlan& plan = job.plan;
  return step != kNoStep && step == plan.restore_step && !plan.nodes.empty() &&
         generation == plan.nodes.front().workers.front().restore.shard_generation;
}
bool IsBase(const controller::JobStateView& job, const controller::Event& event) {
  const auto* copied = std::get_if<controller::ShardCopied>(&event);
  return copied != nullptr && IsBase(job, copied->shard.generation, copied->shard.step);
}
// A copy went bad, or one that was bad or missing is whole: news, whatever generation captured it.
bool IsOfRepair(const controller::JobStateView& job, const controller::Event& event) {
  if (std::holds_alternative<controller::ShardDamaged>(event)) return true;
  if (std::holds_alternative<controller::Persisted>(event)) return true;  // files outlive all
  const auto* copied = std::get_if<controller::ShardCopied>(&event);
  return copied != nullptr && std::any_of(job.commits.commits.begin(), job.commits.commits.end(),
                                          [copied](const controller::Commit& c) {
                                            return c.generation == copied->shard.generation &&
                                                   c.step == copied->shard.step;
                                          });
}

}  // namespace

void Checkers::BeforeStep(const ClusterState& state, const controller::Event& event) {
  stale_.clear();
  heard_before_.reset();
  ended_run_ = 0;
  if (const auto* warm = std::get_if<controller::NodeWarm>(&event)) {
    answered_[{warm->job, warm->node}] = warm->incarnation;
  }
  if (const auto* back = std::get_if<controller::RollBack>(&event)) {
    const auto job = state.jobs.find(back->job);
    rolling_back_ = {job == state.jobs.end() ? 0 : job->second.record.generation, back->step};
  }
  if (const auto* submit = std::get_if<controller::SubmitJob>(&event)) {
    const auto job = state.jobs.find(submit->spec.job);
    if (job != state.jobs.end() && (job->second.record.state == controller::JobState::kSucceeded ||
                                    job->second.record.state == controller::JobState::kCancelled)) {
      ended_run_ = job->second.record.generation;
    }
  }
  const std::optional<Origin> origin = OriginOf(event);
  if (!origin) return;
  const auto node = state.nodes.find(origin->node);
  if (node == state.nodes.end()) {
    stale_ = "an unknown node";
    return;
  }
  heard_before_ = node->second.last_heard;
  const controller::NodeRecord& record = node->second.record;
  if (record.incarnation != origin->incarnation) {
    stale_ = fmt::format("incarnation {} of {}", origin->incarnation, record.incarnation);
  } else if (record.health == NodeHealth::kLost) {
    stale_ = "a lost node";
  } else if (!origin->job.empty()) {
    const auto job = state.jobs.find(origin->job);
    if (job == state.jobs.end()) {
      stale_ = "an unknown job";
    } else if (job->second.record.generation != origin->generation && !IsBase(job->second, event) &&
               !IsOfRepair(job->second, event)) {
      stale_ =
          fmt::format("generation {} of {}", origin->generation, job->second.record.generation);
    }
    heard_before_.reset();  // the node itself is heard
  }
}

void Checkers::AfterStep(Timestamp now, const ClusterState& state, const controller::Event& event,
                         const controller::Decisions& decisions) {
  if (!stale_.empty()) {
    const std::optional<Origin> origin = OriginOf(event);
    const auto node = state.nodes.find(origin->node);
    const bool heard =
        heard_before_ && node != state.nodes.end() && node->second.last_heard != *heard_before_;
    if (!decisions.empty() || heard) {
      Violate(now, "stale_obeyed",
              fmt::format("a message (kind {}) of {} from {} was obeyed", event.index(), stale_,
                          origin->node));
    }
  }
  if (const auto* submit = std::get_if<controller::SubmitJob>(&event);
      submit != nullptr && ended_run_ != 0 && !decisions.records.empty()) {
    forgotten_[submit->spec.job] = ended_run_;
    commits_.erase(submit->spec.job);
  }
  if (const auto* back = std::get_if<controller::RollBack>(&event);
      back != nullptr && !decisions.records.empty()) {
    env_.truth->Count("rolled back");
    commits_.erase(back->job);
  }
  for (const controller::Record& record : decisions.records) {
    const auto* line = std::get_if<controller::JournalRecord>(&record);
    if (line != nullptr && line->reason == controller::Reason::kRebuildTimeout) {
      rebuild_timeouts_[line->job] = line->generation;
    }
  }
  for (const controller::Record& record : decisions.records) {
    if (const auto* generation = std::get_if<controller::GenerationRecord>(&record)) {
      CheckPlan(now, state, generation->plan);
    } else if (const auto* ledger = std::get_if<controller::LedgerRecord>(&record)) {
      CheckLedger(now, state.jobs.at(ledger->job));
    } else if (const auto* commit = std::get_if<controller::CommitRecord>(&record)) {
      // A roll-back only takes some away, other news may be of files alone.
      const controller::Commit newest =
          commit->commits.empty() ? controller::Commit{} : commit->commits.front();
      const controller::Commit before = std::exchange(checked_[commit->job], newest);
      if (newest != before && !std::holds_alternative<controller::RollBack>(event)) {
        CheckCommit(now, state, *commit);
      }
    }
  }
}

// --- plans ---

void Checkers::CheckPlan(Timestamp now, const ClusterState& state,
                         const controller::GenerationPlan& plan) {
  const std::string name = fmt::format("job {} generation {}", plan.job, plan.generation);
  if (plan.reason == controller::Reason::kNone)
    Violate(now, "reason", name + ": a plan without a reason");
  Generation& newest = planned_[plan.job];
  if (plan.generation < newest) {
    Violate(now, "grows", fmt::format("{} is planned after generation {}", name, newest));
  }
  newest = std::max(newest, plan.generation);
  if (plan.phase != controller::Phase::kActivate) return;
  const controller::JobSpec& spec = state.jobs.at(plan.job).record.spec;
  if (plan.nodes.size() < spec.min_nodes || plan.nodes.size() > spec.max_nodes) {
    Violate(now, "one_plan",
            fmt::format("{} has {} nodes of {} to {}", name, plan.nodes.size(), spec.min_nodes,
                        spec.max_nodes));
  }
  Rank next = 0;
  std::set<NodeId> seen;
  for (const NodePlan& node : plan.nodes) {
    if (!seen.insert(node.node).second) {
      Violate(now, "one_plan", fmt::format("{} names {} twice", name, node.node));
    }
    std::set<NodeId> keepers = {node.node};
    for (const PeerPlan& peer : node.peers) {
      if (!keepers.insert(peer.node).second) {
        Violate(now, "one_plan",
                fmt::format("{}: {} keeps two copies of {}", name, peer.node, node.node));
      }
    }
    const std::size_t copies = CopiesWanted(spec, plan.nodes.size());
    if (keepers.size() != copies) {
      Violate(now, "one_plan",
              fmt::format("{}: {} has {} copies of {}", name, node.node, keepers.size(), copies));
    }
    for (const WorkerPlan& worker : node.workers) {
      if (worker.rank != next++) {
        Violate(now, "one_plan", fmt::format("{}: rank {} on {}", name, worker.rank, node.node));
      }
    }
    for (const Generation live : env_.nodes->at(node.node)->LiveGenerations(plan.job)) {
      if (live < plan.generation) {
        Violate(now, "one_active",
                fmt::format("{} is activated while a worker of generation {} lives on {}", name,
                            live, node.node));
      }
    }
  }
  CheckRestore(now, state, plan);
  CheckSources(now, plan);
}

// A rank whose shard is passed on gets it from an earlier one that takes these very bytes, and the
// first of each such line from a holder: nobody waits for itself.
void Checkers::CheckSources(Timestamp now, const controller::GenerationPlan& plan) {
  std::set<std::tuple<NodeId, std::uint32_t, std::uint32_t>> taken;  // node, bytes, depth
  for (const NodePlan& node : plan.nodes) {
    for (const WorkerPlan& worker : node.workers) {
      const RestorePlan& r = worker.restore;
      if (r.step == kNoStep || r.file || r.ranges || (r.relay == 0 && r.source_node == node.node))
        continue;
      if (r.relay > 0 &&
          (!taken.contains({r.source_node, r.crc_root, r.relay - 1}) || r.others.empty())) {
        Violate(now, "sources",
                fmt::format("job {} generation {}: rank {} waits for {}, which does not take these "
                            "bytes before it, or has no holder to turn to",
                            plan.job, plan.generation, worker.rank, r.source_node));
      }
      if (r.relay > 0) env_.truth->Count("ranks planned behind a taker");
      taken.insert({node.node, r.crc_root, r.relay});
    }
  }
}

// The node is there, and the controller knows this very keeper as one of its own.
bool Checkers::Reachable(const ClusterState& state, const NodeId& node,
                         std::uint64_t keeper) const {
  const auto known = state.nodes.find(node);
  return env_.nodes->at(node)->keeper_id() == keeper && known != state.nodes.end() &&
         known->second.record.health != NodeHealth::kLost &&
         known->second.record.keeper_id == keeper;
}

void Checkers::CheckRestore(Timestamp now, const ClusterState& state,
                            const controller::GenerationPlan& plan) {
  const std::string name = fmt::format("job {} generation {}", plan.job, plan.generation);
  std::optional<Lineage> start;
  for (const CutShard& shard : plan.cut.shards) {
    const std::optional<Lineage> of = env_.truth->OfChecksum(shard.crc_root);
    if (!of || of != env_.truth->OfChecksum(plan.cut.shards.front().crc_root)) {
      Violate(now, "one_state",
              fmt::format("{}: rank {} of its cut is of another state", name, shard.rank));
    }
  }
  for (const NodePlan& node : plan.nodes) {
    for (const WorkerPlan& worker : node.workers) {
      const std::uint32_t crc_root = worker.restore.ranges && !plan.cut.shards.empty()
                                         ? plan.cut.shards.front().crc_root
                                         : worker.restore.crc_root;
      const std::optional<Lineage> state_of =
          worker.restore.step == kNoStep ? kFromNothing : env_.truth->OfChecksum(crc_root);
      if (worker.restore.step != plan.restore_step || !state_of || (start && *start != *state_of)) {
        Violate(now, "one_state",
                fmt::format("{}: rank {} starts from step {} crc {:08x}, the plan from step {}",
                            name, worker.rank, worker.restore.step, worker.restore.crc_root,
                            plan.restore_step));
        return;
      }
      start = state_of;
      const auto& kept = state.jobs.at(plan.job).record.given_up;
      for (const Cut& cut : cuts_[plan.job]) {
        // One that was undone, since nothing else is left, binds no more.
        const bool binds = std::any_of(kept.begin(), kept.end(), [&cut](const Cut& k) {
          return k.generation >= cut.generation && k.step <= cut.step;
        });
        if (!binds) env_.truth->Count("roll-backs undone");
        if (binds && worker.restore.step != kNoStep &&
            Beyond(cut, worker.restore.shard_generation, worker.restore.step)) {
          Violate(now, "given_up",
                  fmt::format("{} starts from step {} of generation {}, given up at step {}", name,
                              worker.restore.step, worker.restore.shard_generation, cut.step));
        }
      }
      const auto forgotten = forgotten_.find(plan.job);
      if (worker.restore.step != kNoStep && forgotten != forgotten_.end() &&
          worker.restore.shard_generation <= forgotten->second) {
        Violate(now, "runs_apart",
                fmt::format("{} starts from step {} of generation {}, of a run that is over", name,
                            worker.restore.step, worker.restore.shard_generation));
      }
    }
  }
  if (start) CheckFiles(now, state, plan, *start);
  const auto& commits = state.jobs.at(plan.job).commits.commits;
  if (commits.empty() || !start) return;
  const controller::Commit& commit = commits.front();
  const std::optional<Lineage> committed = env_.truth->OfChecksum(commit.shards.front().crc_root);
  // A later step of another branch loses no step: the branch was begun when this one was out of
  // reach.
  if (!committed || plan.restore_step >= commit.step || env_.truth->Descends(*start, *committed)) {
    return;
  }
  // Workers capture until a roll-back's Prepare reaches them: its target may be gone by then.
  const auto& given_up = state.jobs.at(plan.job).record.given_up;
  const bool target = !given_up.empty() && given_up.back().step == commit.step;
  const auto overwritten = [&](const NodeId& node, const HeldShard& shard) {
    const std::vector<HeldShard> here = env_.nodes->at(node)->Verified(plan.job);
    return std::none_of(here.begin(), here.end(), [&shard](const HeldShard& s) {
      return s.rank == shard.rank && s.crc_root == shard.crc_root;
    });
  };
  // It went back behind a committed step: were the copies really out of reach?
  std::size_t ranks_at_hand = 0;
  std::string where;
  for (const HeldShard& shard : commit.shards) {
    bool at_hand = false;
    for (const Truth::Holder& holder : env_.truth->Holders(plan.job, shard)) {
      if (!holder.intact || !Reachable(state, holder.node, holder.keeper)) continue;
      if (target && overwritten(holder.node, shard)) continue;
      at_hand = true;
      where += fmt::format(" rank {} on {}", shard.rank, holder.node);
    }
    ranks_at_hand += at_hand ? 1 : 0;
  }
  bool whole = commit.replicated_layout ? ranks_at_hand > 0 : ranks_at_hand == commit.shards.size();
  if (!whole && !commit.parity.groups.empty()) {
    whole = AtHand(plan.job, commit, [&](const Truth::Holder& holder) {
      return holder.intact && Reachable(state, holder.node, holder.keeper);
    });
    where += "; parities:";
    for (const HeldShard& shard : commit.parities) {
      for (const Truth::Holder& holder : env_.truth->Holders(plan.job, shard)) {
        if (holder.intact && Reachable(state, holder.node, holder.keeper)) {
          where += fmt::format(" {} on {}", shard.rank, holder.node);
        }
      }
    }
    // Who makes them may die at it, again and again, until the time for it is over.
    if (whole && rebuild_timeouts_[plan.job] == plan.generation) {
      env_.truth->Count("rebuilds given up");
      return;
    }
  }
  if (whole) TellMemory(now, state, plan.job);
  if (whole) {
    Violate(
        now, "commit_kept",
        fmt::format("{} starts after step {}, step {} of generation {} is committed and at hand:{}",
                    name, plan.restore_step, commit.step, commit.generation, where));
  } else {
    env_.truth->Count("committed steps lost with all copies of a shard");
  }
}

// What has been in the directory since long before this plan was begun is not gone behind.
void Checkers::CheckFiles(Timestamp now, const ClusterState& state,
                          const controller::GenerationPlan& plan, Lineage start) {
  const auto& given_up = state.jobs.at(plan.job).record.given_up;
  const auto file = env_.files->Newest(plan.job, now - kFilesKnown, given_up);
  if (!file || plan.restore_step >= file->step) return;
  const std::optional<Lineage> kept = env_.truth->OfChecksum(file->crc_root);
  if (!kept || env_.truth->Descends(start, *kept)) return;
  Violate(
      now, "files_kept",
      fmt::format("job {} generation {} starts after step {}, step {} of generation {} is in its "
                  "directory",
                  plan.job, plan.generation, plan.restore_step, file->step, file->generation));
}

void Checkers::TellMemory(Timestamp now, const ClusterState& state, const JobId& job) const {
  if (!env_.truth->told()) return;
  for (const auto& [id, node] : *env_.nodes) {
    env_.truth->Note(now, fmt::format("{} holds:{}", id, node->DescribeMemory(job)));
    const auto known = state.jobs.at(job).holdings.find(id);
    if (known == state.jobs.at(job).holdings.end()) continue;
    std::string held;
    for (const HeldShard& s : known->second.shards) {
      held += fmt::format(" {}{}@{}/g{}", s.replica ? "r" : "", s.rank, s.step, s.generation);
    }
    env_.truth->Note(now, fmt::format("... as the controller knows:{}", held));
  }
}

void Checkers::CheckCommit(Timestamp now, const ClusterState& state,
                           const controller::CommitRecord& record) {
  if (record.commits.empty()) return;
  const controller::Commit& commit = record.commits.front();
  const controller::JobStateView& job = state.jobs.at(record.job);
  const std::string name =
      fmt::format("job {} step {} of generation {}", record.job, commit.step, commit.generation);
  env_.truth->Count("commits");
  if (commit.generation != job.record.generation && !IsBase(job, commit.generation, commit.step)) {
    Violate(
        now, "stale_obeyed",
        fmt::format("{} is committed, the job is at generation {}", name, job.record.generation));
  }
  const std::size_t world = job.plan.nodes.size() * job.record.spec.nproc_per_node;
  if (commit.shards.size() != world) {
    Violate(now, "commit_has_copies",
            fmt::format("{} is committed with {} of {} ranks", name, commit.shards.size(), world));
    return;
  }
  std::optional<Lineage> lineage;
  for (const HeldShard& shard : commit.shards) {
    std::set<NodeId> nodes;
    std::vector<HeldShard> serve = {shard};
    if (commit.replicated_layout && commit.generation != job.record.generation) {
      // What a generation starts from: with a replicated layout any rank's shard serves.
      const std::optional<Lineage> of = env_.truth->OfChecksum(shard.crc_root);
      for (Rank rank = 0; of && rank < commit.world_size; ++rank) {
        serve.push_back(shard);
        serve.back().rank = rank;
        serve.back().crc_root = env_.truth->Checksum(*of, rank);
      }
    }
    for (const HeldShard& one : serve) {
      for (const Truth::Holder& holder : env_.truth->Holders(record.job, one)) {
        nodes.insert(holder.node);
      }
    }
    const std::size_t wanted = CopiesWanted(job.record.spec, job.plan.nodes.size());
    if (nodes.size() < wanted || commit.copies < wanted) {
      Violate(now, "commit_has_copies",
              fmt::format("{} is committed, rank {} has {} copies of {}", name, shard.rank,
                          nodes.size(), wanted));
    }
    const std::optional<Lineage> of = env_.truth->OfChecksum(shard.crc_root);
    if (!of || (lineage && *lineage != *of) || shard.step != commit.step) {
      Violate(now, "one_state", fmt::format("{}: rank {} is of another state", name, shard.rank));
    }
    lineage = of;
    if (shard.share != commit.shards.front().share) {
      Violate(now, "shares_together",
              fmt::format("{} is of shares, but not for rank {} and 0 alike", name, shard.rank));
    }
  }
  CheckParities(now, job, commit, name);
}

// The commit's shards are there or come back, counting only holders that `counts` takes.
bool Checkers::AtHand(const JobId& job, const controller::Commit& commit,
                      const std::function<bool(const Truth::Holder&)>& counts) const {
  std::set<Rank> have;
  for (const std::vector<HeldShard>* shards : {&commit.shards, &commit.parities}) {
    for (const HeldShard& shard : *shards) {
      const std::vector<Truth::Holder> holders = env_.truth->Holders(job, shard);
      if (std::any_of(holders.begin(), holders.end(), counts)) have.insert(shard.rank);
    }
  }
  return std::all_of(commit.parity.groups.begin(), commit.parity.groups.end(),
                     [&](const std::vector<Rank>& group) {
                       return checkpoint::Recoverable(
                           checkpoint::CodewordsOf(group, commit.parity.parity, commit.world_size),
                           have);
                     });
}

// What is committed with parities bears the loss of any so many nodes as were asked for.
void Checkers::CheckParities(Timestamp now, const controller::JobStateView& job,
                             const controller::Commit& commit, const std::string& name) {
  const std::size_t nodes = job.plan.nodes.size();
  const std::size_t wanted = ParitiesWanted(job.record.spec, nodes);
  if (wanted == 0 || commit.replicated_layout) return;
  env_.truth->Count("commits with parities");
  std::vector<std::size_t> lost(wanted);
  for (std::size_t i = 0; i < wanted; ++i) lost[i] = i;
  for (bool more = true; more;) {
    const bool bears = commit.parity.groups.size() > 0 &&
                       AtHand(job.record.spec.job, commit, [&](const Truth::Holder& holder) {
                         return std::none_of(lost.begin(), lost.end(), [&](std::size_t i) {
                           return job.plan.nodes[i].node == holder.node;
                         });
                       });
    if (!bears) {
      Violate(now, "commit_has_copies",
              fmt::format("{} is committed and does not bear the loss of {} and {} others", name,
                          job.plan.nodes[lost.front()].node, wanted - 1));
      return;
    }
    more = false;
    for (std::size_t i = wanted; i-- > 0 && !more;) {
      if (lost[i] == nodes - wanted + i) continue;
      ++lost[i];
      for (std::size_t j = i + 1; j < wanted; ++j) lost[j] = lost[j - 1] + 1;
      more = true;
    }
  }
}

// --- what was said, and what the store knows ---

void Checkers::CheckNewcomers(Timestamp now, const controller::GenerationPlan& plan) {
  if (plan.phase != controller::Phase::kPrepare) return;
  std::set<NodeId> members;
  for (const NodePlan& member : plan.nodes) members.insert(member.node);
  const std::set<NodeId> before = std::exchange(members_[plan.job], members);
  if (plan.reason != controller::Reason::kNodeJoined) return;
  env_.truth->Count("joins of a job that runs");
  for (const NodeId& node : members) {
    if (before.contains(node)) continue;
    const auto answer = answered_.find({plan.job, node});
    if (answer != answered_.end() && answer->second == incarnations_[node]) continue;
    const auto since = warming_.find({plan.job, node});
    if (since != warming_.end() && now >= since->second + env_.options->controller.warm_patience) {
      env_.truth->Count("newcomers that were waited for long enough");
      continue;
    }
    Violate(now, "warm_first",
            fmt::format("job {} generation {} stands while {} still imports", plan.job,
                        plan.generation, node));
  }
}

void Checkers::OnDecisions(Timestamp now, const controller::Decisions& decisions) {
  for (const controller::Record& record : decisions.records) {
    if (const auto* plan = std::get_if<controller::GenerationRecord>(&record)) {
      CheckNewcomers(now, plan->plan);
    } else if (const auto* line = std::get_if<controller::JournalRecord>(&record)) {
      if (line->type == "node_warming") warming_[{line->job, line->node}] = now;
      if (env_.truth->told()) {
        env_.truth->Note(now, fmt::format("journal: {} ({}) {}", line->message,
                                          controller::ReasonName(line->reason), line->evidence));
      }
      if (line->severity != controller::Severity::kInfo &&
          line->reason == controller::Reason::kNone && line->type != "node_refused") {
        Violate(now, "reason", fmt::format("'{}' has no reason", line->message));
      }
      if (line->type == "node_lost") {
        env_.truth->Count(std::string("lost: ") + controller::ReasonName(line->reason));
        if (line->evidence.empty())
          Violate(now, "reason", fmt::format("'{}' has no evidence", line->message));
        const bool impatient = line->reason == controller::Reason::kPrepareTimeout &&
                               env_.options->controller.prepare_timeout < Seconds(15);
        if (!env_.disturbed() && !impatient) {
          Violate(now, "reason",
                  fmt::format("'{}' ({}) and nothing had happened to it", line->message,
                              line->evidence));
        }
      }
    } else if (const auto* job = std::get_if<controller::JobRecord>(&record)) {
      for (const controller::Fault& fault : job->faults) {
        if (fault.reason == controller::Reason::kNone || fault.subject.empty()) {
          Violate(now, "reason",
                  fmt::format("fault {} of job {} has no reason", fault.id, job->spec.job));
        }
      }
      if (controller::IsTerminal(job->state) && job->end_reason == controller::Reason::kNone) {
        Violate(now, "reason", fmt::format("job {} ended without a reason", job->spec.job));
      }
    }
  }
}

void Checkers::OnCommand(Timestamp now, const controller::Command& command) {
  Incarnation& newest = incarnations_[command.node];
  if (command.incarnation < newest) {
    Violate(now, "grows",
            fmt::format("{} gets a command for incarnation {} after {}", command.node,
                        command.incarnation, newest));
  } else if (command.incarnation == newest &&
             std::holds_alternative<controller::RegisteredCommand>(command.body)) {
    Violate(now, "grows", fmt::format("{} gets registration {} twice", command.node, newest));
  }
  newest = std::max(newest, command.incarnation);
  JobId job;
  Generation generation = 0;
  if (const auto* p = std::get_if<controller::PrepareCommand>(&command.body)) {
    job = p->job;
    generation = p->generation;
  } else if (const auto* a = std::get_if<controller::ActivateCommand>(&command.body)) {
    job = a->plan->job;
    generation = a->plan->generation;
  } else if (const auto* c = std::get_if<controller::CommittedCommand>(&command.body)) {
    if (c->step != kNoStep) {
      commits_[c->job] = {c->generation, c->step};
    }
  }
  if (generation == 0) return;
  Generation& said = generations_[job];
  if (generation < said) {
    Violate(now, "grows",
            fmt::format("{} gets a command for generation {} of job {} after {}", command.node,
                        generation, job, said));
  }
  said = std::max(said, generation);
}

void Checkers::OnRecovered(Timestamp now, const ClusterState& state) {
  planned_.clear();  // a decision whose batch died with the process never was
  checked_.clear();
  for (const auto& [id, job] : state.jobs) {
    CheckAcknowledged(now, job);
    planned_[id] = job.record.generation;
    if (!job.commits.commits.empty()) checked_[id] = job.commits.commits.front();
  }
  for (const auto& [node, incarnation] : incarnations_) {
    const auto it = state.nodes.find(node);
    if (it == state.nodes.end() || it->second.record.incarnation < incarnation) {
      Violate(now, "stored",
              fmt::format("{} was given incarnation {}, the store knows {}", node, incarnation,
                          it == state.nodes.end() ? 0 : it->second.record.incarnation));
    }
  }
  for (const auto& [id, generation] : generations_) {
    const auto it = state.jobs.find(id);
    if (it == state.jobs.end() || it->second.record.generation < generation) {
      Violate(now, "stored",
              fmt::format("generation {} of job {} was commanded, the store knows {}", generation,
                          id, it == state.jobs.end() ? 0 : it->second.record.generation));
    }
  }
  for (const auto& [id, said] : commits_) {
    const auto it = state.jobs.find(id);
    if (it == state.jobs.end() || it->second.record.end_reason == controller::Reason::kCompleted ||
        it->second.record.end_reason == controller::Reason::kCancelled) {
      continue;  // its bytes are gone on purpose
    }
    const auto& commits = it->second.commits.commits;
    const bool known = std::any_of(commits.begin(), commits.end(), [&said = said](const auto& c) {
      return std::pair(c.generation, c.step) >= said;
    });
    if (!known) {
      Violate(now, "stored",
              fmt::format("step {} of job {} was called committed, the store does not know it",
                          said.second, id));
    }
  }
  for (const JobId& job : acknowledged_) {
    if (!state.jobs.contains(job)) {
      Violate(now, "stored",
              fmt::format("job {} was acknowledged, the store does not know it", job));
    }
  }
}

void Checkers::CompareStore(Timestamp now, const ClusterState& state, const SimStore& store) {
  controller::Controller again(env_.options->controller);
  controller::Decisions ignored;
  const std::vector<controller::Record> records = store.Load();
  again.Recover(now, records, &ignored);
  const auto differs = [&](const std::string& what) {
    Violate(now, "stored", "the store would rebuild another state: " + what);
  };
  const ClusterState& is = again.state();
  if (is.nodes.size() != state.nodes.size()) differs("the number of nodes");
  if (is.jobs.size() != state.jobs.size()) differs("the number of jobs");
  if (is.next_journal_sequence != state.next_journal_sequence) differs("the journal's end");
  for (const auto& [id, node] : state.nodes) {
    const auto it = is.nodes.find(id);
    if (it == is.nodes.end()) {
      differs("node " + id);
      continue;
    }
    const controller::NodeRecord& a = node.record;
    const controller::NodeRecord& b = it->second.record;
    if (a.incarnation != b.incarnation || a.keeper_id != b.keeper_id || a.draining != b.draining ||
        (a.health == NodeHealth::kLost) != (b.health == NodeHealth::kLost) || a.facts != b.facts) {
      differs("node " + id);
    }
  }
  for (const auto& [id, job] : state.jobs) {
    const auto it = is.jobs.find(id);
    if (it == is.jobs.end()) {
      differs("job " + id);
      continue;
    }
    const controller::JobRecord& a = job.record;
    const controller::JobRecord& b = it->second.record;
    if (a.generation != b.generation || a.state != b.state || a.restarts != b.restarts ||
        a.lost_capacity != b.lost_capacity || a.no_progress != b.no_progress ||
        a.start_failures != b.start_failures || a.end_reason != b.end_reason ||
        a.exit_code != b.exit_code || a.earlier_runs != b.earlier_runs || a.faults != b.faults ||
        a.spec != b.spec) {
      differs(fmt::format("job {}: generation {} {} in memory, {} {} in the store", id,
                          a.generation, controller::JobStateName(a.state), b.generation,
                          controller::JobStateName(b.state)));
    }
    if (job.ledger != it->second.ledger || job.layouts != it->second.layouts ||
        job.told != it->second.told) {
      differs(fmt::format("what job {} told", id));
    }
    if (job.plan != it->second.plan) differs(fmt::format("the plan of job {}", id));
    if (job.commits.commits != it->second.commits.commits)
      differs(fmt::format("the commits of job {}", id));
  }
}

void Checkers::CheckDeadlines(Timestamp now, const ClusterState& state) {
  for (const auto& [id, job] : state.jobs) {
    if (job.deadline.ns == 0 || controller::IsTerminal(job.record.state)) continue;
    if (now > job.deadline + Seconds(2)) {
      Violate(now, "deadline",
              fmt::format("job {} is {} {} ms after its deadline", id,
                          controller::JobStateName(job.record.state),
                          ToMilliseconds(now - job.deadline)));
    }
  }
}

}  // namespace everstep::sim
