// Compositions are the optimum: against every multiset of templates up to 24 nodes.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numeric>

#include <fmt/format.h>

#include "controller/planner/best_sum.h"
#include "controller/planner/compose.h"
#include "tests/unit/planner_models.h"

namespace everstep::planner {
namespace {

using models::Draw;

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// Every multiset of `sizes` (ascending) that sums to `total`, as an ascending list.
void EveryMultiset(const std::vector<std::uint32_t>& sizes, std::uint32_t total,
                   const std::function<void(const std::vector<std::uint32_t>&)>& look) {
  std::vector<std::uint32_t> made;
  const std::function<void(std::size_t, std::uint32_t)> next = [&](std::size_t from,
                                                                   std::uint32_t left) {
    if (left == 0) look(made);
    for (std::size_t i = from; i < sizes.size() && sizes[i] <= left; ++i) {
      made.push_back(sizes[i]);
      next(i, left - sizes[i]);
      made.pop_back();
    }
  };
  next(0, total);
}

// The least time of an iteration on pipelines of these sizes: each template of a size may serve, so
// the least tau at which the best of each size reach the batch together; tau steps through the
// times that templates take.
std::int64_t LeastOf(const Library& library, const std::vector<std::uint32_t>& parts,
                     std::int64_t microbatches) {
  const auto q = static_cast<std::uint32_t>(parts.size());
  if (microbatches < q) return kNever;
  const std::int64_t limit =
      library.input.most_microbatches == 0 ? microbatches : library.input.most_microbatches;
  const auto time = [&](const Template& t, std::int64_t m) {
    return t.TimeNs(m) + SyncNs(library.profile, t, q) + t.optimizer_ns;
  };
  const auto reaches = [&](std::int64_t tau) {
    std::int64_t sum = 0;
    for (const std::uint32_t size : parts) {
      std::int64_t best = 0;
      for (const Template& t : library.templates) {
        if (t.nodes != size) continue;
        std::int64_t m = 0;
        while (m < limit && time(t, m + 1) <= tau) ++m;
        best = std::max(best, m);
      }
      if (best == 0) return false;
      sum += best;
    }
    return sum >= microbatches;
  };
  std::int64_t least = kNever;
  std::vector<std::int64_t> times;
  for (const Template& t : library.templates) {
    if (std::find(parts.begin(), parts.end(), t.nodes) == parts.end()) continue;
    for (std::int64_t m = 1; m <= std::min(limit, microbatches); ++m) times.push_back(time(t, m));
  }
  std::sort(times.begin(), times.end());
  const auto found = std::partition_point(times.begin(), times.end(),
                                          [&](std::int64_t tau) { return !reaches(tau); });
  if (found != times.end()) least = *found;
  return least;
}

void CheckAgainstEnumeration(const Library& library, const ComposeInput& input) {
  std::int64_t least = kNever;
  std::size_t most_parts = 0;
  EveryMultiset(library.sizes, input.nodes, [&](const std::vector<std::uint32_t>& parts) {
    if (parts.size() <= library.input.faults) return;
    const std::int64_t ns = LeastOf(library, parts, static_cast<std::int64_t>(input.microbatches));
    if (ns < least) most_parts = 0;
    if (ns <= least) most_parts = std::max(most_parts, parts.size());
    least = std::min(least, ns);
  });
  const Answer<Composition> made = Compose(library, input);
  ASSERT_EQ(made.ok(), least != kNever) << (made.ok() ? "" : made.refusal().what);
  if (!made.ok()) return;
  const Composition& c = made.value();
  EXPECT_EQ(c.time_ns, least);
  EXPECT_EQ(c.pipelines.size(), most_parts) << "of equally fast ones, the most copies";
  EXPECT_GE(c.pipelines.size(), library.input.faults + 1);
  std::uint64_t nodes = 0, microbatches = 0;
  std::int64_t slowest = 0;
  const auto q = static_cast<std::uint32_t>(c.pipelines.size());
  for (const Pipeline& p : c.pipelines) {
    const Template& t = library.templates[p.form];
    nodes += t.nodes;
    microbatches += p.microbatches;
    EXPECT_GE(p.microbatches, 1u);
    EXPECT_EQ(p.time_ns, t.TimeNs(p.microbatches) + SyncNs(library.profile, t, q) + t.optimizer_ns);
    slowest = std::max(slowest, p.time_ns);
    if (library.input.most_microbatches > 0) {
      EXPECT_LE(p.microbatches, library.input.most_microbatches);
    }
  }
  EXPECT_EQ(nodes, input.nodes);
  EXPECT_EQ(microbatches, input.microbatches);
  EXPECT_EQ(slowest, c.time_ns);
}

TEST(ComposeProperty, EqualsFullEnumerationUpTo24Nodes) {
  Random random(21);
  int made = 0;
  for (int round = 0; round < 160; ++round) {
    Profile p = Draw(&random, {.layers = static_cast<std::uint32_t>(random.Between(4, 20)),
                               .equal = random.Chance(300),
                               .tight_memory = random.Chance(600)});
    p.microbatch = 1u << random.Below(3);
    if (random.Chance(400)) p.devices_per_node = 1u << random.Below(3);
    // Synchronisation that matters, at times.
    if (random.Chance(500)) p.between = {.latency_ns = 40, .bytes_per_s = 100'000'000};
    const bool large = round % 20 == 0;
    LibraryInput in{.nodes = large ? 24 : static_cast<std::uint32_t>(random.Between(2, 16)),
                    .faults = static_cast<std::uint32_t>(random.Between(0, 2))};
    if (random.Chance(200)) {
      in.most_microbatches = static_cast<std::uint32_t>(random.Between(1, 12));
    }
    const Answer<Library> library = MakeLibrary(p, in);
    if (!library.ok()) continue;
    for (std::uint32_t n = library.value().fewest_nodes; n <= in.nodes; ++n) {
      if (large && n != in.nodes) continue;
      ++made;
      const auto batch = static_cast<std::uint64_t>(
          random.Chance(200) ? random.Between(in.faults + 1, 8) : random.Between(10, 120));
      SCOPED_TRACE(fmt::format("round {} nodes {} microbatches {}", round, n, batch));
      CheckAgainstEnumeration(library.value(), {.nodes = n, .microbatches = batch});
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(made, 300);
}

TEST(ComposeProperty, TheSameTwice) {
  Random random(22);
  const Profile p = Draw(&random, {.layers = 24});
  const Library library = MakeLibrary(p, {.nodes = 60, .faults = 1}).value();
  const Composition a = Compose(library, {.nodes = 60, .microbatches = 333}).value();
  const Composition b = Compose(library, {.nodes = 60, .microbatches = 333}).value();
  ASSERT_EQ(a.pipelines.size(), b.pipelines.size());
  for (std::size_t i = 0; i < a.pipelines.size(); ++i) {
    EXPECT_EQ(a.pipelines[i].form, b.pipelines[i].form);
    EXPECT_EQ(a.pipelines[i].microbatches, b.pipelines[i].microbatches);
  }
}

// The knapsack alone, on values that no template has: far from concave.
TEST(ComposeProperty, BestSumsEqualDynamicProgramming) {
  Random random(23);
  for (int round = 0; round < 3000; ++round) {
    std::vector<Item> items;
    const std::int64_t widest = random.Between(1, 1000);
    for (std::uint32_t size = 1 + static_cast<std::uint32_t>(random.Below(4)); size < 14; ++size) {
      if (random.Chance(600)) items.push_back({size, random.Between(1, widest)});
    }
    if (items.empty()) continue;
    const auto q = static_cast<std::uint32_t>(random.Between(1, 20));
    const std::uint32_t total =
        static_cast<std::uint32_t>(random.Between(items.front().size * q, items.back().size * q));
    std::vector<std::int64_t> best(total + 1, -1);
    best[0] = 0;
    for (std::uint32_t i = 0; i < q; ++i) {
      std::vector<std::int64_t> more(total + 1, -1);
      for (std::uint32_t n = 0; n <= total; ++n) {
        for (const Item& item : items) {
          if (best[n] >= 0 && n + item.size <= total) {
            more[n + item.size] = std::max(more[n + item.size], best[n] + item.value);
          }
        }
      }
      best = std::move(more);
    }
    const std::int64_t most = best[total];
    EXPECT_FALSE(Reaches(items, q, total, std::max<std::int64_t>(0, most) + 1, nullptr));
    if (most < 0) continue;
    EXPECT_TRUE(MayReach(items, q, total, most));
    std::vector<std::uint32_t> sizes;
    ASSERT_TRUE(Reaches(items, q, total, most, &sizes)) << "round " << round;
    ASSERT_EQ(sizes.size(), q);
    std::int64_t sum = 0;
    for (const std::uint32_t size : sizes) {
      const auto item = std::find_if(items.begin(), items.end(),
                                     [size](const Item& i) { return i.size == size; });
      ASSERT_NE(item, items.end());
      sum += item->value;
    }
    EXPECT_GE(sum, most);
    EXPECT_EQ(std::accumulate(sizes.begin(), sizes.end(), 0u), total);
  }
}

TEST(Compose, RefusesWhatDoesNotDivideOrDoesNotReach) {
  Random random(24);
  Profile p = Draw(&random, {.layers = 12});
  p.microbatch = 8;
  EXPECT_EQ(MicrobatchesOf(p, 64).value(), 8u);
  EXPECT_EQ(MicrobatchesOf(p, 60).refusal().what,
            "a batch of 60 samples does not divide into microbatches of 8");
  EXPECT_EQ(MicrobatchesOf(p, 60).refusal().change, "56 or 64");
  EXPECT_EQ(MicrobatchesOf(p, 3).refusal().change, "8");
  EXPECT_FALSE(MicrobatchesOf(p, 0).ok());
  const Library library = MakeLibrary(p, {.nodes = 8, .faults = 2}).value();
  EXPECT_EQ(Compose(library, {.nodes = 2, .microbatches = 8}).refusal().what, "2 nodes");
  EXPECT_EQ(Compose(library, {.nodes = 9, .microbatches = 8}).refusal().change,
            "the library is for 3 to 8");
  EXPECT_EQ(Compose(library, {.nodes = 8, .microbatches = 2}).refusal().what,
            "2 microbatches for at least 3 pipelines");
  EXPECT_EQ(Compose(library, {.nodes = 8, .microbatches = 3}).value().pipelines.size(), 3u);
}

}  // namespace
}  // namespace everstep::planner
