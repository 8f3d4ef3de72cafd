#include "controller/policy/spot.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include <fmt/format.h>

#include "proto/base/random.h"

namespace everstep::policy {
namespace {

// In (0, 1].
double Uniform(Random* random) {
  return (static_cast<double>(random->Next() >> 11) + 1) / 9007199254740992.0;  // 2^53
}

double Exponential(Random* random, double mean) {
  return -mean * std::log(Uniform(random));
}

// P(size = k) falls by `ratio` from each k to the next, k = 1..most.
double MeanOf(double ratio, std::uint32_t most) {
  double weight = 1, sum = 0, total = 0;
  for (std::uint32_t k = 1; k <= most; ++k, weight *= ratio) {
    total += weight;
    sum += weight * k;
  }
  return sum / total;
}

double RatioFor(double mean, std::uint32_t most) {
  double low = 0, high = 2;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (MeanOf(middle, most) < mean ? low : high) = middle;
  }
  return low;
}

std::uint32_t DrawSize(Random* random, double ratio, std::uint32_t most) {
  double weight = 1, total = 0;
  for (std::uint32_t k = 1; k <= most; ++k, weight *= ratio) total += weight;
  double left = Uniform(random) * total;
  weight = 1;
  for (std::uint32_t k = 1; k < most; ++k, weight *= ratio) {
    left -= weight;
    if (left <= 0) return k;
  }
  return most;
}

}  // namespace

const std::vector<SpotLaw>& SpotLaws() {
  static const std::vector<SpotLaw> laws = {
      {"ec2-p3", "EC2 p3 spot, 11.4 h (Bamboo)", 11.4, 32, 24.0, 8.6, 2.1, 6},
      {"ec2-g4dn", "EC2 g4dn spot, 10.8 h (Bamboo)", 10.8, 24, 12.6, 13.5, 1.5, 5},
      {"gcp-a100", "GCP A100 spot, 27 h, 64 asked for (Bamboo)", 27.0, 64, 57.3, 45, 4.3, 36},
      {"gcp-v100", "GCP V100 spot, 24 h, 80 asked for (Bamboo)", 24.2, 80, 76.3, 26, 9.4, 40},
      {"ec2-p3-30", "EC2 p3 spot scaled to 30 nodes (Oobleck)", 11.4, 30, 24.1, 8.0, 1.7, 6},
      {"gcp-30", "GCP spot scaled to 30 nodes (Oobleck)", 10.8, 30, 22.0, 10.3, 1.1, 3},
      {"10m", "30 nodes, one lost in 10 minutes on average", 2.5, 30, 30, 10, 1, 1, false},
      {"1h", "30 nodes, one lost in an hour on average", 15, 30, 30, 60, 1, 1, false},
      {"6h", "30 nodes, one lost in 6 hours on average", 90, 30, 30, 360, 1, 1, false}};
  return laws;
}

const SpotLaw* FindSpotLaw(std::string_view name) {
  for (const SpotLaw& law : SpotLaws()) {
    if (law.name == name) return &law;
  }
  return nullptr;
}

Trace DrawTrace(const SpotLaw& law, std::uint64_t seed) {
  constexpr double kHourMs = 3'600'000;
  Random random(seed);
  Trace trace{.name = fmt::format("{} seed {}", law.name, seed), .events = {}, .end_ms = 0};
  trace.end_ms = std::llround(law.hours * kHourMs);
  const auto end = static_cast<double>(trace.end_ms);
  const double gap = law.minutes_between * kHourMs / 60;
  // As many are away on average as are lost while one is away.
  const double away = (law.most_nodes - law.mean_nodes) * gap / law.batch_mean;
  const double ratio = RatioFor(law.batch_mean, law.batch_most);
  std::vector<double> arrivals;  // a heap, the next one first
  const auto arrive = [&arrivals](double at) {
    arrivals.push_back(at);
    std::push_heap(arrivals.begin(), arrivals.end(), std::greater<>());
  };
  std::vector<std::string> here;
  std::uint32_t named = 0;
  const auto now_there = static_cast<std::uint32_t>(std::lround(law.mean_nodes));
  for (std::uint32_t i = 0; i < law.most_nodes; ++i) {
    if (i < now_there) {
      arrive(0);
    } else if (law.returns) {
      arrive(Exponential(&random, away));
    }
  }
  double loss = Exponential(&random, gap);
  for (;;) {
    const bool comes = !arrivals.empty() && arrivals.front() <= loss;
    const double at = comes ? arrivals.front() : loss;
    if (at >= end) break;
    const auto ms = static_cast<std::int64_t>(at);
    if (comes) {
      std::pop_heap(arrivals.begin(), arrivals.end(), std::greater<>());
      arrivals.pop_back();
      here.push_back(fmt::format("n{}", ++named));
      trace.events.push_back({ms, true, here.back()});
      continue;
    }
    std::uint32_t lost = DrawSize(&random, ratio, law.batch_most);
    for (; lost > 0 && !here.empty(); --lost) {
      const auto victim = here.begin() + static_cast<std::ptrdiff_t>(random.Below(here.size()));
      trace.events.push_back({ms, false, *victim});
      here.erase(victim);
      if (law.returns) arrive(at + Exponential(&random, away));
    }
    loss += Exponential(&random, gap);
  }
  return trace;
}

}  // namespace everstep::policy
