// No placement is better than ours: complete searches for N <= 12, m = 2..4.
//
// Better means, in this order: fewer domains whose loss alone loses state; fewer distinct host sets
// (at m losses each costs 1 / C(N, m), so this is the probability to survive them). What may be
// held is bounded by the same number as ours.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <set>

#include "checkpoint/core/placement.h"
#include "checkpoint/core/survival.h"
#include "proto/base/random.h"
#include "tests/property/drawn_domains.h"

namespace everstep::checkpoint {
namespace {

using Mask = std::uint32_t;

// Every node's host set drawn from all that contain it, no node holding more than `cap`: is there
// a choice with no more than `sets` distinct host sets, none of them inside a domain of `avoid`?
class Exhaustive {
 public:
  Exhaustive(std::uint32_t n, std::uint32_t m, std::uint32_t cap, std::vector<Mask> avoid)
      : n_(n), m_(m), cap_(cap), avoid_(std::move(avoid)), load_(n, 0) {
    for (Mask set = 0; set < Mask{1} << n; ++set) {
      if (std::popcount(set) != static_cast<int>(m)) continue;
      if (std::any_of(avoid_.begin(), avoid_.end(), [set](Mask d) { return (set & ~d) == 0; })) {
        continue;
      }
      all_.push_back(set);
    }
  }

  bool Possible(std::uint32_t sets) {
    used_.clear();
    looks_ = 0;
    return Assign(0, sets);
  }
  bool gave_up() const { return looks_ > kLooks; }

 private:
  static constexpr std::uint64_t kLooks = 30'000'000;

  bool Fits(Mask set) const {
    for (std::uint32_t v = 0; v < n_; ++v) {
      if ((set >> v & 1) != 0 && load_[v] >= cap_) return false;
    }
    return true;
  }
  void Load(Mask set, int by) {
    for (std::uint32_t v = 0; v < n_; ++v) {
      if ((set >> v & 1) != 0) load_[v] += static_cast<std::uint32_t>(by);
    }
  }
  // The next node takes a set that is used already, or a new one.
  bool Assign(std::uint32_t v, std::uint32_t left) {
    if (v == n_) return true;
    if (++looks_ > kLooks) return false;
    // A set in use has room for all its nodes only; what is left must be covered by new ones.
    std::uint32_t uncovered = 0;
    for (std::uint32_t w = v; w < n_; ++w) {
      uncovered +=
          std::none_of(used_.begin(), used_.end(), [w](Mask s) { return (s >> w & 1) != 0; });
    }
    if (uncovered > left * m_) return false;
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if ((used_[i] >> v & 1) == 0 || !Fits(used_[i])) continue;
      Load(used_[i], 1);
      const bool found = Assign(v + 1, left);
      Load(used_[i], -1);
      if (found) return true;
    }
    if (left == 0) return false;
    for (const Mask set : all_) {
      if ((set >> v & 1) == 0 || !Fits(set) ||
          std::find(used_.begin(), used_.end(), set) != used_.end()) {
        continue;
      }
      used_.push_back(set);
      Load(set, 1);
      const bool found = Assign(v + 1, left - 1);
      Load(set, -1);
      used_.pop_back();
      if (found) return true;
    }
    return false;
  }

  const std::uint32_t n_, m_, cap_;
  const std::vector<Mask> avoid_;
  std::vector<Mask> all_, used_;
  std::vector<std::uint32_t> load_;
  std::uint64_t looks_ = 0;
};

// Fewest blocks by plain enumeration of sizes and of who borrows whom; see block_design.cc for why
// that is every placement in which each node holds exactly m copies. Written anew here.
bool BlocksPossible(std::uint32_t n, std::uint32_t m, std::uint32_t blocks) {
  std::vector<std::uint32_t> sizes;
  const std::function<bool()> assign_all = [&] {
    const std::size_t q = sizes.size();
    std::vector<std::uint32_t> need;
    need.reserve(q);
    for (const std::uint32_t c : sizes) need.push_back(m - c);
    std::vector<std::size_t> block_of;
    for (std::size_t b = 0; b < q; ++b) block_of.insert(block_of.end(), sizes[b], b);
    std::set<std::pair<std::size_t, std::vector<std::uint32_t>>> dead;  // no use from here
    const std::function<bool(std::size_t)> node = [&](std::size_t v) {
      if (v == n) return std::all_of(need.begin(), need.end(), [](auto x) { return x == 0; });
      if (dead.count({v, need}) > 0) return false;
      const std::function<bool(std::size_t, std::uint32_t)> pick = [&](std::size_t b,
                                                                       std::uint32_t rest) {
        if (rest == 0) return node(v + 1);
        if (b == q) return false;
        if (b != block_of[v] && sizes[b] <= rest && need[b] > 0) {
          --need[b];
          const bool found = pick(b + 1, rest - sizes[b]);
          ++need[b];
          if (found) return true;
        }
        return pick(b + 1, rest);
      };
      if (pick(0, m - sizes[block_of[v]])) return true;
      dead.insert({v, need});
      return false;
    };
    return node(0);
  };
  const std::function<bool(std::uint32_t, std::uint32_t, std::uint32_t)> split =
      [&](std::uint32_t rest, std::uint32_t parts, std::uint32_t most) {
        if (parts == 0) return rest == 0 && assign_all();
        for (std::uint32_t c = std::min(most, rest); c > 0; --c) {
          sizes.push_back(c);
          if (split(rest - c, parts - 1, c)) return true;
          sizes.pop_back();
        }
        return false;
      };
  return split(n, blocks, m);
}

Mask MaskOf(const std::vector<std::uint32_t>& nodes) {
  Mask mask = 0;
  for (const std::uint32_t v : nodes) mask |= Mask{1} << v;
  return mask;
}

TEST(PlacementProperty, BalancedIsNotBeatenWithoutDomains) {
  for (std::uint32_t m = 2; m <= 4; ++m) {
    for (std::uint32_t n = m; n <= 12; ++n) {
      const Placement p = Place({.nodes = n, .copies = m});
      for (std::uint32_t q = 1; q < p.host_sets; ++q) {
        EXPECT_FALSE(BlocksPossible(n, m, q)) << n << " nodes, " << m << " copies: " << q
                                              << " host sets are possible, ours " << p.host_sets;
      }
      EXPECT_TRUE(BlocksPossible(n, m, p.host_sets));
    }
  }
}

// The same by trying every assignment of host sets, which needs no argument about blocks.
TEST(PlacementProperty, NeitherStrategyIsBeatenByAnyAssignment) {
  for (const Strategy s : {Strategy::kBalanced, Strategy::kMaxSurvival}) {
    for (std::uint32_t m = 2; m <= 4; ++m) {
      for (std::uint32_t n = m; n <= (m == 2 ? 9U : 8U); ++n) {
        const Placement p = Place({.nodes = n, .copies = m, .strategy = s});
        const std::uint32_t cap = s == Strategy::kBalanced ? m : 2 * m - 1;
        Exhaustive search(n, m, cap, {});
        EXPECT_FALSE(search.Possible(p.host_sets - 1)) << StrategyName(s) << " " << n << " " << m;
        EXPECT_FALSE(search.gave_up()) << n << " " << m;
      }
    }
  }
}

// A world of nested levels and sets that are evicted together.
PlacementInput DrawWorld(Random* random, std::uint32_t n, std::uint32_t m, Strategy strategy) {
  PlacementInput in{.nodes = n, .copies = m, .strategy = strategy};
  DrawDomains(random, n, &in);
  return in;
}

std::vector<Mask> DomainsOf(const PlacementInput& in) {
  std::vector<Mask> out;
  for (const auto& level : in.levels) {
    std::map<std::uint32_t, Mask> members;
    for (std::uint32_t v = 0; v < in.nodes; ++v) members[level[v]] |= Mask{1} << v;
    for (const auto& [number, mask] : members) out.push_back(mask);
  }
  for (const auto& set : in.together) out.push_back(MaskOf(set));
  return out;
}

// Every subset of the domains with one fatal domain fewer than ours: can the rest be avoided?
TEST(PlacementProperty, NoAssignmentHasFewerFatalDomains) {
  Random random(20);
  int with_fatal = 0, worlds = 0, proved = 0;
  for (int round = 0; round < 2000; ++round) {
    const auto m = static_cast<std::uint32_t>(2 + random.Below(3));
    const auto n = static_cast<std::uint32_t>(m + 1 + random.Below(12 - m));
    const Strategy s = random.Chance(500) ? Strategy::kBalanced : Strategy::kMaxSurvival;
    const PlacementInput in = DrawWorld(&random, n, m, s);
    const Placement p = Place(in);
    ++worlds;
    const std::vector<Mask> domains = DomainsOf(in);
    std::uint32_t fatal = 0;
    for (const Mask d : domains) {
      fatal += std::any_of(p.hosts.begin(), p.hosts.end(),
                           [d](const auto& set) { return (MaskOf(set) & ~d) == 0; });
    }
    ASSERT_EQ(fatal, p.fatal.size());
    if (fatal == 0) continue;
    ++with_fatal;
    const std::uint32_t cap = s == Strategy::kBalanced ? m : 2 * m - 1;
    for (Mask give_up = 0; give_up < Mask{1} << domains.size(); ++give_up) {
      if (std::popcount(give_up) != static_cast<int>(fatal) - 1) continue;
      std::vector<Mask> avoid;
      bool hopeless = false;
      for (std::size_t d = 0; d < domains.size(); ++d) {
        if ((give_up >> d & 1) != 0) continue;
        avoid.push_back(domains[d]);
        const auto size = static_cast<std::uint32_t>(std::popcount(domains[d]));
        hopeless = hopeless || size > (n - size) * (cap - 1);  // more than others can hold
      }
      if (hopeless) continue;
      Exhaustive search(n, m, cap, avoid);
      ASSERT_FALSE(search.Possible(n)) << "round " << round << ": " << n << " nodes, " << m
                                       << " copies, " << StrategyName(s) << ", ours has " << fatal;
      ASSERT_FALSE(search.gave_up());
      ++proved;
    }
  }
  EXPECT_GT(with_fatal, worlds / 5);
  EXPECT_GT(worlds - with_fatal, worlds / 5);
  EXPECT_GT(proved, 100);
}

// Where no domain stands in the way, its spread costs no host set.
TEST(PlacementProperty, SpreadCostsNoHostSetWhereLevelsAreEven) {
  for (std::uint32_t m = 2; m <= 4; ++m) {
    for (std::uint32_t n = 2 * m; n <= 48; ++n) {
      PlacementInput in{.nodes = n, .copies = m};
      in.levels.resize(2);
      for (std::uint32_t v = 0; v < n; ++v) {
        in.levels[0].push_back(v * (m + 1) / n);
        in.levels[1].push_back(v * (2 * m + 2) / n);
      }
      const Placement p = Place(in);
      EXPECT_TRUE(p.fatal.empty()) << n << " " << m;
      EXPECT_EQ(p.host_sets, Place({.nodes = n, .copies = m}).host_sets) << n << " " << m;
    }
  }
}

// Any m - 1 nodes may go, and what is kept of an older placement never costs that.
TEST(PlacementProperty, SurvivesAnyLossSmallerThanTheCopiesWhateverCameBefore) {
  Random random(3);
  for (int round = 0; round < 150; ++round) {
    const auto m = static_cast<std::uint32_t>(2 + random.Below(3));
    auto n = static_cast<std::uint32_t>(m + 1 + random.Below(14));
    const Strategy s = random.Chance(500) ? Strategy::kBalanced : Strategy::kMaxSurvival;
    PlacementInput in = DrawWorld(&random, n, m, s);
    for (int change = 0; change < 4; ++change) {
      const Placement p = Place(in);
      const auto safe = SurvivalByLosses(n, p.hosts, p.copies - 1);
      ASSERT_TRUE(safe.has_value());
      ASSERT_DOUBLE_EQ(safe->back(), 1);
      ASSERT_LE(p.most_held, s == Strategy::kBalanced ? m : 2 * m - 1);
      PlacementInput fresh = in;
      fresh.previous.clear();
      const Placement anew = Place(fresh);
      ASSERT_LE(p.fatal.size(), anew.fatal.size());
      if (p.fatal.size() == anew.fatal.size()) {
        ASSERT_LE(p.host_sets, anew.host_sets);
      }
      in.previous = p.hosts;  // one node is replaced by a new one of some other rack
      const auto gone = static_cast<std::uint32_t>(random.Below(n));
      for (std::uint32_t v = 0; v < n; ++v) {
        if (v == gone) in.previous[v].clear();
        std::erase_if(in.previous[v], [&](std::uint32_t x) { return x == gone && v != gone; });
      }
      in.levels[1][gone] = static_cast<std::uint32_t>(random.Below(n));
      if (in.together.empty()) {
        const Placement after = Place(in);
        ASSERT_LE(after.moved, n * (m - 1));
      }
    }
  }
}

}  // namespace
}  // namespace everstep::checkpoint
