#include "tests/sim/world/training.h"

#include <algorithm>
#include <cstdio>

#include <fmt/format.h>

namespace everstep::sim {
namespace {

constexpr Duration kTellPatience = Seconds(120);  // of a rank 0 that ends
constexpr int kMicrobatches = 12;

}  // namespace

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
  if (Tells(key.first)) TellBegin(key, group);
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
    const bool tells = Tells(key.first);
    if (tells) EndTelling(key, timeline_->now() + kTellPatience);
    for (auto& [rank, member] : group.members) {
      if (tells && rank == 0) continue;  // when everything is acknowledged
      timeline_->After(Milliseconds(timeline_->random().Between(1, 50)), "script ends",
                       [leave = member.leave] { leave(0); });
    }
    return;
  }
  ++group.step;
  group.state = truth_->Extend(key.first, group.state, group.step, key.second);
  best_[key.first] = std::max(best_step(key.first), group.step);
  truth_->Count("steps");
  if (Tells(key.first)) TellStep(key, &group);
  for (auto& [rank, member] : group.members) {
    timeline_->After(Milliseconds(timeline_->random().Between(1, 25)), "capture",
                     [capture = member.capture, state = group.state, step = group.step] {
                       capture(state, step);
                     });
  }
  Schedule(key);
}

// --- the ledger ---

bool Training::Tells(const JobId& job) const {
  return std::any_of(options_->jobs.begin(), options_->jobs.end(),
                     [&](const SimJob& j) { return j.spec.job == job && j.tells; });
}

void Training::TellBegin(const Key& key, Group* group) {
  Told& told = told_[key.first];
  // Its lines of what the newest group had done on another branch are taken back for good.
  if (!truth_->Descends(told.newest, group->state)) {
    told.torn = true;
    truth_->Count("branches gone on from that were left behind");
  }
  told.newest = group->state;
  told.generation = key.second;
  told.whole = false;
  std::vector<std::string> words = words_[{key.first, group->state}];
  std::string begin = fmt::format("begin {} {} {}", group->step + 1, key.second, kMicrobatches);
  for (const auto& [rank, member] : group->members) {
    begin += fmt::format(" {}-{}@{}", kMicrobatches * rank / group->world_size,
                         kMicrobatches * (rank + 1) / group->world_size, rank);
  }
  words.push_back(std::move(begin));
  for (std::string& word : words) Tell(group, std::move(word));
}

void Training::TellStep(const Key& key, Group* group) {
  Forget(group);
  Tell(group, fmt::format("step {} {} {:x} {:x} =", group->step, key.second,
                          static_cast<std::uint32_t>(group->state), group->state));
  words_[{key.first, group->state}] = group->words;
  if (Told& told = told_[key.first]; told.generation == key.second) told.newest = group->state;
}

void Training::Tell(Group* group, std::string word) {
  const auto first = group->members.find(0);
  if (first != group->members.end()) first->second.tell(word);
  group->words.push_back(std::move(word));
}

void Training::Forget(Group* group) {
  const auto first = group->members.find(0);
  const std::uint64_t known = first == group->members.end() ? 0 : first->second.acknowledged();
  for (; !group->words.empty() && group->first_word <= known; ++group->first_word) {
    group->words.erase(group->words.begin());
  }
}

// Rank 0 ends when all it told is durable, or its patience is over.
void Training::EndTelling(const Key& key, Timestamp give_up) {
  Group& group = groups_.at(key);
  const auto first = group.members.find(0);
  if (first == group.members.end()) return;
  Forget(&group);
  if (!group.words.empty() && timeline_->now() < give_up) {
    timeline_->After(Milliseconds(20), "told?", [this, key, give_up] { EndTelling(key, give_up); });
    return;
  }
  truth_->Count(group.words.empty() ? "ledgers told to the end" : "ledgers not told to the end");
  told_[key.first].whole = group.words.empty();
  first->second.leave(0);
}

void Training::Acknowledged(const JobId& job, const std::string& word) {
  long long step = 0;
  unsigned long long generation = 0;
  if (std::sscanf(word.c_str(), "step %lld %llu", &step, &generation) != 2) return;
  auto& newest = told_[job].acknowledged;
  newest = std::max(newest, std::pair<Generation, Step>(generation, step));
  truth_->Count("lines acknowledged");
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
