#include "checkpoint/core/placement.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <tuple>
#include <utility>

#include "checkpoint/core/layout.h"
#include "checkpoint/core/spread.h"
#include "proto/base/check.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint32_t kSearchBudget = 100'000;  // looks for the best left-over group
constexpr std::uint32_t kMendBudget = 20'000;     // trades looked at
constexpr std::uint32_t kFewNodes = 64;           // up to here other starts are tried, too
constexpr std::uint32_t kStarts = 24;

// A placement of positions, to which nodes are dealt. A bucket's positions lie together.
struct Design {
  HostSets hosts;                      // by position
  std::vector<std::uint32_t> buckets;  // sizes, in the order of positions
  std::string shape;
};

void AddGroup(Design* d, std::uint32_t m) {
  const auto base = static_cast<std::uint32_t>(d->hosts.size());
  std::vector<std::uint32_t> set(m);
  std::iota(set.begin(), set.end(), base);
  d->hosts.insert(d->hosts.end(), m, set);
  d->buckets.push_back(m);
}

void AddRing(Design* d, std::uint32_t size, std::uint32_t m) {
  const auto base = static_cast<std::uint32_t>(d->hosts.size());
  for (std::uint32_t i = 0; i < size; ++i) {
    std::vector<std::uint32_t> set;
    for (std::uint32_t j = 0; j < m; ++j) set.push_back(base + (i + j) % size);
    std::sort(set.begin(), set.end());
    d->hosts.push_back(std::move(set));
  }
  d->buckets.push_back(size);
}

// A ring of blocks of gcd(size, m) nodes: what is known without a search.
HostSets BlockRing(std::uint32_t size, std::uint32_t m) {
  const std::uint32_t block = std::gcd(size, m);
  HostSets hosts;
  for (std::uint32_t i = 0; i < size; ++i) {
    std::vector<std::uint32_t> set;
    for (std::uint32_t j = 0; j < m; ++j) set.push_back((i / block * block + j) % size);
    std::sort(set.begin(), set.end());
    hosts.push_back(std::move(set));
  }
  return hosts;
}

// The last m + N%m nodes, or m more of them where that saves a host set.
Design Balanced(std::uint32_t n, std::uint32_t m) {
  std::uint32_t groups = n / m;
  HostSets rest;
  if (n % m != 0) {
    const std::uint32_t size = m + n % m;
    rest = BlockRing(size, m);
    const HostSets found = m <= 8 ? FewestHostSets(size, m, kSearchBudget) : HostSets();
    if (!found.empty() && DistinctSets(found) < DistinctSets(rest)) rest = found;
    --groups;
    // Nothing is gained for m <= 3; beyond 5 the search is too long.
    const bool larger = groups > 0 && (m == 4 || m == 5);
    const HostSets more = larger ? FewestHostSets(size + m, m, kSearchBudget) : HostSets();
    if (!more.empty() && DistinctSets(more) < DistinctSets(rest) + 1) {
      rest = more;
      --groups;
    }
  }
  Design d;
  d.shape = rest.empty() ? (m == 1 ? "alone" : "group") : "mixed";
  for (std::uint32_t g = 0; g < groups; ++g) AddGroup(&d, m);
  const auto base = static_cast<std::uint32_t>(d.hosts.size());
  if (!rest.empty()) d.buckets.push_back(static_cast<std::uint32_t>(rest.size()));
  for (std::vector<std::uint32_t>& set : rest) {
    for (std::uint32_t& v : set) v += base;
    d.hosts.push_back(std::move(set));
  }
  return d;
}

Design Borrowed(std::uint32_t n, std::uint32_t m, std::uint32_t cap) {
  const std::uint32_t groups = n / m, left = n % m;
  Design balanced = Balanced(n, m);
  const std::uint32_t share = std::min(left, cap - m);  // left-over nodes with one host set
  if (share == 0) return balanced;
  const std::uint32_t sets = (left + share - 1) / share;
  if (sets * m - left > groups * m || groups + sets >= DistinctSets(balanced.hosts)) {
    return balanced;
  }
  Design d;
  d.shape = "borrowed";
  for (std::uint32_t g = 0; g < groups; ++g) AddGroup(&d, m);
  std::uint32_t lender = groups * m;
  for (std::uint32_t done = 0; done < left;) {
    const std::uint32_t count = std::min(share, left - done);
    std::vector<std::uint32_t> set;
    for (std::uint32_t i = 0; i < m - count; ++i) set.push_back(--lender);
    for (std::uint32_t i = 0; i < count; ++i) set.push_back(groups * m + done + i);
    std::sort(set.begin(), set.end());
    d.hosts.insert(d.hosts.end(), count, set);
    done += count;
  }
  d.buckets.back() += left;  // beside those that lend
  return d;
}

Design MakeDesign(Strategy strategy, std::uint32_t n, std::uint32_t m, std::uint32_t cap) {
  Design d;
  switch (strategy) {
    case Strategy::kBalanced: return Balanced(n, m);
    case Strategy::kMaxSurvival: return Borrowed(n, m, cap);
    case Strategy::kGemini:
      if (n % m == 0) return Balanced(n, m);
      for (std::uint32_t g = 0; g + 1 < n / m; ++g) AddGroup(&d, m);
      AddRing(&d, m + n % m, m);
      d.shape = "mixed";
      return d;
    case Strategy::kRing:
      AddRing(&d, n, m);
      d.shape = n == m ? "group" : "ring";
      return d;
  }
  return d;
}

struct Scene {
  const PlacementInput& input;
  const Domains& domains;
  std::uint32_t m = 0, cap = 0;
};

// Trades places, and where nodes may hold more than m copies sends copies elsewhere, as long as
// fewer copies lie badly. Only `movable` trade.
void Mend(const Scene& scene, const std::vector<std::uint32_t>& movable, Layout* layout) {
  std::uint32_t budget = kMendBudget;
  const auto better = [](const Cost& a, const Cost& b) {
    return std::tie(a.fatal, a.inside) < std::tie(b.fatal, b.inside);
  };
  const auto improve = [&](std::uint32_t v) {
    const Cost before = layout->cost();
    const std::vector<std::uint32_t> set = layout->hosts()[v];
    for (const std::uint32_t x : set) {
      if (!std::binary_search(movable.begin(), movable.end(), x)) continue;
      for (const std::uint32_t y : movable) {
        if (budget == 0) return false;
        if (std::binary_search(set.begin(), set.end(), y)) continue;
        --budget;
        layout->Swap(x, y);
        if (better(layout->cost(), before)) return true;
        layout->Swap(x, y);
      }
    }
    if (scene.cap <= scene.m) return false;
    for (const std::uint32_t x : set) {
      if (x == v) continue;
      for (std::uint32_t y = 0; y < scene.input.nodes; ++y) {
        if (budget == 0) return false;
        if (layout->Held(y) >= scene.cap || std::binary_search(set.begin(), set.end(), y)) continue;
        --budget;
        std::vector<std::uint32_t> other = set;
        *std::find(other.begin(), other.end(), x) = y;
        std::sort(other.begin(), other.end());
        layout->Rehost(v, std::move(other));
        if (better(layout->cost(), before)) return true;
        layout->Rehost(v, set);
      }
    }
    return false;
  };
  for (bool progress = layout->cost().fatal > 0; progress && budget > 0;) {
    progress = false;
    for (const std::uint32_t v : movable) {
      while (layout->cost().fatal > 0 && layout->Inside(v) && improve(v)) progress = true;
    }
    progress = progress && layout->cost().fatal > 0;
  }
  if (scene.cap <= scene.m) return;
  // A host set of one node's own that another could serve as well is one too many.
  for (const std::uint32_t v : movable) {
    const std::vector<std::uint32_t> set = layout->hosts()[v];
    const auto shared = [&](const std::vector<std::uint32_t>& s) {
      return std::any_of(s.begin(), s.end(),
                         [&](std::uint32_t x) { return x != v && layout->hosts()[x] == s; });
    };
    if (shared(set)) continue;
    const std::vector<std::uint32_t> held = layout->HeldBy(v);
    for (const std::uint32_t owner : held) {
      const std::vector<std::uint32_t> other = layout->hosts()[owner];
      const bool room = std::all_of(other.begin(), other.end(), [&](std::uint32_t x) {
        return layout->Held(x) < scene.cap || std::binary_search(set.begin(), set.end(), x);
      });
      if (owner == v || other == set || !room) continue;
      const Cost before = layout->cost();
      layout->Rehost(v, other);
      if (!better(before, layout->cost())) break;
      layout->Rehost(v, set);
    }
  }
}

std::uint64_t Kept(const PlacementInput& input, const HostSets& hosts, std::uint32_t node) {
  if (input.previous.empty()) return 0;
  const auto& before = input.previous[node];
  return static_cast<std::uint64_t>(
      std::count_if(hosts[node].begin(), hosts[node].end(), [&](std::uint32_t v) {
        return v != node && std::find(before.begin(), before.end(), v) != before.end();
      }));
}

// Trades of places that keep more copies where they are and make nothing worse.
void Settle(const Scene& scene, const std::vector<std::uint32_t>& movable, Layout* layout) {
  if (scene.input.previous.empty() || movable.size() > kFewNodes) return;
  const auto kept = [&] {
    std::uint64_t sum = 0;
    for (const std::uint32_t v : movable) sum += Kept(scene.input, layout->hosts(), v);
    return sum;
  };
  std::uint64_t most = kept();
  for (bool progress = true; progress;) {
    progress = false;
    for (const std::uint32_t a : movable) {
      for (const std::uint32_t b : movable) {
        if (a >= b) continue;
        const Cost before = layout->cost();
        layout->Swap(a, b);
        const std::uint64_t now = layout->cost() <= before ? kept() : 0;
        if (now > most) {
          most = now;
          progress = true;
        } else {
          layout->Swap(a, b);
        }
      }
    }
  }
}

// A new placement of `nodes` (ascending); `fixed` has the others' host sets, which stay.
Layout PlaceNew(const Scene& scene, const std::vector<std::uint32_t>& nodes, const HostSets& fixed,
                std::string* shape) {
  const auto n = static_cast<std::uint32_t>(nodes.size());
  const Design design = MakeDesign(scene.input.strategy, n, scene.m, scene.cap);
  *shape = design.shape;
  const auto build = [&](const Design& d, const std::vector<std::uint32_t>& at) {
    HostSets hosts = fixed;
    for (std::uint32_t p = 0; p < n; ++p) {
      std::vector<std::uint32_t> set;
      for (const std::uint32_t q : d.hosts[p]) set.push_back(at[q]);
      std::sort(set.begin(), set.end());
      hosts[at[p]] = std::move(set);
    }
    Layout layout(scene.domains, std::move(hosts));
    Mend(scene, nodes, &layout);
    return layout;
  };
  const bool plain = scene.input.levels.empty() && scene.input.together.empty();
  const std::vector<std::uint32_t> order =
      plain ? nodes : ByDomain(scene.input.levels, scene.input.together, nodes);
  Layout best = build(design, plain ? nodes : Deal(design.buckets, order));
  if (best.cost().fatal > 0 && n <= kFewNodes) {
    // Other starts, and a ring, which needs fewer pairs that may be together.
    Design ring;
    AddRing(&ring, n, scene.m);
    ring.shape = "ring";
    for (std::uint32_t start = 0; start < kStarts && best.cost().fatal > 0; ++start) {
      const bool round = start % 3 == 2;
      std::vector<std::uint32_t> at = order;
      Random random(start + 1);
      for (std::size_t i = at.size(); i > 1; --i) std::swap(at[i - 1], at[random.Below(i)]);
      const Design& from = round ? ring : design;
      Layout other = build(from, at);
      if (other.cost().fatal >= best.cost().fatal) continue;
      best = std::move(other);
      *shape = from.shape;
    }
  }
  Settle(scene, nodes, &best);
  return best;
}

// Closed groups of `previous` that may stay: all there, m nodes, not inside a domain.
std::vector<std::vector<std::uint32_t>> Closed(const Scene& scene) {
  std::vector<std::vector<std::uint32_t>> out;
  const PlacementInput& input = scene.input;
  const auto sorted = [&](std::uint32_t v) {
    std::vector<std::uint32_t> set = input.previous[v];
    std::sort(set.begin(), set.end());
    return set;
  };
  for (std::uint32_t v = 0; v < input.nodes && !input.previous.empty(); ++v) {
    const std::vector<std::uint32_t> set = sorted(v);
    if (set.size() != scene.m || set.front() != v) continue;
    const bool closed =
        std::all_of(set.begin(), set.end(), [&](std::uint32_t x) { return sorted(x) == set; });
    if (!closed || std::adjacent_find(set.begin(), set.end()) != set.end()) continue;
    HostSets alone(input.nodes);
    for (const std::uint32_t x : set) alone[x] = set;
    if (Layout(scene.domains, std::move(alone)).cost().fatal == 0) out.push_back(set);
  }
  return out;
}

bool Usable(const Scene& scene, const HostSets& hosts) {
  std::vector<std::uint32_t> held(scene.input.nodes, 0);
  for (std::uint32_t v = 0; v < scene.input.nodes; ++v) {
    if (hosts[v].size() != scene.m || !std::binary_search(hosts[v].begin(), hosts[v].end(), v) ||
        std::adjacent_find(hosts[v].begin(), hosts[v].end()) != hosts[v].end()) {
      return false;
    }
    for (const std::uint32_t x : hosts[v]) {
      if (++held[x] > scene.cap) return false;
    }
  }
  return true;
}

// How bad for the purpose of keeping what there is.
std::pair<std::uint32_t, std::uint32_t> Grade(const Layout& layout) {
  return {layout.cost().fatal, DistinctSets(layout.hosts())};
}

// The placement with the fewest moved copies that is as good as `fresh`.
Layout KeepWhatCanStay(const Scene& scene, Layout fresh, std::string* shape) {
  const PlacementInput& input = scene.input;
  if (input.previous.empty()) return fresh;
  HostSets before = input.previous;
  for (auto& set : before) std::sort(set.begin(), set.end());
  const auto grade = Grade(fresh);
  if (Usable(scene, before)) {
    Layout same(scene.domains, before);
    if (Grade(same) <= grade) return same;
  }
  const std::vector<std::vector<std::uint32_t>> closed = Closed(scene);
  const std::size_t count = closed.size();
  // All of them stay; or one does not, each in turn; or the first two, four, ... do not.
  std::vector<std::pair<std::size_t, std::size_t>> dissolve = {{0, 0}};
  for (std::size_t i = 0; i < std::min<std::size_t>(count, 32); ++i) dissolve.emplace_back(i, 1);
  for (std::size_t c = 2; c < count; c *= 2) dissolve.emplace_back(0, c);
  for (const auto& [from, length] : dissolve) {
    HostSets fixed(input.nodes);
    for (std::size_t g = 0; g < count; ++g) {
      if (g >= from && g < from + length) continue;
      for (const std::uint32_t v : closed[g]) fixed[v] = closed[g];
    }
    std::vector<std::uint32_t> rest;
    for (std::uint32_t v = 0; v < input.nodes; ++v) {
      if (fixed[v].empty()) rest.push_back(v);
    }
    if (rest.size() == input.nodes || (!rest.empty() && rest.size() < scene.m)) continue;
    std::string other;
    Layout layout =
        rest.empty() ? Layout(scene.domains, fixed) : PlaceNew(scene, rest, fixed, &other);
    if (Grade(layout) > grade) continue;
    if (!rest.empty()) *shape = other;
    return layout;
  }
  return fresh;
}

}  // namespace

Placement Place(const PlacementInput& input) {
  EVERSTEP_CHECK(input.nodes >= 1);
  EVERSTEP_CHECK(input.previous.empty() || input.previous.size() == input.nodes);
  for (const auto& level : input.levels) EVERSTEP_CHECK(level.size() == input.nodes);
  const std::uint32_t m = std::clamp<std::uint32_t>(input.copies, 1, input.nodes);
  std::uint32_t cap = std::max(input.max_held, m);
  if (input.strategy != Strategy::kMaxSurvival) {
    cap = m;
  } else if (input.max_held == 0) {
    cap = 2 * m - 1;
  }
  const Domains domains(input, m, cap);
  const Scene scene{input, domains, m, cap};
  std::vector<std::uint32_t> all(input.nodes);
  std::iota(all.begin(), all.end(), 0U);
  Placement out;
  Layout fresh = PlaceNew(scene, all, HostSets(input.nodes), &out.shape);
  const Layout layout = KeepWhatCanStay(scene, std::move(fresh), &out.shape);
  out.copies = m;
  out.hosts = layout.hosts();
  out.host_sets = DistinctSets(out.hosts);
  out.fatal = layout.Fatal();
  if (m > 1 && out.host_sets * m == input.nodes) out.shape = "group";
  for (std::uint32_t v = 0; v < input.nodes; ++v) {
    out.most_held = std::max(out.most_held, layout.Held(v));
    out.moved += m - 1 - static_cast<std::uint32_t>(Kept(input, out.hosts, v));
    std::vector<std::uint32_t>& set = out.hosts[v];
    std::rotate(set.begin(), std::find(set.begin(), set.end(), v),
                std::next(std::find(set.begin(), set.end(), v)));
  }
  return out;
}

const char* StrategyName(Strategy strategy) {
  switch (strategy) {
    case Strategy::kBalanced: return "balanced";
    case Strategy::kMaxSurvival: return "max_survival";
    case Strategy::kGemini: return "gemini";
    case Strategy::kRing: return "ring";
  }
  return "";
}

}  // namespace everstep::checkpoint
