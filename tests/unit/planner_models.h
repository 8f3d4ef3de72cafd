// Models and oracles that the planner's tests share: drawn profiles, every division of layers by
// brute force, a discrete-event simulation of one pipeline's 1F1B, the real profiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "controller/planner/partition.h"
#include "controller/planner/profile.h"
#include "proto/base/random.h"

namespace everstep::planner::models {

struct Drawn {
  std::uint32_t layers = 8;
  bool equal = false;         // all layers alike
  bool uneven_links = false;  // outputs differ, so transfers cost differently at each boundary
  bool tight_memory = false;
};

inline Profile Draw(Random* random, const Drawn& how) {
  Profile p;
  p.model = "drawn";
  p.microbatch = 8;
  p.inside = {.latency_ns = random->Between(0, 3), .bytes_per_s = 4'000'000'000};
  p.between = {.latency_ns = random->Between(0, 9), .bytes_per_s = 1'000'000'000};
  // A narrow range of times makes ties; a wide one long layers.
  const std::int64_t widest = random->Chance(500) ? 6 : 400;
  const Layer common{.forward_ns = random->Between(1, widest),
                     .backward_ns = random->Between(1, 2 * widest),
                     .optimizer_ns = 3,
                     .parameters = random->Between(1, 40),
                     .activation_bytes = random->Between(1, 400),
                     .output_bytes = random->Between(0, 40)};
  for (std::uint32_t l = 0; l < how.layers; ++l) {
    Layer layer = common;
    if (!how.equal) {
      layer.forward_ns = random->Between(1, widest);
      layer.backward_ns = random->Between(1, 2 * widest);
      layer.parameters = random->Between(1, 40);
      layer.activation_bytes = random->Between(1, 400);
    }
    if (how.uneven_links) layer.output_bytes = random->Between(0, 3 * widest);
    p.layers.push_back(layer);
  }
  if (how.tight_memory) {
    std::int64_t total = 0;
    for (const Layer& l : p.layers) total += p.ResidentBytes(l) + l.activation_bytes;
    p.device_memory_bytes = random->Between(total / how.layers, 2 * total);
  }
  return p;
}

// Calls `look` with every division of `layers` into `stages`.
inline void EveryDivision(std::uint32_t layers, std::uint32_t stages,
                          const std::function<void(const std::vector<std::uint32_t>&)>& look) {
  std::vector<std::uint32_t> cuts = {0};
  const std::function<void()> next = [&] {
    const auto made = static_cast<std::uint32_t>(cuts.size()) - 1;
    if (made + 1 == stages) {
      cuts.push_back(layers);
      look(cuts);
      cuts.pop_back();
      return;
    }
    for (std::uint32_t b = cuts.back() + 1; b + (stages - made - 1) <= layers; ++b) {
      cuts.push_back(b);
      next();
      cuts.pop_back();
    }
  };
  if (stages >= 1 && stages <= layers) next();
}

// The least T(4S) of all divisions that fit the memory; nothing: none does.
inline std::optional<std::int64_t> LeastByBruteForce(const ShapeCosts& costs, std::uint32_t stages,
                                                     std::uint32_t most_microbatches) {
  std::optional<std::int64_t> least;
  EveryDivision(costs.layers(), stages, [&](const std::vector<std::uint32_t>& cuts) {
    for (std::uint32_t i = 0; i < stages && costs.memory > 0; ++i) {
      const std::uint32_t m = most_microbatches == 0 ? stages : most_microbatches;
      if (StageBytes(costs, cuts, i, m) > costs.memory) return;
    }
    // Written out apart from Measure: T1 + T2 + T3 of the paper.
    std::int64_t t1 = 0, slowest = 0, t3 = 0, k = 0;
    for (std::uint32_t i = 0; i < stages; ++i) t1 += StageNs(costs, cuts, i);
    for (std::uint32_t i = 0; i < stages; ++i) {
      if (StageNs(costs, cuts, i) >= slowest) {
        slowest = StageNs(costs, cuts, i);
        k = i;
      }
    }
    for (auto i = static_cast<std::uint32_t>(k); i < stages; ++i) t3 += StageNs(costs, cuts, i);
    const std::int64_t s = stages;
    const std::int64_t t = t1 + (4 * s - s + k - 1) * slowest + t3;
    if (!least || t < *least) least = t;
  });
  return least;
}

// When the last of m microbatches is done, every forward and backward pass an event: 1F1B (stage i
// begins with min(S - i, m) forward passes, then one backward, one forward, in turn), a transfer
// occupying its sender. One device a stage, one stage a node.
inline std::int64_t Simulated1F1B(const Profile& p, const std::vector<std::uint32_t>& cuts,
                                  std::uint32_t m) {
  const auto stages = static_cast<std::uint32_t>(cuts.size()) - 1;
  std::vector<std::int64_t> forward(stages, 0), backward(stages, 0);
  for (std::uint32_t i = 0; i < stages; ++i) {
    for (std::uint32_t l = cuts[i]; l < cuts[i + 1]; ++l) {
      forward[i] += p.layers[l].forward_ns;
      backward[i] += p.layers[l].backward_ns;
    }
    if (i + 1 < stages) {
      forward[i] += TransferNs(p.between, p.layers[cuts[i + 1] - 1].output_bytes);
    }
    if (i > 0) backward[i] += TransferNs(p.between, p.layers[cuts[i] - 1].output_bytes);
  }
  // done[0][i][j]: forward of microbatch j on stage i; done[1]: backward. -1: not yet.
  std::vector<std::vector<std::vector<std::int64_t>>> done(
      2, std::vector<std::vector<std::int64_t>>(stages, std::vector<std::int64_t>(m, -1)));
  std::vector<std::uint32_t> forwards(stages, 0), backwards(stages, 0);
  std::vector<std::int64_t> free_at(stages, 0);
  std::int64_t end = 0;
  for (std::uint32_t left = 2 * stages * m; left > 0;) {
    for (std::uint32_t i = 0; i < stages; ++i) {
      for (;;) {
        const std::uint32_t ahead = std::min(stages - i, m);
        const bool go_forward = forwards[i] < m && forwards[i] - backwards[i] < ahead;
        if (!go_forward && backwards[i] == m) break;
        const std::uint32_t j = go_forward ? forwards[i] : backwards[i];
        std::int64_t ready = 0;
        if (go_forward) {
          if (i > 0) ready = done[0][i - 1][j];
        } else {
          ready = i + 1 < stages ? done[1][i + 1][j] : done[0][i][j];
        }
        if (ready < 0) break;
        const std::int64_t at = std::max(ready, free_at[i]) + (go_forward ? forward : backward)[i];
        done[go_forward ? 0 : 1][i][j] = free_at[i] = at;
        ++(go_forward ? forwards : backwards)[i];
        end = std::max(end, at);
        --left;
      }
    }
  }
  return end;
}

// The measured profiles, where they are: $EVERSTEP_TRACES/profiles, else beside the checkout.
inline std::vector<std::filesystem::path> RealProfiles() {
  namespace fs = std::filesystem;
  std::vector<fs::path> found;
  const char* traces = std::getenv("EVERSTEP_TRACES");  // NOLINT(concurrency-mt-unsafe)
  std::error_code error;
  for (const fs::path& root : {fs::path(traces == nullptr ? "" : traces),
                               fs::path(EVERSTEP_SOURCE_DIR) / "../shared/traces"}) {
    for (const auto& entry : fs::directory_iterator(root / "profiles", error)) {
      if (entry.path().extension() == ".csv") found.push_back(entry.path());
    }
    if (!found.empty()) break;
  }
  std::sort(found.begin(), found.end());
  return found;
}

inline std::string ReadText(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace everstep::planner::models
