// What a stage of one pipeline costs and whether it fits, by its place and its layers. Shared by
// the ways of dividing layers (partition.cc). Pure.
#pragma once

#include <algorithm>
#include <cstdint>

#include "controller/planner/partition.h"

namespace everstep::planner {

class StageRules {
 public:
  // `costs` must outlive it.
  StageRules(const ShapeCosts& costs, const PartitionInput& input)
      : costs_(costs), stages_(input.stages), most_(input.most_microbatches) {}

  const ShapeCosts& costs() const { return costs_; }
  std::uint32_t stages() const { return stages_; }
  std::uint32_t layers() const { return costs_.layers(); }

  // 0: an end of the pipeline; 1: between stages of one node; 2: between nodes.
  int EdgeKind(std::uint32_t j) const {
    if (j == 0 || j == stages_) return 0;
    return j % costs_.shape.stages_per_node == 0 ? 2 : 1;
  }
  // One transfer over boundary x between stages j - 1 and j.
  std::int64_t Edge(std::uint32_t j, std::uint32_t x) const {
    switch (EdgeKind(j)) {
      case 0: return 0;
      case 1: return costs_.inside[x];
      default: return costs_.between[x];
    }
  }
  // Stage i over layers [a, b): computing alone, and with what it sends.
  std::int64_t Plain(std::uint32_t a, std::uint32_t b) const {
    return costs_.time[b] - costs_.time[a];
  }
  std::int64_t Time(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    return Plain(a, b) + Edge(i, a) + Edge(i + 1, b);
  }
  // Microbatches whose activations stage i holds at once.
  std::int64_t InFlight(std::uint32_t i) const {
    return most_ == 0 ? stages_ - i : std::min(stages_ - i, most_);
  }
  std::int64_t Bytes(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    return costs_.resident[b] - costs_.resident[a] +
           InFlight(i) * (costs_.activation[b] - costs_.activation[a]);
  }
  bool Fits(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    return costs_.memory == 0 || Bytes(i, a, b) <= costs_.memory;
  }
  bool EveryLayerFitsEverywhere() const {
    if (costs_.memory == 0) return true;
    for (std::uint32_t l = 0; l < layers(); ++l) {
      if (!Fits(0, l, l + 1)) return false;
    }
    return true;
  }

 private:
  const ShapeCosts& costs_;
  std::uint32_t stages_;
  std::uint32_t most_;
};

}  // namespace everstep::planner
