// What it costs to plan pipelines.
//
//   planner_bench [--runs 21] [--json FILE]
//
// Case templates-LxN: templates of a model of L layers for every number of nodes up to N, one
// device each; with a third number, that many devices, in every shape. Layers have times drawn
// around a mean, as measured ones do; `time` is the whole of it, with costs of transfers.
// `templates-LxN-uneven`: the same where every layer sends another number of bytes.
// Case compose-N: which of the templates of a model of 96 layers N nodes run, f = 1, with 4
// microbatches for each node. `pipelines`: how many that makes. `iteration`: what it then takes,
// beside the best homogeneous grid (system `grid`).
// Case replan-N: a node of N lost, ten minutes to the next change; `moved`: state that moves.
// Case book-N: the plans for every single loss of N nodes, the same price; `each`: of it, for one
// loss. Case book-lookup: one of them found in a book of 256, its fingerprint computed.
// What Oobleck's planners were measured to take stands in docs/reference/performance.md; they
// cannot be run here.
#include <cstdlib>
#include <numeric>
#include <string>

#include <fmt/format.h>

#include "controller/planner/compose.h"
#include "controller/planner/library.h"
#include "controller/planner/plan_book.h"
#include "controller/planner/replan.h"
#include "proto/base/check.h"
#include "proto/base/clock.h"
#include "proto/base/random.h"
#include "tests/bench/results.h"

namespace everstep::bench {
namespace {

using planner::Profile;

Profile Model(std::uint32_t layers, std::uint32_t devices, bool uneven) {
  Random random(layers);
  Profile p{.model = "drawn", .microbatch = 8, .devices_per_node = devices};
  p.layers.reserve(layers);
  for (std::uint32_t l = 0; l < layers; ++l) {
    p.layers.push_back(
        {.forward_ns = random.Between(6'000'000, 14'000'000),
         .backward_ns = random.Between(12'000'000, 28'000'000),
         .optimizer_ns = 1'000'000,
         .parameters = 30'000'000,
         .activation_bytes = 100 << 20,
         .output_bytes = uneven ? random.Between(1 << 20, 16 << 20) : std::int64_t{4} << 20});
  }
  return p;
}

template <typename Work>
double Milliseconds(const Work& work) {
  const std::int64_t began = MonotonicNanos();
  work();
  return static_cast<double>(MonotonicNanos() - began) / 1e6;
}

void Templates(std::uint32_t layers, std::uint32_t nodes, std::uint32_t devices, bool uneven,
               int runs, Results* results) {
  std::string name = fmt::format("templates-{}x{}", layers, nodes);
  if (devices > 1) name += fmt::format("x{}", devices);
  if (uneven) name += "-uneven";
  const Profile p = Model(layers, devices, uneven);
  for (int run = 0; run < runs; ++run) {
    std::size_t made = 0;
    const double ms = Milliseconds([&] { made = planner::MakeTemplates(p, nodes).size(); });
    results->Add(name, "everstep", "time", "s", ms / 1e3);
    if (run == 0) {
      results->Add(name, "everstep", "templates", "", static_cast<double>(made));
    }
  }
}

// What a model of 96 layers runs on N nodes, one copy to spare.
planner::Library LibraryFor(std::uint32_t nodes) {
  Profile p = Model(96, 1, false);
  p.device_memory_bytes = std::int64_t{16} << 30;
  return planner::MakeLibrary(p, {.nodes = nodes, .faults = 1}).value();
}

planner::Seated SeatAll(const planner::Library& library) {
  const std::uint32_t nodes = library.input.nodes;
  std::vector<planner::NodeId> all(nodes);
  std::iota(all.begin(), all.end(), 0U);
  return planner::Seat(
      planner::Compose(library, {.nodes = nodes, .microbatches = std::uint64_t{4} * nodes}).value(),
      library, all);
}

// The fastest grid of equal pipelines.
double BestGrid(const planner::Library& library, std::uint32_t nodes, std::uint64_t microbatches) {
  std::int64_t best = 0;
  for (const planner::Template& t : library.templates) {
    if (nodes % t.nodes != 0 || nodes / t.nodes < library.input.faults + 1) continue;
    const std::uint32_t q = nodes / t.nodes;
    if (microbatches < q) continue;
    const auto share = static_cast<std::int64_t>((microbatches + q - 1) / q);
    const std::int64_t ns =
        t.TimeNs(share) + planner::SyncNs(library.profile, t, q) + t.optimizer_ns;
    if (best == 0 || ns < best) best = ns;
  }
  return static_cast<double>(best) / 1e9;
}

void Compositions(std::uint32_t nodes, int runs, Results* results) {
  const std::string name = fmt::format("compose-{}", nodes);
  const planner::Library library = LibraryFor(nodes);
  const std::uint64_t microbatches = std::uint64_t{4} * nodes;
  for (int run = 0; run < runs; ++run) {
    double pipelines = 0, iteration = 0;
    const double ms = Milliseconds([&] {
      const auto made = planner::Compose(library, {.nodes = nodes, .microbatches = microbatches});
      if (!made.ok()) return;
      pipelines = static_cast<double>(made.value().pipelines.size());
      iteration = static_cast<double>(made.value().time_ns) / 1e9;
    });
    results->Add(name, "everstep", "time", "s", ms / 1e3);
    if (run > 0) continue;
    results->Add(name, "everstep", "pipelines", "", pipelines);
    results->Add(name, "everstep", "iteration", "s", iteration);
    results->Add(name, "grid", "iteration", "s", BestGrid(library, nodes, microbatches));
  }
}

constexpr std::int64_t kTenMinutes = 600'000'000'000;

void Books(std::uint32_t nodes, int runs, Results* results) {
  const std::string name = fmt::format("book-{}", nodes);
  const planner::Library library = LibraryFor(nodes);
  const planner::BookInput input{.now = SeatAll(library), .horizon_ns = kTenMinutes};
  for (int run = 0; run < runs; ++run) {
    planner::PlanBook book(library, input);
    const double ms = Milliseconds([&] {
      while (book.MakeNext()) {
      }
    });
    results->Add(name, "everstep", "time", "s", ms / 1e3);
    results->Add(name, "everstep", "each", "s", ms / 1e3 / nodes);
  }
}

void Lookups(int runs, Results* results) {
  const planner::Library library = LibraryFor(256);
  const planner::BookInput input{.now = SeatAll(library), .horizon_ns = kTenMinutes};
  planner::PlanBook book(library, input);
  while (book.MakeNext()) {
  }
  for (int run = 0; run < runs; ++run) {
    constexpr std::uint32_t kLookups = 256;
    std::size_t found = 0;
    const double ms = Milliseconds([&] {
      for (std::uint32_t node = 0; node < kLookups; ++node) {
        const auto* entry = book.Find(planner::BookFingerprint(library, input), node);
        if (entry != nullptr && entry->plan.ok()) ++found;
      }
    });
    EVERSTEP_CHECK(found == kLookups);
    results->Add("book-lookup", "everstep", "time", "s", ms / 1e3 / kLookups);
  }
}

// A node lost out of N, every plan anew: the composition, the seating, with a price for moving.
void Losses(std::uint32_t nodes, int runs, Results* results) {
  const std::string name = fmt::format("replan-{}", nodes);
  const planner::Library library = LibraryFor(nodes);
  const planner::Seated seated = SeatAll(library);
  for (int run = 0; run < runs; ++run) {
    const auto victim = static_cast<planner::NodeId>(static_cast<std::uint32_t>(run) * nodes /
                                                     static_cast<std::uint32_t>(runs));
    double moved = 0;
    const double ms = Milliseconds([&] {
      const auto after = planner::Replan(
          library, seated, {.lost = {victim}, .joined = {}, .horizon_ns = kTenMinutes});
      if (after.ok()) moved = static_cast<double>(after.value().moved_bytes) / 1e9;
    });
    results->Add(name, "everstep", "time", "s", ms / 1e3);
    results->Add(name, "everstep", "moved", "GB", moved);
  }
}

int Main(int argc, char** argv) {
  int runs = 21;
  std::string json;
  if (const auto code = ReadFlags(argc, argv, "planner_bench", &runs, &json)) return *code;
  Results results("planner");
  Templates(64, 8, 1, false, runs, &results);
  Templates(128, 64, 1, false, runs, &results);
  Templates(96, 64, 8, false, runs, &results);
  Templates(64, 8, 1, true, runs, &results);
  Templates(128, 64, 1, true, std::min(runs, 5), &results);
  for (const std::uint32_t nodes : {16U, 24U, 64U, 256U, 1024U}) {
    Compositions(nodes, runs, &results);
  }
  Losses(64, runs, &results);
  Losses(1024, runs, &results);
  Books(256, runs, &results);
  Books(1024, std::min(runs, 3), &results);
  Lookups(runs, &results);
  fmt::print(
      "limits: templates-64x8 0.3 ms, -128x64 5 ms, -96x64x8 50 ms; "
      "compose-64 1 ms, compose-1024 50 ms; replan-1024 100 ms; "
      "book-256 1 s, book-lookup 10 us\n");
  return results.Finish(json);
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
