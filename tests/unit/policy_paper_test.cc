// Oobleck's published simulators: their heap, and every number that they print.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>

#include "controller/policy/paper.h"
#include "controller/policy/py_heap.h"
#include "tests/unit/policy_models.h"

namespace everstep::policy {
namespace {

std::string Names(const PyHeap& heap) {
  std::string names;
  for (const PaperEvent& event : heap.items()) names += event.node;
  return names;
}

// What CPython 3.11's heapq leaves in its list after the same calls.
TEST(PyHeap, KeepsItsElementsWherePythonDoes) {
  PyHeap heap;
  char name = 'a';
  for (const auto& [ms, kind] : std::vector<std::pair<std::int64_t, int>>{{5, 1},
                                                                          {3, 1},
                                                                          {5, 1},
                                                                          {3, 2},
                                                                          {3, 1},
                                                                          {8, 7},
                                                                          {3, 1},
                                                                          {5, 1},
                                                                          {3, 2},
                                                                          {1, 7},
                                                                          {5, 1},
                                                                          {3, 1}}) {
    heap.Push({.ms = ms, .kind = kind, .node = std::string(1, name++)});
  }
  EXPECT_EQ(Names(heap), "jbgielchadkf");
  heap.Heapify();
  EXPECT_EQ(Names(heap), "jelibgchadkf");
  std::string popped;
  for (int i = 0; i < 5; ++i) popped += heap.Pop().node;
  EXPECT_EQ(popped, "jlgeb");
  EXPECT_EQ(Names(heap), "dichafk");
  heap.Heapify();
  EXPECT_EQ(Names(heap), "idkhafc");
}

struct Published {
  const char* trace;
  const char* model;
  double bamboo, varuna, oobleck;  // samples a second
};

// As the artifact's programs printed them.
constexpr std::array<Published, 25> kPublished = {{
    {"6h", "BERT-large", 77.0, 260.1, 287.1},
    {"6h", "GPT-2", 17.5, 86.5, 85.6},
    {"6h", "GPT-3-medium", 0, 29.5, 29.3},
    {"6h", "GPT-3-2.7b", 0, 7.27, 7.29},
    {"6h", "GPT-3-6.7b", 0, 4.14, 4.33},
    {"1h", "BERT-large", 75.6, 246.0, 286.3},
    {"1h", "GPT-2", 17.1, 85.2, 85.4},
    {"1h", "GPT-3-medium", 0, 28.5, 29.2},
    {"1h", "GPT-3-2.7b", 0, 6.54, 7.23},
    {"1h", "GPT-3-6.7b", 0, 2.69, 4.22},
    {"10m", "BERT-large", 69.8, 173.5, 282.1},
    {"10m", "GPT-2", 16.0, 76.4, 84.8},
    {"10m", "GPT-3-medium", 0, 20.2, 28.7},
    {"10m", "GPT-3-2.7b", 0, 1.76, 6.89},
    {"10m", "GPT-3-6.7b", 0, .26, 3.55},
    {"scale_p3-trace", "BERT-large", 63.6, 187.7, 221.4},
    {"scale_p3-trace", "GPT-2", 14.3, 64.6, 66.8},
    {"scale_p3-trace", "GPT-3-medium", 0, 21.8, 22.5},
    {"scale_p3-trace", "GPT-3-2.7b", 0, .60, 5.42},
    {"scale_p3-trace", "GPT-3-6.7b", 0, 0, 2.68},
    {"scale_gcp-trace", "BERT-large", 68.0, 215.7, 243.7},
    {"scale_gcp-trace", "GPT-2", 15.4, 74.3, 73.1},
    {"scale_gcp-trace", "GPT-3-medium", 0, 24.6, 24.6},
    {"scale_gcp-trace", "GPT-3-2.7b", 0, .91, 6.13},
    {"scale_gcp-trace", "GPT-3-6.7b", 0, 0, 2.92},
}};

TEST(PaperMode, GivesThePublishedNumbersWithinTwoPercent) {
  const std::filesystem::path folder = models::Recordings();
  if (folder.empty()) GTEST_SKIP() << "no recordings: set EVERSTEP_TRACES";
  for (const Published& row : kPublished) {
    const Trace trace =
        models::RecordedTrace(folder / "oobleck" / (std::string(row.trace) + ".csv"));
    const ModelTable table = models::RecordedTable(row.model);
    for (const auto& [system, speed] :
         {std::pair{PaperSystem::kBamboo, row.bamboo}, std::pair{PaperSystem::kVaruna, row.varuna},
          std::pair{PaperSystem::kOobleck, row.oobleck}}) {
      const PaperResult ours = PublishedResult(system, table, trace);
      EXPECT_NEAR(ours.samples_per_s, speed, 0.02 * speed)
          << row.trace << " " << row.model << " system " << static_cast<int>(system);
    }
  }
}

// Two losses at once: the second rendezvous finds nobody, and the job stands until somebody comes.
TEST(PaperMode, ASecondLossOfOneMomentStopsTheArtifact) {
  const ModelTable table = [] {
    ModelTable t = models::EvenTable();
    t.templates = {.first = 4, .speeds = std::vector<double>(13, 16.0)};
    return t;
  }();
  const auto run = [&](int last) {
    return PublishedResult(
               PaperSystem::kOobleck, table,
               models::Written(
                   {{0, true, 1, 16}, {100'000, false, 1, last}, {1'000'000, false, 5, 5}},
                   1'000'000))
        .steps;
  };
  EXPECT_GT(run(1), 200U);
  EXPECT_EQ(run(2), 13U) << "those before the loss";
}

}  // namespace
}  // namespace everstep::policy
