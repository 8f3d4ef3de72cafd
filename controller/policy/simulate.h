// One trace, one model, several policies, under the same rules. Pure.
//
//   oracle      the samples of the fastest system with the nodes there are, at every moment,
//   without
//               losses and costs: what the policies' samples are shares of
//   varuna      its checkpoint interval is the best of those around Young's for this very trace,
//               which nobody can know beforehand; likewise Bamboo's
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "controller/policy/model.h"
#include "controller/policy/replay.h"
#include "controller/policy/trace.h"

namespace everstep::policy {

enum class Policy : std::uint8_t { kVaruna, kBamboo, kOobleck, kMemory, kEverstep };

struct PolicyName {
  Policy policy = Policy::kEverstep;
  std::string_view name;
  std::string_view summary;
};
const std::vector<PolicyName>& Policies();

struct Simulation {
  std::string trace, model;
  Capacity capacity;
  double oracle_samples = 0;
  std::vector<std::pair<std::int64_t, double>> oracle_course;
  std::vector<std::pair<std::int64_t, std::uint32_t>> nodes;  // booted, by time
  double cost = 0;                                            // of all nodes, booting included
  std::vector<Report> reports;                                // as asked for

  double OfOracle(const Report& report) const {
    return oracle_samples == 0 ? 0 : report.samples / oracle_samples;
  }
};

inline constexpr std::int64_t kMostSteps = 20'000'000;

// Why the trace is too long for so quick a model: more than kMostSteps steps. Nothing: it is not.
std::optional<Refusal> TooManySteps(const Trace& trace, const Model& model);

// REQUIRES not TooManySteps.
Simulation Simulate(const Trace& trace, const Model& model, const Rules& rules,
                    const std::vector<Policy>& policies);

}  // namespace everstep::policy
