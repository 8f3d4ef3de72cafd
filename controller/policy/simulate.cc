#include "controller/policy/simulate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "controller/policy/policies.h"

namespace everstep::policy {
namespace {

// Around Young's interval sqrt(2 c M), in steps of the usual number of nodes.
std::set<std::uint64_t> Intervals(const Capacity& capacity, const Model& model,
                                  const std::vector<double>& curve) {
  const auto usual = static_cast<std::uint32_t>(std::lround(capacity.mean_nodes));
  std::uint32_t nodes = FastestWithin(curve, 0, std::min(usual, model.most_nodes));
  if (nodes == 0) nodes = FastestWithin(curve, 0, model.most_nodes);
  const double step_us = model.batch / curve[nodes] * 1e6;
  const double young_us = std::sqrt(2.0 * static_cast<double>(model.checkpoint_us) *
                                    static_cast<double>(capacity.mean_loss_gap_us));
  std::set<std::uint64_t> every;
  for (const double scale : {0.25, 0.5, 1.0, 2.0, 4.0}) {
    every.insert(static_cast<std::uint64_t>(std::max(1.0, std::round(scale * young_us / step_us))));
  }
  return every;
}

// The best of `run`'s reports over those intervals.
Report BestOf(const std::set<std::uint64_t>& intervals,
              const std::function<Report(std::uint64_t)>& run) {
  Report best;
  bool first = true;
  for (const std::uint64_t every : intervals) {
    Report report = run(every);
    report.note = every == kNoCheckpoints
                      ? "checkpoints in notices only"
                      : fmt::format("a checkpoint every {} step{}", every, every == 1 ? "" : "s");
    if (!first && report.samples <= best.samples) continue;
    first = false;
    best = std::move(report);
  }
  return best;
}

bool Fits(const std::vector<double>& curve) {
  return std::any_of(curve.begin(), curve.end(), [](double speed) { return speed > 0; });
}

Report Impossible(const char* why) {
  Report report;
  report.possible = false;
  report.note = why;
  return report;
}

Report RunPolicy(Policy policy, const Capacity& capacity, const Model& model, const Rules& rules) {
  switch (policy) {
    case Policy::kVaruna: {
      std::set<std::uint64_t> intervals = Intervals(capacity, model, model.grid);
      if (rules.notice_us >= model.checkpoint_us && rules.notice_us > 0) {
        intervals.insert(kNoCheckpoints);
      }
      return BestOf(intervals, [&](std::uint64_t every) {
        return RestartReport(capacity, model, rules, {.every = every});
      });
    }
    case Policy::kBamboo:
      if (!Fits(model.redundant)) return Impossible("its shadows do not fit the memory");
      return BestOf(Intervals(capacity, model, model.redundant), [&](std::uint64_t every) {
        return BambooReport(capacity, model, rules, every);
      });
    case Policy::kOobleck:
      if (!Fits(model.templates)) return Impossible("no speeds of its templates");
      return OobleckReport(capacity, model, rules);
    case Policy::kMemory:
      return RestartReport(capacity, model, rules, {.every = 1, .from_memory = true});
    case Policy::kEverstep: break;
  }
  return PlannedReport(capacity, model, rules);
}

}  // namespace

const std::vector<PolicyName>& Policies() {
  static const std::vector<PolicyName> policies = {
      {Policy::kVaruna, "varuna", "a checkpoint every so often, everything starts again"},
      {Policy::kBamboo, "bamboo", "each node shadows its successor"},
      {Policy::kOobleck, "oobleck", "unequal pipelines, the iteration is lost, as published"},
      {Policy::kMemory, "memory", "each step in peers' memory, everything starts again quickly"},
      {Policy::kEverstep, "everstep", "the planner's pipelines, gradients of the others are kept"}};
  return policies;
}

std::optional<Refusal> TooManySteps(const Trace& trace, const Model& model) {
  const double steps = static_cast<double>(trace.end_ms) / 1000 * model.best.back() / model.batch;
  if (steps <= static_cast<double>(kMostSteps)) return std::nullopt;
  return Refusal{fmt::format("{:.1f} hours with iterations of {:.6f} s are {:.0f} steps",
                             static_cast<double>(trace.end_ms) / 3.6e6,
                             model.batch / model.best.back(), steps),
                 fmt::format("at most {}: a larger batch, or a shorter trace", kMostSteps)};
}

Simulation Simulate(const Trace& trace, const Model& model, const Rules& rules,
                    const std::vector<Policy>& policies) {
  Simulation out{.trace = trace.name, .model = model.name};
  out.capacity = CapacityOf(trace, rules.boot_us);
  constexpr double kHourUs = 3.6e9;
  out.cost = static_cast<double>(out.capacity.billed_us) / kHourUs * rules.price;
  std::uint32_t nodes = 0;
  std::int64_t since = 0;
  const auto until = [&](std::int64_t us) {
    const double speed = model.best[std::min(nodes, model.most_nodes)];
    out.oracle_samples += static_cast<double>(us - since) / 1e6 * speed;
    out.oracle_course.emplace_back(us, out.oracle_samples);
    since = us;
  };
  out.nodes.emplace_back(0, 0);
  for (const Change& change : out.capacity.changes) {
    until(change.at_us);
    nodes += static_cast<std::uint32_t>(change.joined.size());
    nodes -= static_cast<std::uint32_t>(change.lost.size());
    out.nodes.emplace_back(change.at_us, nodes);
  }
  until(out.capacity.end_us);
  out.reports.reserve(policies.size());
  for (const Policy policy : policies) {
    Report report = RunPolicy(policy, out.capacity, model, rules);
    for (const PolicyName& name : Policies()) {
      if (name.policy == policy) report.policy = std::string(name.name);
    }
    out.reports.push_back(std::move(report));
  }
  return out;
}

}  // namespace everstep::policy
