#include "checkpoint/core/survival.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>
#include <utility>

#include "proto/base/check.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

using Polynomial = std::vector<long double>;  // coefficient k: safe losses of k nodes

constexpr std::size_t kMaxStates = 4096;
constexpr std::uint32_t kMaxOpenSets = 64;
constexpr std::uint32_t kMaxNodes = 16'000;

long double Binomial(std::uint32_t n, std::uint32_t k) {
  if (k > n) return 0;
  long double value = 1;
  for (std::uint32_t i = 1; i <= std::min(k, n - k); ++i) {
    value =
        value * static_cast<long double>(n - std::min(k, n - k) + i) / static_cast<long double>(i);
  }
  return value;
}

Polynomial Multiply(const Polynomial& a, const Polynomial& b, std::size_t size) {
  Polynomial out(std::min(size, a.size() + b.size() - 1), 0);
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size() && i + j < out.size(); ++j) out[i + j] += a[i] * b[j];
  }
  return out;
}

// Safe losses among the nodes of sets that hang together; nodes are swept in ascending order.
std::optional<Polynomial> Sweep(const std::vector<const NodeSet*>& sets, std::size_t size) {
  std::map<std::uint32_t, std::vector<std::uint32_t>> of;  // node: sets, as indices
  for (std::uint32_t s = 0; s < sets.size(); ++s) {
    for (const std::uint32_t v : *sets[s]) of[v].push_back(s);
  }
  std::vector<std::uint32_t> slot(sets.size(), kMaxOpenSets), seen(sets.size(), 0);
  std::uint64_t used = 0;
  // State: the open sets of which every node so far is lost, a bit each.
  std::map<std::uint64_t, Polynomial> states = {{0, {1}}};
  for (const auto& [v, mine] : of) {
    std::uint64_t opened = 0, here = 0, closed = 0;
    for (const std::uint32_t s : mine) {
      if (seen[s]++ == 0) {
        const auto free = static_cast<std::uint32_t>(std::countr_one(used));
        if (free >= kMaxOpenSets) return std::nullopt;
        slot[s] = free;
        used |= 1ULL << free;
        opened |= 1ULL << free;
      }
      here |= 1ULL << slot[s];
      if (seen[s] == sets[s]->size()) closed |= 1ULL << slot[s];
    }
    std::map<std::uint64_t, Polynomial> next;
    const auto add = [&](std::uint64_t state, const Polynomial& p, std::size_t shift) {
      Polynomial& to = next[state];
      to.resize(std::max(to.size(), std::min(size, p.size() + shift)), 0);
      for (std::size_t i = 0; i < p.size() && i + shift < to.size(); ++i) to[i + shift] += p[i];
    };
    for (const auto& [state, p] : states) {
      add(state & ~here, p, 0);  // v is not lost
      const std::uint64_t lost = state | opened;
      if ((lost & closed) == 0) add(lost, p, 1);
    }
    if (next.size() > kMaxStates) return std::nullopt;
    used &= ~closed;
    states.swap(next);
  }
  Polynomial out;
  for (const auto& [state, p] : states) {
    out.resize(std::max(out.size(), p.size()), 0);
    for (std::size_t i = 0; i < p.size(); ++i) out[i] += p[i];
  }
  return out;
}

// State that no node holds is lost already. The smallest set is the first.
bool HasEmpty(const std::vector<NodeSet>& minimal) {
  return !minimal.empty() && minimal.front().empty();
}

// Sets that hang together by shared nodes.
std::vector<std::vector<const NodeSet*>> Components(const std::vector<NodeSet>& sets) {
  std::vector<std::uint32_t> root(sets.size());
  std::iota(root.begin(), root.end(), 0U);
  const auto find = [&root](std::uint32_t s) {
    while (root[s] != s) s = root[s] = root[root[s]];
    return s;
  };
  std::map<std::uint32_t, std::uint32_t> first;  // node: a set that has it
  for (std::uint32_t s = 0; s < sets.size(); ++s) {
    for (const std::uint32_t v : sets[s]) {
      const auto [it, is_new] = first.emplace(v, s);
      if (!is_new) root[find(s)] = find(it->second);
    }
  }
  std::map<std::uint32_t, std::vector<const NodeSet*>> by_root;
  for (std::uint32_t s = 0; s < sets.size(); ++s) by_root[find(s)].push_back(&sets[s]);
  std::vector<std::vector<const NodeSet*>> out;
  out.reserve(by_root.size());
  for (auto& [r, members] : by_root) out.push_back(std::move(members));
  return out;
}

// From the safe losses among nodes that share a fate with others, and `free` ones that do not.
std::vector<double> Probabilities(const Polynomial& grouped, std::uint32_t free,
                                  std::uint32_t nodes, std::size_t size) {
  Polynomial rest;
  for (std::uint32_t a = 0; a <= free && a < size; ++a) rest.push_back(Binomial(free, a));
  const Polynomial safe = Multiply(grouped, rest, size);
  std::vector<double> out(size, 0);
  long double all = 1;  // C(nodes, k)
  for (std::uint32_t k = 0; k < size; ++k) {
    if (k > 0) all = all * static_cast<long double>(nodes - k + 1) / static_cast<long double>(k);
    if (k < safe.size()) out[k] = static_cast<double>(safe[k] / all);
  }
  return out;
}

Estimate Wilson(std::uint64_t safe, std::uint64_t drawn) {
  constexpr double kZ = 1.959964;  // 95 %
  const auto n = static_cast<double>(drawn);
  const double p = static_cast<double>(safe) / n;
  const double centre = (p + kZ * kZ / (2 * n)) / (1 + kZ * kZ / n);
  const double half = kZ / (1 + kZ * kZ / n) * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n));
  return {p, std::max(0.0, centre - half), std::min(1.0, centre + half), false, drawn};
}

// k of 0 .. n-1, uniformly, in any order. Floyd's algorithm.
NodeSet Draw(std::uint32_t n, std::uint32_t k, Random* random) {
  NodeSet out;
  for (std::uint32_t j = n - k; j < n; ++j) {
    const auto t = static_cast<std::uint32_t>(random->Below(j + 1));
    out.push_back(std::find(out.begin(), out.end(), t) == out.end() ? t : j);
  }
  return out;
}

// Over all choices of k out of n things, or a sample of them.
template <typename Safe>
Estimate OverChoices(std::uint32_t n, std::uint32_t k, const EstimateLimits& limits,
                     const Safe& safe) {
  const long double all = Binomial(n, k);
  if (all > static_cast<long double>(limits.enumerate)) {
    EVERSTEP_CHECK(limits.samples > 0);
    Random random(limits.seed);
    std::uint64_t good = 0;
    for (std::uint64_t i = 0; i < limits.samples; ++i) good += safe(Draw(n, k, &random));
    return Wilson(good, limits.samples);
  }
  NodeSet choice(k);
  std::iota(choice.begin(), choice.end(), 0U);
  std::uint64_t good = 0, looked = 0;
  for (bool more = true; more;) {
    ++looked;
    good += safe(choice);
    more = false;
    for (std::uint32_t i = k; i-- > 0;) {
      if (choice[i] == n - k + i) continue;
      ++choice[i];
      for (std::uint32_t j = i + 1; j < k; ++j) choice[j] = choice[j - 1] + 1;
      more = true;
      break;
    }
  }
  const double p = static_cast<double>(good) / static_cast<double>(looked);
  return {p, p, p, true, looked};
}

}  // namespace

std::vector<NodeSet> MinimalHostSets(const std::vector<NodeSet>& hosts) {
  std::vector<NodeSet> sets = hosts;
  for (NodeSet& set : sets) std::sort(set.begin(), set.end());
  std::sort(sets.begin(), sets.end(), [](const NodeSet& a, const NodeSet& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });
  sets.erase(std::unique(sets.begin(), sets.end()), sets.end());
  if (sets.empty() || sets.front().size() == sets.back().size()) return sets;
  std::vector<NodeSet> out;
  for (NodeSet& set : sets) {
    const bool covered = std::any_of(out.begin(), out.end(), [&set](const NodeSet& small) {
      return std::includes(set.begin(), set.end(), small.begin(), small.end());
    });
    if (!covered) out.push_back(std::move(set));
  }
  return out;
}

std::optional<std::vector<double>> SurvivalByLosses(std::uint32_t nodes,
                                                    const std::vector<NodeSet>& hosts,
                                                    std::uint32_t max_k) {
  EVERSTEP_CHECK(nodes <= kMaxNodes);
  const std::size_t size = std::min(max_k, nodes) + std::size_t{1};
  const std::vector<NodeSet> sets = MinimalHostSets(hosts);
  if (HasEmpty(sets)) return std::vector<double>(size, 0);
  Polynomial safe = {1};
  std::uint32_t free = nodes;  // in no host set
  for (const std::vector<const NodeSet*>& component : Components(sets)) {
    Polynomial factor;
    if (component.size() == 1) {
      const auto m = static_cast<std::uint32_t>(component.front()->size());
      for (std::uint32_t a = 0; a < m; ++a) factor.push_back(Binomial(m, a));
      free -= m;
    } else {
      NodeSet members;
      for (const NodeSet* set : component) members.insert(members.end(), set->begin(), set->end());
      std::sort(members.begin(), members.end());
      free -=
          static_cast<std::uint32_t>(std::unique(members.begin(), members.end()) - members.begin());
      const std::optional<Polynomial> swept = Sweep(component, size);
      if (!swept) return std::nullopt;
      factor = *swept;
    }
    safe = Multiply(safe, factor, size);
  }
  return Probabilities(safe, free, nodes, size);
}

Estimate Survival(std::uint32_t nodes, const std::vector<NodeSet>& hosts, std::uint32_t k,
                  const EstimateLimits& limits) {
  k = std::min(k, nodes);
  if (const auto exact = SurvivalByLosses(nodes, hosts, k)) {
    return {exact->back(), exact->back(), exact->back(), true, 0};
  }
  std::vector<NodeSet> each(nodes);
  for (std::uint32_t v = 0; v < nodes; ++v) each[v] = {v};
  return SurvivalByDomain(hosts, each, k, limits);
}

Estimate SurvivalByDomain(const std::vector<NodeSet>& hosts, const std::vector<NodeSet>& domains,
                          std::uint32_t k, const EstimateLimits& limits) {
  const auto count = static_cast<std::uint32_t>(domains.size());
  k = std::min(k, count);
  std::map<std::uint32_t, NodeSet> of;  // node: its domains
  for (std::uint32_t d = 0; d < count; ++d) {
    for (const std::uint32_t v : domains[d]) of[v].push_back(d);
  }
  // A host set falls when each of its nodes has a lost domain: alike are those whose nodes lie in
  // the same domains, and one with a node in no domain never falls.
  std::vector<std::vector<NodeSet>> patterns;
  const std::vector<NodeSet> sets = MinimalHostSets(hosts);
  if (HasEmpty(sets)) return {0, 0, 0, true, 0};
  for (const NodeSet& set : sets) {
    std::vector<NodeSet> pattern;
    for (const std::uint32_t v : set) {
      const auto found = of.find(v);
      if (found == of.end()) break;
      pattern.push_back(found->second);
    }
    if (pattern.size() != set.size()) continue;
    for (NodeSet& d : pattern) d.erase(std::unique(d.begin(), d.end()), d.end());
    std::sort(pattern.begin(), pattern.end());
    pattern.erase(std::unique(pattern.begin(), pattern.end()), pattern.end());
    patterns.push_back(std::move(pattern));
  }
  std::sort(patterns.begin(), patterns.end());
  patterns.erase(std::unique(patterns.begin(), patterns.end()), patterns.end());
  // Only those whose first node lies in a lost domain can fall.
  std::vector<std::vector<const std::vector<NodeSet>*>> first_in(count);
  for (const std::vector<NodeSet>& pattern : patterns) {
    for (const std::uint32_t d : pattern.front()) first_in[d].push_back(&pattern);
  }
  std::vector<bool> lost(count, false);
  const auto falls = [&lost](const std::vector<NodeSet>* pattern) {
    return std::all_of(pattern->begin(), pattern->end(), [&lost](const NodeSet& any) {
      return std::any_of(any.begin(), any.end(), [&lost](std::uint32_t d) { return lost[d]; });
    });
  };
  return OverChoices(count, k, limits, [&](const NodeSet& choice) {
    for (const std::uint32_t d : choice) lost[d] = true;
    const bool safe = std::none_of(choice.begin(), choice.end(), [&](std::uint32_t d) {
      return std::any_of(first_in[d].begin(), first_in[d].end(), falls);
    });
    for (const std::uint32_t d : choice) lost[d] = false;
    return safe;
  });
}

NodeSet LostWith(const std::vector<NodeSet>& hosts, const NodeSet& failed) {
  NodeSet sorted = failed;
  std::sort(sorted.begin(), sorted.end());
  NodeSet out;
  for (std::uint32_t v = 0; v < hosts.size(); ++v) {
    const bool gone = std::all_of(hosts[v].begin(), hosts[v].end(), [&](std::uint32_t x) {
      return std::binary_search(sorted.begin(), sorted.end(), x);
    });
    if (gone) out.push_back(v);
  }
  return out;
}

std::vector<double> SurvivalByLosses(std::uint32_t nodes, const std::vector<LossGroup>& groups,
                                     std::uint32_t max_k) {
  EVERSTEP_CHECK(nodes <= kMaxNodes);
  const std::size_t size = std::min(max_k, nodes) + std::size_t{1};
  Polynomial safe = {1};
  std::uint32_t free = nodes;
  for (const LossGroup& group : groups) {
    const auto n = static_cast<std::uint32_t>(group.nodes.size());
    EVERSTEP_CHECK(n <= free);
    free -= n;
    Polynomial factor;
    for (std::uint32_t a = 0; a <= std::min(group.tolerates, n); ++a) {
      factor.push_back(Binomial(n, a));
    }
    safe = Multiply(safe, factor, size);
  }
  return Probabilities(safe, free, nodes, size);
}

Estimate SurvivalByDomain(const std::vector<LossGroup>& groups, const std::vector<NodeSet>& domains,
                          std::uint32_t k, const EstimateLimits& limits) {
  const auto count = static_cast<std::uint32_t>(domains.size());
  std::map<std::uint32_t, std::uint32_t> group_of;
  for (std::uint32_t g = 0; g < groups.size(); ++g) {
    for (const std::uint32_t v : groups[g].nodes) group_of[v] = g;
  }
  // Domains may overlap: a node is counted with the first that takes it.
  std::map<std::uint32_t, std::uint32_t> lost;  // node: of which choice
  std::vector<std::uint32_t> taken(groups.size());
  std::uint32_t choice_number = 0;
  return OverChoices(count, std::min(k, count), limits, [&](const NodeSet& choice) {
    ++choice_number;
    std::fill(taken.begin(), taken.end(), 0U);
    for (const std::uint32_t d : choice) {
      for (const std::uint32_t v : domains[d]) {
        const auto group = group_of.find(v);
        if (group == group_of.end() || std::exchange(lost[v], choice_number) == choice_number) {
          continue;
        }
        if (++taken[group->second] > groups[group->second].tolerates) return false;
      }
    }
    return true;
  });
}

NodeSet LostWith(const std::vector<LossGroup>& groups, const NodeSet& failed) {
  NodeSet sorted = failed;
  std::sort(sorted.begin(), sorted.end());
  NodeSet out;
  for (const LossGroup& group : groups) {
    NodeSet lost;
    std::copy_if(
        group.nodes.begin(), group.nodes.end(), std::back_inserter(lost),
        [&](std::uint32_t v) { return std::binary_search(sorted.begin(), sorted.end(), v); });
    if (lost.size() > group.tolerates) out.insert(out.end(), lost.begin(), lost.end());
  }
  std::sort(out.begin(), out.end());
  return out;
}

double CorollaryBound(std::uint32_t nodes, std::uint32_t m, std::uint32_t k) {
  if (k < m) return 1;
  if (k > nodes) return 0;
  const long double lost = static_cast<long double>(nodes) / static_cast<long double>(m) *
                           Binomial(nodes - m, k - m) / Binomial(nodes, k);
  return std::max(0.0, static_cast<double>(1 - lost));
}

}  // namespace everstep::checkpoint
