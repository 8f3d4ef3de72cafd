// Traces, models and recordings that the policies' tests share.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "controller/policy/model.h"
#include "controller/policy/trace.h"

namespace everstep::policy::models {

// $EVERSTEP_TRACES, else beside the checkout; empty: there are no recordings.
inline std::filesystem::path Recordings() {
  namespace fs = std::filesystem;
  const char* traces = std::getenv("EVERSTEP_TRACES");  // NOLINT(concurrency-mt-unsafe)
  std::error_code error;
  for (const fs::path& root : {fs::path(traces == nullptr ? "" : traces),
                               fs::path(EVERSTEP_SOURCE_DIR) / "../shared/traces"}) {
    if (fs::is_directory(root / "oobleck", error) && fs::is_directory(root / "norm", error)) {
      return root;
    }
  }
  return {};
}

inline std::string ReadText(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

inline Trace RecordedTrace(const std::filesystem::path& path) {
  return ParseTrace(ReadText(path), path.stem().string()).value();
}

inline ModelTable RecordedTable(const std::string& name) {
  const std::filesystem::path folder = Recordings() / "oobleck";
  return PublishedModel(ReadText(folder / "throughput_by_nodes.csv"),
                        ReadText(folder / "recovery_params.csv"),
                        ReadText(folder / "varuna_restart_s_by_nodes.csv"), name)
      .value();
}

// `layers` equal layers, so that `least` nodes hold a copy and every number of nodes above is
// covered.
inline planner::Profile EvenProfile(std::uint32_t layers) {
  planner::Profile profile;
  profile.model = "even";
  profile.layers.assign(layers, {.forward_ns = 1'000'000,
                                 .backward_ns = 2'000'000,
                                 .optimizer_ns = 100'000,
                                 .parameters = 50'000'000,
                                 .activation_bytes = 1 << 20,
                                 .output_bytes = 1 << 20});
  return profile;
}

// One sample a second and node on 4 to 16 nodes, in batches of 64: an iteration on 16 takes 4 s.
inline ModelTable EvenTable() {
  ModelTable table;
  table.name = "even";
  table.batch = 64;
  table.least_nodes = 2;
  table.reconfigure_s = 2;
  table.checkpoint_s = 3;
  table.restart_s = 30;
  table.rebalance_s = 10;
  table.redundant_stages = 4;
  table.grid = {.first = 4, .speeds = {}};
  table.grid.speeds.reserve(13);
  for (int n = 4; n <= 16; ++n) table.grid.speeds.push_back(n);
  table.templates = table.grid;
  table.redundant = {.first = 4, .speeds = {2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 8}};
  return table;
}

inline Model EvenModel(const Speeds& speeds = {}) {
  return MeasuredModel(EvenTable(), EvenProfile(16), speeds).value();
}

struct Event {
  std::int64_t ms;
  bool add;
  int first, last;  // nodes n<first>..n<last>
};
inline Trace Written(const std::vector<Event>& events, std::int64_t end_ms) {
  Trace trace{.name = "written", .events = {}, .end_ms = end_ms};
  for (const Event& e : events) {
    for (int n = e.first; n <= e.last; ++n) {
      trace.events.push_back({e.ms, e.add, "n" + std::to_string(n)});
    }
  }
  return trace;
}

}  // namespace everstep::policy::models
