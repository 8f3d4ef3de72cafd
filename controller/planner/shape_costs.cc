// Costs of stages in a shape, and of one given division.
#include <algorithm>
#include <bit>
#include <utility>

#include "controller/planner/stage_rules.h"
#include "proto/base/check.h"

namespace everstep::planner {

std::optional<ShapeCosts> CostsOf(const Profile& profile, Shape shape) {
  if (!std::has_single_bit(shape.stages_per_node) || !std::has_single_bit(shape.nodes_per_stage) ||
      std::min(shape.stages_per_node, shape.nodes_per_stage) != 1 ||
      profile.devices_per_node % shape.stages_per_node != 0) {
    return std::nullopt;
  }
  ShapeCosts costs;
  costs.shape = shape;
  costs.devices = profile.devices_per_node / shape.stages_per_node * shape.nodes_per_stage;
  if (profile.microbatch % costs.devices != 0) return std::nullopt;
  const std::int64_t devices = costs.devices;
  const auto share = [devices](std::int64_t whole) { return (whole + devices - 1) / devices; };
  costs.memory = profile.device_memory_bytes;
  costs.time = costs.resident = costs.activation = {0};
  costs.inside = costs.between = {0};
  for (std::vector<std::int64_t>* sums :
       {&costs.time, &costs.resident, &costs.activation, &costs.inside, &costs.between}) {
    sums->reserve(profile.layers.size() + 1);
  }
  for (const Layer& layer : profile.layers) {
    const std::int64_t time = share(layer.forward_ns + layer.backward_ns);
    costs.longest_layer = std::max(costs.longest_layer, time);
    costs.time.push_back(costs.time.back() + time);
    costs.resident.push_back(costs.resident.back() + profile.ResidentBytes(layer));
    costs.activation.push_back(costs.activation.back() + share(layer.activation_bytes));
    // Inside a node every device sends its share; between nodes those of a node share its link.
    costs.inside.push_back(TransferNs(profile.inside, share(layer.output_bytes)));
    costs.between.push_back(TransferNs(
        profile.between, (layer.output_bytes + shape.nodes_per_stage - 1) / shape.nodes_per_stage));
  }
  // What the last layer makes goes nowhere.
  costs.inside.back() = costs.between.back() = 0;
  for (std::uint32_t x = 2; x < costs.layers(); ++x) {
    costs.uniform =
        costs.uniform && costs.inside[x] == costs.inside[1] && costs.between[x] == costs.between[1];
  }
  return costs;
}

std::int64_t StageNs(const ShapeCosts& costs, const std::vector<std::uint32_t>& cuts,
                     std::uint32_t i) {
  const auto stages = static_cast<std::uint32_t>(cuts.size()) - 1;
  return StageRules(costs, {.stages = stages}).Time(i, cuts[i], cuts[i + 1]);
}

std::int64_t StageBytes(const ShapeCosts& costs, const std::vector<std::uint32_t>& cuts,
                        std::uint32_t i, std::uint32_t microbatches) {
  const auto stages = static_cast<std::uint32_t>(cuts.size()) - 1;
  return StageRules(costs, {.stages = stages, .most_microbatches = microbatches})
      .Bytes(i, cuts[i], cuts[i + 1]);
}

Partition Measure(const ShapeCosts& costs, std::vector<std::uint32_t> cuts) {
  EVERSTEP_CHECK(cuts.size() >= 2 && cuts.front() == 0 && cuts.back() == costs.layers());
  Partition p;
  p.cuts = std::move(cuts);
  const StageRules rules(costs, {.stages = p.stages()});
  for (std::uint32_t i = 0; i < p.stages(); ++i) {
    EVERSTEP_CHECK(p.cuts[i] < p.cuts[i + 1]);
    const std::int64_t w = rules.Time(i, p.cuts[i], p.cuts[i + 1]);
    p.t1_ns += w;
    p.t3_ns += w;
    if (w < p.slowest_ns) continue;
    p.slowest_ns = w;
    p.slowest = i;
    p.t3_ns = w;
  }
  return p;
}

std::int64_t Partition::TimeNs(std::int64_t microbatches) const {
  const auto stages_now = static_cast<std::int64_t>(stages());
  const std::int64_t rest = t3_ns + (microbatches - stages_now + slowest - 1) * slowest_ns;
  return t1_ns + std::max<std::int64_t>(0, rest);
}

}  // namespace everstep::planner
