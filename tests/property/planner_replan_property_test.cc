// Plans after losses and joins: every node has one place, nothing moves that need not, and no plan
// is slower than what Oobleck's rules (simple, borrow, merge) would have made of the same faults.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <set>

#include <fmt/format.h>

#include "controller/planner/replan.h"
#include "controller/planner/transport.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

using models::Draw;

std::vector<NodeId> Nodes(std::uint32_t n) {
  std::vector<NodeId> nodes(n);
  std::iota(nodes.begin(), nodes.end(), 0u);
  return nodes;
}

std::set<NodeId> SeatedNodes(const Seated& seated) {
  std::set<NodeId> out;
  for (const auto& pipeline : seated.nodes) {
    for (const NodeId node : pipeline) {
      EXPECT_TRUE(out.insert(node).second) << "node " << node << " has two places";
    }
  }
  return out;
}

// The time of an iteration on pipelines of these sizes with the batch distributed as well as can
// be; nothing: a size without a template.
std::optional<std::int64_t> TimeOf(const Library& library, const std::vector<std::uint32_t>& sizes,
                                   std::uint64_t microbatches) {
  const auto q = static_cast<std::uint32_t>(sizes.size());
  std::int64_t slowest = 0;
  std::vector<std::uint32_t> share(q, 1);
  std::vector<const Template*> forms;
  for (const std::uint32_t size : sizes) {
    const auto t = std::find_if(library.templates.begin(), library.templates.end(),
                                [size](const Template& x) { return x.nodes == size; });
    if (t == library.templates.end()) return std::nullopt;
    forms.push_back(&*t);
  }
  const auto time = [&](std::size_t i, std::uint32_t m) {
    return forms[i]->TimeNs(m) + SyncNs(library.profile, *forms[i], q) + forms[i]->optimizer_ns;
  };
  for (std::uint64_t left = microbatches - q; left > 0; --left) {
    std::size_t best = 0;
    for (std::size_t i = 1; i < q; ++i) {
      if (time(i, share[i] + 1) < time(best, share[best] + 1)) best = i;
    }
    ++share[best];
  }
  for (std::size_t i = 0; i < q; ++i) slowest = std::max(slowest, time(i, share[i]));
  return slowest;
}

// Oobleck, section 5.2: drop the lost nodes; a group too small for a template borrows a node from
// the largest group that can spare one; if none can, it merges with the smallest other group.
// Returns the sizes of the groups; empty: fewer than f + 1 are left, where it gives up.
std::vector<std::uint32_t> OobleckRules(std::vector<std::uint32_t> groups, const Library& library) {
  std::erase(groups, 0u);
  const std::uint32_t n0 = library.least_nodes;
  const std::uint32_t largest = library.sizes.back();
  for (;;) {
    const auto small =
        std::find_if(groups.begin(), groups.end(), [n0](std::uint32_t g) { return g < n0; });
    if (small == groups.end()) break;
    const auto donor = std::max_element(groups.begin(), groups.end());
    if (*donor > n0) {
      --*donor;
      ++*small;
      continue;
    }
    const std::uint32_t size = *small;
    groups.erase(small);
    if (groups.empty()) return {};
    auto partner = std::min_element(groups.begin(), groups.end());
    *partner += size;
  }
  if (groups.size() < library.input.faults + 1) return {};
  for (const std::uint32_t g : groups) {
    if (g > largest) return {};
  }
  return groups;
}

TEST(ReplanProperty, TransportIsTheCheapest) {
  Random random(31);
  for (int round = 0; round < 400; ++round) {
    const auto n = static_cast<std::size_t>(random.Between(1, 3));
    const auto m = static_cast<std::size_t>(random.Between(1, 3));
    std::vector<std::int64_t> supply(n), demand(m, 0);
    std::vector<std::vector<std::int64_t>> cost(n, std::vector<std::int64_t>(m));
    std::vector<std::size_t> units;  // each unit's supply
    for (std::size_t i = 0; i < n; ++i) {
      supply[i] = random.Between(0, 2);
      for (std::int64_t u = 0; u < supply[i]; ++u) {
        units.push_back(i);
        ++demand[random.Below(m)];
      }
      for (auto& c : cost[i]) c = random.Between(0, 9);
    }
    // Every assignment of units to the slots of demands.
    std::vector<std::size_t> slots;
    for (std::size_t j = 0; j < m; ++j) slots.insert(slots.end(), demand[j], j);
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    std::sort(slots.begin(), slots.end());
    do {
      std::int64_t sum = 0;
      for (std::size_t u = 0; u < units.size(); ++u) sum += cost[units[u]][slots[u]];
      least = std::min(least, sum);
    } while (std::next_permutation(slots.begin(), slots.end()));
    const auto flow = CheapestTransport(supply, demand, cost);
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_EQ(std::accumulate(flow[i].begin(), flow[i].end(), std::int64_t{0}), supply[i]);
      for (std::size_t j = 0; j < m; ++j) {
        EXPECT_GE(flow[i][j], 0);
        sum += flow[i][j] * cost[i][j];
      }
    }
    for (std::size_t j = 0; j < m; ++j) {
      std::int64_t in = 0;
      for (std::size_t i = 0; i < n; ++i) in += flow[i][j];
      EXPECT_EQ(in, demand[j]);
    }
    ASSERT_EQ(sum, least) << "round " << round;
  }
}

// The least bytes of any seating of the same composition, by trying them all.
std::int64_t LeastMoved(const Library& library, const Replanned& made,
                        const std::vector<std::pair<NodeId, Range>>& has) {
  std::vector<Range> places;
  for (const Pipeline& p : made.seated.composition.pipelines) {
    const Template& t = library.templates[p.form];
    for (std::uint32_t i = 0; i < t.nodes; ++i) places.push_back(LayersAt(t, i));
  }
  std::vector<std::size_t> order(has.size());
  std::iota(order.begin(), order.end(), 0u);
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  do {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < places.size(); ++i) {
      for (std::uint32_t l = places[i].first; l < places[i].end; ++l) {
        const Range r = has[order[i]].second;
        if (l < r.first || l >= r.end) sum += library.profile.StateBytes(library.profile.layers[l]);
      }
    }
    least = std::min(least, sum);
  } while (std::next_permutation(order.begin(), order.end()));
  return least;
}

TEST(ReplanProperty, MovesTheFewestBytesThatItsCompositionCan) {
  Random random(32);
  int replanned = 0;
  for (int round = 0; round < 120; ++round) {
    const Profile p = Draw(&random, {.layers = 10, .tight_memory = random.Chance(700)});
    const Answer<Library> made = MakeLibrary(p, {.nodes = 8, .faults = 1});
    if (!made.ok()) continue;
    const Library& library = made.value();
    const auto first = Compose(library, {.nodes = 7, .microbatches = 40});
    if (!first.ok()) continue;
    const Seated now = Seat(first.value(), library, Nodes(7));
    ReplanInput change;
    if (random.Chance(700)) change.lost.push_back(static_cast<NodeId>(random.Below(7)));
    if (random.Chance(500)) change.joined.push_back(100);
    const Answer<Replanned> after = Replan(library, now, change);
    if (!after.ok()) continue;
    ++replanned;
    std::vector<std::pair<NodeId, Range>> has;
    for (std::size_t i = 0; i < now.nodes.size(); ++i) {
      const Template& t = library.templates[now.composition.pipelines[i].form];
      for (std::uint32_t place = 0; place < t.nodes; ++place) {
        const NodeId node = now.nodes[i][place];
        if (!change.lost.empty() && change.lost[0] == node) continue;
        has.emplace_back(node, LayersAt(t, place));
      }
    }
    for (const NodeId node : change.joined) has.emplace_back(node, Range{});
    ASSERT_EQ(after.value().moved_bytes, LeastMoved(library, after.value(), has))
        << "round " << round;
  }
  EXPECT_GT(replanned, 50);
}

TEST(ReplanProperty, NeverSlowerThanOoblecksRulesOverTenThousandFaultSequences) {
  Random random(33);
  int compared = 0, faster = 0, gave_up = 0, sequences = 0;
  double speed = 0;
  for (int model = 0; model < 25; ++model) {
    Profile p = Draw(&random, {.layers = static_cast<std::uint32_t>(random.Between(8, 24)),
                               .equal = random.Chance(400),
                               .tight_memory = random.Chance(800)});
    p.microbatch = 1;  // so that both have the same templates, one of each size
    const LibraryInput in{.nodes = static_cast<std::uint32_t>(random.Between(8, 20)),
                          .faults = static_cast<std::uint32_t>(random.Between(1, 2))};
    const Answer<Library> made = MakeLibrary(p, in);
    if (!made.ok()) continue;
    const Library& library = made.value();
    const std::uint64_t microbatches = 4 * in.nodes;
    const auto first = Compose(library, {.nodes = in.nodes, .microbatches = microbatches});
    ASSERT_TRUE(first.ok());
    const Seated start = Seat(first.value(), library, Nodes(in.nodes));
    for (int sequence = 0; sequence < 600; ++sequence) {
      ++sequences;
      Seated ours = start;
      // Theirs follows its own groups with the same number of lost nodes, drawn from all of them.
      std::vector<std::uint32_t> theirs;
      for (const auto& nodes : start.nodes) {
        theirs.push_back(static_cast<std::uint32_t>(nodes.size()));
      }
      std::uint32_t left = in.nodes;
      for (int event = 0; event < 4; ++event) {
        const auto lose = static_cast<std::uint32_t>(random.Between(1, in.faults));
        if (left < lose + library.fewest_nodes) break;
        std::vector<NodeId> alive;
        for (const NodeId node : SeatedNodes(ours)) alive.push_back(node);
        ReplanInput change;
        for (std::uint32_t i = 0; i < lose; ++i) {
          const std::size_t at = random.Below(alive.size());
          change.lost.push_back(alive[at]);
          alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(at));
          std::uint32_t victim = static_cast<std::uint32_t>(random.Below(left - i));
          for (std::uint32_t& group : theirs) {
            if (victim < group) {
              --group;
              break;
            }
            victim -= group;
          }
        }
        left -= lose;
        const Answer<Replanned> after = Replan(library, ours, change);
        ASSERT_TRUE(after.ok()) << after.refusal().what;
        ours = after.value().seated;
        ASSERT_EQ(SeatedNodes(ours), std::set<NodeId>(alive.begin(), alive.end()));
        ASSERT_TRUE(after.value().orphaned.empty()) << "f nodes were lost, f + 1 copies there";
        if (theirs.empty()) continue;
        theirs = OobleckRules(theirs, library);
        const auto time = theirs.empty() ? std::nullopt : TimeOf(library, theirs, microbatches);
        if (!time) {
          ++gave_up;
          theirs.clear();
          continue;
        }
        ++compared;
        ASSERT_LE(ours.composition.time_ns, *time)
            << fmt::format("{} nodes left, theirs {}", left, fmt::join(theirs, " "));
        faster += ours.composition.time_ns < *time;
        speed += static_cast<double>(*time) / static_cast<double>(ours.composition.time_ns);
      }
    }
  }
  fmt::print(
      "{} sequences, {} plans compared: faster in {}, on average {:.3f} times as fast; the "
      "rules gave up in {}\n",
      sequences, compared, faster, speed / compared, gave_up);
  EXPECT_GE(sequences, 10'000);
  EXPECT_GT(compared, 10'000);
  EXPECT_GT(faster, 1'000);
}

TEST(ReplanProperty, APriceForMovingKeepsWhatPaysToKeep) {
  Random random(34);
  int kept = 0;
  for (int round = 0; round < 80; ++round) {
    Profile p = Draw(&random, {.layers = 16, .tight_memory = random.Chance(500)});
    for (Layer& l : p.layers) l.parameters *= 1000;  // moves that take longer than steps
    const Answer<Library> made = MakeLibrary(p, {.nodes = 12, .faults = 1});
    if (!made.ok()) continue;
    const Library& library = made.value();
    const auto first = Compose(library, {.nodes = 12, .microbatches = 48});
    ASSERT_TRUE(first.ok());
    const Seated now = Seat(first.value(), library, Nodes(12));
    const NodeId lost = static_cast<NodeId>(random.Below(12));
    if (12u - 1 < library.fewest_nodes) continue;
    const Replanned fast = Replan(library, now, {.lost = {lost}, .joined = {}}).value();
    const std::int64_t horizon = 20 * fast.move_ns + 1;
    const Replanned priced =
        Replan(library, now, {.lost = {lost}, .joined = {}, .horizon_ns = horizon}).value();
    const auto worth = [horizon](const Replanned& r) {
      return static_cast<double>(r.seated.composition.time_ns) *
             (1 + static_cast<double>(r.move_ns) / static_cast<double>(horizon));
    };
    EXPECT_LE(worth(priced), worth(fast));
    EXPECT_GE(priced.seated.composition.time_ns, fast.seated.composition.time_ns);
    kept += priced.move_ns < fast.move_ns;
  }
  EXPECT_GT(kept, 0) << "the price never mattered";
}

// A pipeline's part of the nodes is the chance that a loss hits it.
TEST(ReplanProperty, ALossTakesItsPipelinesPartOfAStep) {
  Random random(35);
  for (int round = 0; round < 60; ++round) {
    const Profile p = Draw(&random, {.layers = 12});
    const Answer<Library> made = MakeLibrary(p, {.nodes = 10, .faults = 1});
    if (!made.ok()) continue;
    const Composition c =
        Compose(made.value(),
                {.nodes = 10, .microbatches = static_cast<std::uint64_t>(random.Between(12, 90))})
            .value();
    double expected = 0;
    for (std::uint32_t node = 0; node < c.nodes; ++node) {
      std::uint32_t before = 0;
      for (const Pipeline& pipeline : c.pipelines) {
        const std::uint32_t nodes = made.value().templates[pipeline.form].nodes;
        if (node >= before && node < before + nodes) {
          expected += static_cast<double>(pipeline.microbatches) /
                      static_cast<double>(c.microbatches) / c.nodes;
        }
        before += nodes;
      }
    }
    EXPECT_NEAR(LossShare(made.value(), c), expected, 1e-12);
  }
}

// With what a step under way and the next loss cost, a plan is never worse by that price than the
// fastest; and both prices change plans.
TEST(ReplanProperty, LostWorkIsWeighedBesideTimeAndMoves) {
  Random random(36);
  int by_done = 0, by_losses = 0;
  for (int round = 0; round < 120; ++round) {
    Profile p = Draw(&random, {.layers = 16, .tight_memory = random.Chance(500)});
    const Answer<Library> made = MakeLibrary(p, {.nodes = 12, .faults = 1});
    if (!made.ok() || 11 < made.value().fewest_nodes) continue;
    const Library& library = made.value();
    const Composition first = Compose(library, {.nodes = 12, .microbatches = 48}).value();
    const Seated now = Seat(first, library, Nodes(12));
    const NodeId lost = static_cast<NodeId>(random.Below(12));
    const std::int64_t step = first.time_ns;
    ReplanInput input{.lost = {lost}, .joined = {}, .horizon_ns = 2 * step};
    const Replanned moves_only = Replan(library, now, input).value();
    for (const Pipeline& pipeline : first.pipelines) {
      input.done.push_back(0.8 * pipeline.microbatches / static_cast<double>(first.microbatches));
    }
    input.loss_gap_ns = random.Chance(500) ? 0 : 2 * step;
    const auto worth = [&](const Replanned& r) {
      double again = 0.8;
      for (std::size_t i = 0; i < r.was.size(); ++i) {
        if (!r.was[i]) continue;
        EXPECT_EQ(r.seated.nodes[i], now.nodes[*r.was[i]]) << "unchanged";
        again -= input.done[*r.was[i]];
      }
      const auto time = static_cast<double>(r.seated.composition.time_ns);
      const auto horizon = static_cast<double>(input.horizon_ns);
      double cost = 1 + (static_cast<double>(r.move_ns) + again * time) / horizon;
      if (input.loss_gap_ns > 0) {
        cost += LossShare(library, r.seated.composition) * time /
                (2 * static_cast<double>(input.loss_gap_ns));
      }
      return time * cost;
    };
    const Replanned weighed = Replan(library, now, input).value();
    EXPECT_LE(worth(weighed), worth(moves_only) * (1 + 1e-12));
    by_done += input.loss_gap_ns == 0 && worth(weighed) < worth(moves_only);
    by_losses += input.loss_gap_ns != 0 && worth(weighed) < worth(moves_only);
  }
  EXPECT_GT(by_done, 0) << "what was done never mattered";
  EXPECT_GT(by_losses, 0) << "losses to come never mattered";
}

TEST(ReplanProperty, RealProfilesSurviveEverySingleLossFrom16NodesDownToTheirFewest) {
  const auto files = models::RealProfiles();
  if (files.empty()) GTEST_SKIP() << "no measured profiles: set EVERSTEP_TRACES";
  for (const auto& file : files) {
    Profile p = ParseProfile(models::ReadText(file)).value();
    p.device_memory_bytes = std::int64_t{32} << 30;
    const Answer<Library> made = MakeLibrary(p, {.nodes = 16, .faults = 1});
    ASSERT_TRUE(made.ok()) << file << ": " << made.refusal().what;
    const Library& library = made.value();
    Seated now =
        Seat(Compose(library, {.nodes = 16, .microbatches = 64}).value(), library, Nodes(16));
    std::int64_t before = 0;
    for (; now.composition.nodes > library.fewest_nodes;) {
      EXPECT_GE(now.composition.time_ns, before) << file << ": fewer nodes, yet faster";
      before = now.composition.time_ns;
      Seated next;
      for (const NodeId lost : SeatedNodes(now)) {
        const Answer<Replanned> after = Replan(library, now, {.lost = {lost}, .joined = {}});
        ASSERT_TRUE(after.ok()) << file << ": " << after.refusal().what;
        EXPECT_TRUE(after.value().orphaned.empty()) << file;
        EXPECT_EQ(SeatedNodes(after.value().seated).size(), now.composition.nodes - 1);
        next = after.value().seated;
      }
      now = std::move(next);
    }
    EXPECT_EQ(now.composition.nodes, library.fewest_nodes) << file;
  }
}

TEST(Replan, RefusesWhatCannotBe) {
  Random random(35);
  const Profile p = Draw(&random, {.layers = 8});
  const Library library = MakeLibrary(p, {.nodes = 6, .faults = 1}).value();
  const Seated now =
      Seat(Compose(library, {.nodes = 4, .microbatches = 16}).value(), library, Nodes(4));
  EXPECT_EQ(Replan(library, now, {.lost = {9}, .joined = {}}).refusal().what,
            "node 9 has no place");
  EXPECT_EQ(Replan(library, now, {.lost = {1, 1}, .joined = {}}).refusal().what,
            "node 1 is lost twice");
  EXPECT_EQ(Replan(library, now, {.lost = {}, .joined = {3}}).refusal().what,
            "node 3 joins and is lost or there already");
  EXPECT_EQ(Replan(library, now, {.lost = {0, 1, 2}, .joined = {}}).refusal().what, "1 nodes");
  const Answer<Replanned> same = Replan(library, now, {});
  ASSERT_TRUE(same.ok());
  EXPECT_EQ(same.value().moved_bytes, 0);
  EXPECT_EQ(same.value().stayed, 4u);
}

}  // namespace
}  // namespace everstep::planner
