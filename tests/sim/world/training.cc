#include "tests/sim/world/training.h"

#include <algorithm>

#include <fmt/format.h>

namespace everstep::sim {

Step Training::best_step(const JobId& job) const {
  const auto it = best_.find(job);
  return it == best_.end() ? kNoStep : it->second;
}

bool Training::Formed(const JobId& job, Generation generation) const {
  const auto it = groups_.find({job, generation});
  return it != groups_.end() && it->second.formed;
}

Step Training::GroupStep(const JobId& job, Generation generation) const {
  const auto it = groups_.find({job, generation});
  return it != groups_.end() && it->second.formed ? it->second.step : kNoStep;
}

bool Training::Joined(const JobId& job, Generation generation, Rank rank) const {
  const auto it = groups_.find({job, generation});
  return it != groups_.end() && it->second.members.contains(rank);
}

void Training::Join(const JobId& job, Generation generation, std::int32_t world_size, Rank rank,
                    Member member) {
  const Key key{job, generation};
  Group& group = groups_[key];
  if (group.world_size != 0 && group.world_size != world_size) {
    truth_->Violate(timeline_->now(), "one_plan",
                    fmt::format("job {} generation {}: world size {} and {}", job, generation,
                                group.world_size, world_size));
  }
  group.world_size = world_size;
  if (!group.members.emplace(rank, std::move(member)).second) {
    truth_->Violate(timeline_->now(), "one_plan",
                    fmt::format("job {} generation {}: rank {} runs twice", job, generation, rank));
    return;
  }
  if (group.members.size() == static_cast<std::size_t>(world_size) && !group.broken) {
    Form(key, &group);
  }
}

void Training::Form(const Key& key, Group* group) {
  group->formed = true;
  const Member& first = group->members.begin()->second;
  for (const auto& [rank, member] : group->members) {
    if (member.restored == first.restored && member.restored_step == first.restored_step) continue;
    truth_->Violate(
        timeline_->now(), "one_state",
        fmt::format("job {} generation {}: rank {} begins at step {}, rank {} at step {}{}",
                    key.first, key.second, group->members.begin()->first, first.restored_step, rank,
                    member.restored_step,
                    member.restored_step == first.restored_step ? " of another lineage" : ""));
  }
  group->state = first.restored;
  group->step = first.restored_step;
  truth_->Count("groups formed");
  if (on_formed) on_formed(key.first, key.second, group->state, group->step);
  Schedule(key);
}

void Training::Schedule(const Key& key) {
  const std::int64_t time = options_->step_time.count();
  const Duration jitter(timeline_->random().Between(-time / 10, time / 10));
  timeline_->After(options_->step_time + jitter, fmt::format("step {} g{}", key.first, key.second),
                   [this, key] { DoStep(key); });
}

bool Training::Connected(const Group& group) const {
  for (const auto& [ra, a] : group.members) {
    for (const auto& [rb, b] : group.members) {
      if (a.node != b.node && network_->Cut(a.node, b.node)) return false;
    }
  }
  return true;
}

void Training::DoStep(const Key& key) {
  const auto it = groups_.find(key);
  if (it == groups_.end() || it->second.broken) return;
  Group& group = it->second;
  const bool all = group.members.size() == static_cast<std::size_t>(group.world_size) &&
                   std::all_of(group.members.begin(), group.members.end(),
                               [](const auto& m) { return m.second.runs(); });
  if (!all || !Connected(group)) return Schedule(key);  // the collective waits
  if (!std::all_of(group.members.begin(), group.members.end(),
                   [](const auto& m) { return m.second.ready(); })) {
    timeline_->After(Milliseconds(10), "step waits", [this, key] { DoStep(key); });
    return;
  }
  if (group.step >= options_->total_steps) {
    group.broken = true;  // no step after this
    finished_[key.first] = std::max(finished_[key.first], key.second);
    truth_->Count("groups finished");
    for (auto& [rank, member] : group.members) {
      timeline_->After(Milliseconds(timeline_->random().Between(1, 50)), "script ends",
                       [leave = member.leave] { leave(0); });
    }
    return;
  }
  ++group.step;
  group.state = truth_->Extend(key.first, group.state, group.step, key.second);
  best_[key.first] = std::max(best_step(key.first), group.step);
  truth_->Count("steps");
  for (auto& [rank, member] : group.members) {
    timeline_->After(Milliseconds(timeline_->random().Between(1, 25)), "capture",
                     [capture = member.capture, state = group.state, step = group.step] {
                       capture(state, step);
                     });
  }
  Schedule(key);
}

void Training::Leave(const JobId& job, Generation generation, Rank rank) {
  const Key key{job, generation};
  const auto it = groups_.find(key);
  if (it == groups_.end() || it->second.members.erase(rank) == 0) return;
  if (it->second.formed && !it->second.broken) Break(key);
}

// A rank of a formed group is gone: its peers hang in the collective, or see the connection break.
void Training::Break(const Key& key) {
  Group& group = groups_.at(key);
  group.broken = true;
  if (!options_->peers_exit) return;
  for (auto& [rank, member] : group.members) {
    timeline_->After(Milliseconds(timeline_->random().Between(5, 400)), "peer lost",
                     [leave = member.leave] { leave(1); });
  }
}

}  // namespace everstep::sim
