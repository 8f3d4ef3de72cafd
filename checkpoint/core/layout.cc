#include "checkpoint/core/layout.h"

#include <algorithm>
#include <map>
#include <utility>

namespace everstep::checkpoint {

Domains::Domains(const PlacementInput& input, std::uint32_t copies, std::uint32_t cap)
    : of(input.nodes), levels(input.levels) {
  const auto add = [&](std::size_t level, std::uint32_t number,
                       const std::vector<std::uint32_t>& nodes) {
    const auto size = static_cast<std::uint32_t>(nodes.size());
    if (size < copies) return;
    // Each of its nodes needs one copy outside; a node outside holds at most cap - 1 of them.
    const std::uint64_t room =
        copies < 2 ? 0 : static_cast<std::uint64_t>(input.nodes - size) * (cap - 1);
    for (const std::uint32_t v : nodes) of[v].push_back(static_cast<std::uint32_t>(all.size()));
    all.push_back({static_cast<std::uint32_t>(level), number, size, size > room});
  };
  for (std::size_t l = 0; l < input.levels.size(); ++l) {
    std::map<std::uint32_t, std::vector<std::uint32_t>> members;
    for (std::uint32_t v = 0; v < input.nodes; ++v) {
      if (input.levels[l][v] != kNoDomain) members[input.levels[l][v]].push_back(v);
    }
    for (const auto& [number, nodes] : members) add(l, number, nodes);
  }
  for (std::uint32_t s = 0; s < input.together.size(); ++s) {
    std::vector<std::uint32_t> nodes = input.together[s];
    std::sort(nodes.begin(), nodes.end());
    nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
    add(input.levels.size(), s, nodes);
  }
}

Layout::Layout(const Domains& domains, HostSets hosts)
    : domains_(&domains),
      hosts_(std::move(hosts)),
      held_(hosts_.size()),
      inside_(domains.all.size()) {
  for (std::uint32_t v = 0; v < hosts_.size(); ++v) {
    if (!hosts_[v].empty()) Count(v, true);
  }
}

void Layout::Count(std::uint32_t node, bool add) {
  const std::vector<std::uint32_t>& set = hosts_[node];
  for (const std::uint32_t host : set) {
    std::vector<std::uint32_t>& held = held_[host];
    if (add) {
      held.push_back(node);
    } else {
      *std::find(held.begin(), held.end(), node) = held.back();
      held.pop_back();
    }
  }
  for (const std::uint32_t d : domains_->of[set.front()]) {
    const bool all = std::all_of(set.begin() + 1, set.end(), [&](std::uint32_t v) {
      return std::binary_search(domains_->of[v].begin(), domains_->of[v].end(), d);
    });
    if (!all) continue;
    const std::uint32_t before = inside_[d];
    inside_[d] = add ? before + 1 : before - 1;
    if (domains_->all[d].hopeless) continue;
    cost_.inside += inside_[d] - before;
    if (add && before == 0) ++cost_.fatal;
    if (!add && inside_[d] == 0) --cost_.fatal;
  }
  std::uint64_t close = 0;
  for (const std::vector<std::uint32_t>& level : domains_->levels) {
    for (std::size_t i = 0; i < set.size(); ++i) {
      for (std::size_t j = i + 1; j < set.size(); ++j) {
        close += level[set[i]] != kNoDomain && level[set[i]] == level[set[j]];
      }
    }
  }
  cost_.close += add ? close : ~close + 1;
}

bool Layout::Inside(std::uint32_t node) const {
  const std::vector<std::uint32_t>& set = hosts_[node];
  const auto& first = domains_->of[set.front()];
  return std::any_of(first.begin(), first.end(), [&](std::uint32_t d) {
    return !domains_->all[d].hopeless && inside_[d] > 0 &&
           std::all_of(set.begin() + 1, set.end(), [&](std::uint32_t v) {
             return std::binary_search(domains_->of[v].begin(), domains_->of[v].end(), d);
           });
  });
}

void Layout::Swap(std::uint32_t a, std::uint32_t b) {
  if (a == b) return;
  std::vector<std::uint32_t> owners = held_[a];
  owners.insert(owners.end(), held_[b].begin(), held_[b].end());
  std::sort(owners.begin(), owners.end());
  owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
  for (const std::uint32_t v : owners) Count(v, false);
  for (const std::uint32_t v : owners) {
    for (std::uint32_t& host : hosts_[v]) host = host == a ? b : host == b ? a : host;
    std::sort(hosts_[v].begin(), hosts_[v].end());
  }
  hosts_[a].swap(hosts_[b]);
  for (const std::uint32_t v : owners) Count(v, true);
}

void Layout::Rehost(std::uint32_t node, std::vector<std::uint32_t> set) {
  Count(node, false);
  hosts_[node] = std::move(set);
  Count(node, true);
}

std::vector<FatalDomain> Layout::Fatal() const {
  std::vector<FatalDomain> out;
  for (std::size_t d = 0; d < inside_.size(); ++d) {
    const Domains::Domain& domain = domains_->all[d];
    if (inside_[d] > 0) out.push_back({domain.level, domain.number, domain.nodes, inside_[d]});
  }
  return out;
}

std::uint32_t DistinctSets(const HostSets& hosts) {
  HostSets sets = hosts;
  std::sort(sets.begin(), sets.end());
  return static_cast<std::uint32_t>(std::unique(sets.begin(), sets.end()) - sets.begin());
}

}  // namespace everstep::checkpoint
