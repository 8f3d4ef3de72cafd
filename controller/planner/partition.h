// Dividing a model's layers among the stages of one pipeline: the exact optimum.
//
// Objective (Oobleck, SOSP '23, section 4.1.2, equations 1-4): with w_i the time of a microbatch's
// forward and backward pass on stage i, k the rightmost slowest of S stages and m microbatches,
//
//   T(m) = T1 + T2 + T3,   T1 = sum w_i,   T2 = (m - S + k - 1) w_k,   T3 = sum_{i>=k} w_i
//
// compared at m = 4S. We differ in three ways.
//  - A transfer occupies its sender: w_i has the activation that stage i sends on and the gradient
//    that it sends back, over the link that really lies there. T1 is then the true time of one
//    microbatch through the pipeline and back.
//  - 1F1B's memory: stage i holds the activations of min(S - i, m) microbatches, not of one.
//  - For m < S, where T2 + T3 may be negative, they count 0: one microbatch takes T1.
//
// Exact: for each layer range that could be the slowest stage k its time W bounds the stages before
// it (<= W) and after it (< W); T then depends on W, k and the range alone, so the best range whose
// both sides can be divided is the optimum. Ranges are tried in the order of T. Where transfers
// cost the same at every boundary, whether a side can be divided is a greedy pass, O(S log L) for
// each W; where they differ, or a layer fits the memory of some stages only, it is a dynamic
// program over boundaries for each W, O(L * longest stage * S). A dynamic program over sub-plans
// (Oobleck's own) is not exact: the best part need not make the best whole.
//
// Pure and deterministic: of equal T, the smallest W, then k, then first layer of stage k.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "controller/planner/profile.h"

namespace everstep::planner {

// How stages lie on nodes: several on each node, or each on several nodes. Powers of two, one of
// them 1. The devices of a stage divide each microbatch among them.
struct Shape {
  std::uint32_t stages_per_node = 1;
  std::uint32_t nodes_per_stage = 1;
  friend auto operator<=>(const Shape&, const Shape&) = default;
};

// What stages cost in a shape: sums over the layers before each boundary. Boundary x lies before
// layer x, 0..L.
struct ShapeCosts {
  Shape shape;
  std::uint32_t devices = 1;         // of a stage
  std::vector<std::int64_t> time;    // sum of forward + backward, ns, one microbatch
  std::vector<std::int64_t> inside;  // one transfer over the boundary, ns, within a node
  std::vector<std::int64_t> between;
  std::vector<std::int64_t> resident;    // sum of bytes of each device, whatever it computes
  std::vector<std::int64_t> activation;  // sum of bytes of each device for one microbatch
  std::int64_t memory = 0;               // of a device; 0: not limited
  std::int64_t longest_layer = 0;        // ns
  bool uniform = true;                   // transfers cost the same at every boundary

  std::uint32_t layers() const { return static_cast<std::uint32_t>(time.size()) - 1; }
};

// Nothing: the shape does not fit the nodes' devices or the microbatch.
std::optional<ShapeCosts> CostsOf(const Profile& profile, Shape shape);

struct Partition {
  std::vector<std::uint32_t> cuts;  // S + 1 boundaries, 0 and L among them
  std::int64_t t1_ns = 0;
  std::int64_t slowest_ns = 0;  // w_k
  std::int64_t t3_ns = 0;
  std::uint32_t slowest = 0;  // k

  std::uint32_t stages() const { return static_cast<std::uint32_t>(cuts.size()) - 1; }
  // T(m), m >= 1.
  std::int64_t TimeNs(std::int64_t microbatches) const;
};

// The time of stage i of `cuts`, and the most bytes a device of it holds with m microbatches.
std::int64_t StageNs(const ShapeCosts& costs, const std::vector<std::uint32_t>& cuts,
                     std::uint32_t i);
std::int64_t StageBytes(const ShapeCosts& costs, const std::vector<std::uint32_t>& cuts,
                        std::uint32_t i, std::uint32_t microbatches);

// What `cuts` make, whether or not they fit the memory.
Partition Measure(const ShapeCosts& costs, std::vector<std::uint32_t> cuts);

struct PartitionInput {
  std::uint32_t stages = 1;
  // A pipeline that never gets more than this many keeps fewer activations. 0: any number.
  std::uint32_t most_microbatches = 0;
  bool by_tables = false;  // the dynamic program where the greedy pass would do; for tests
};

// Nothing: not so many layers, or no division fits the memory.
std::optional<Partition> BestPartition(const ShapeCosts& costs, const PartitionInput& input);

}  // namespace everstep::planner
