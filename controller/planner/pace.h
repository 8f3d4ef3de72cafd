// Nodes that are slower or faster than the profile: fewer microbatches, then fewer layers, then
// eviction, whichever is cheapest, with what each would make.
//
//   nothing            the plan as it is; everything waits for the slow stage
//   microbatches       the same pipelines, the microbatches distributed anew; nothing moves
//   layers             the slow nodes' pipelines divided anew, so that their stages have fewer
//                      layers; then the microbatches
//   eviction           the slowest nodes leave, one after the other while that helps, and what is
//                      left is planned anew (replan.h), with fewer layers for those that stay slow
//
// A stage takes its layers' time by the speed of its slowest node, and its transfers as ever. The
// division for given speeds is exact for T(4S), the objective of templates (partition.h): for each
// range that may be the slowest stage, dynamic programs find the stages before it with the least
// sum, and those after it with the least twice that sum, none slower. T1 is no constant here: a
// layer costs what its stage's node makes of it. Microbatches are distributed exactly.
//
// Pure and deterministic.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "controller/planner/replan.h"

namespace everstep::planner {

inline constexpr std::uint32_t kUsualPace = 1000;  // per mille of the profile's speed
inline constexpr std::uint32_t kLeastPace = 20, kMostPace = 20'000;

struct NodePace {
  NodeId node = 0;
  std::uint32_t permille = kUsualPace;
  friend bool operator==(const NodePace&, const NodePace&) = default;
};

// `cuts` with a pace for each stage, whether or not they fit the memory.
Partition MeasurePaced(const ShapeCosts& costs, std::vector<std::uint32_t> cuts,
                       const std::vector<std::uint32_t>& paces);

// The division with the least T(4S) among those that fit the memory, of equals the first one.
// REQUIRES a pace above 0 for each stage. Nothing: not so many layers, or none fits.
std::optional<Partition> BestPacedPartition(const ShapeCosts& costs, const PartitionInput& input,
                                            const std::vector<std::uint32_t>& paces);

enum class Remedy : std::uint8_t { kNothing, kMicrobatches, kLayers, kEviction };

struct PacedPlan {
  Remedy remedy = Remedy::kNothing;
  Seated seated;                                 // with the microbatches that each pipeline gets
  std::vector<std::vector<std::uint32_t>> cuts;  // [pipeline] boundaries of its stages' layers
  std::vector<NodeId> evicted;
  std::int64_t time_ns = 0;  // of an iteration, at these paces
  std::int64_t moved_bytes = 0;
  std::int64_t move_ns = 0;
  friend bool operator==(const PacedPlan&, const PacedPlan&) = default;
};

struct PacedChoice {
  std::vector<PacedPlan> options;  // in the order above; what is impossible is not among them
  std::size_t best = 0;
  friend bool operator==(const PacedChoice&, const PacedChoice&) = default;
};

// Nodes without a pace have the usual one. With an expected time to the next change, plans are
// weighed by time x (1 + move / horizon); of equals the first. A refusal: a node that is not
// seated, a pace out of range.
Answer<PacedChoice> PlanForPaces(const Library& library, const Seated& now,
                                 const std::vector<NodePace>& paces, std::int64_t horizon_ns = 0);
// The same, with compositions asked for before.
Answer<PacedChoice> PlanForPaces(Composer* composer, const Seated& now,
                                 const std::vector<NodePace>& paces, std::int64_t horizon_ns = 0);

}  // namespace everstep::planner
