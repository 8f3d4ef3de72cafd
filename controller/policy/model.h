// What a simulation knows of a model: how fast each way of training it is on any number of nodes,
// and what its faults cost. Measured where somebody measured it, planned otherwise.
//
//   everstep-model 1
//   model = GPT-3-6.7b
//   batch = 1024               samples of one iteration
//   least-nodes = 8            whose memory holds one copy
//   reconfigure-s = 10         a switch of pipelines in place
//   checkpoint-s = 120         training stands still while one is written
//   restart-s = 701            of all processes, from a checkpoint
//   rebalance-s = 450          Bamboo's, after a loss that its shadows cover
//   redundant-stages = 6       of a Bamboo pipeline
//   nodes,grid,templates,redundant,restart_s
//   15,3.016,0,,
//   ...
//
// The columns are samples a second: `grid` of the best equal pipelines, `templates` of Oobleck's
// unequal ones, `redundant` of Bamboo; restart_s where it differs by nodes. Empty: not known.
// Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "controller/planner/profile.h"

namespace everstep::policy {

using planner::Answer;
using planner::Refusal;

inline constexpr std::uint32_t kMaxModelNodes = 1024;

// Samples a second by number of nodes, as they were measured: of `first`, `first` + 1, ...
struct Curve {
  std::uint32_t first = 0;
  std::vector<double> speeds;  // empty: nobody measured it, or it does not fit the memory

  std::uint32_t last() const { return first + static_cast<std::uint32_t>(speeds.size()) - 1; }
};

struct ModelTable {
  std::string name;
  std::string source;  // where the figures are from, for people
  double batch = 0;
  std::uint32_t least_nodes = 1;
  double reconfigure_s = 0;
  double checkpoint_s = 0;
  double restart_s = 0;
  std::optional<double> rebalance_s;   // nothing: Bamboo has no room for it
  std::uint32_t redundant_stages = 6;  // the steps of Bamboo's published curves
  Curve grid, templates, redundant;
  Curve restart;  // seconds by nodes; empty: restart_s
};

// The form above. A refusal names the line or the setting.
Answer<ModelTable> ParseModel(std::string_view text);

// The same from the three tables of Oobleck's artifact (throughput_by_nodes.csv,
// recovery_params.csv, varuna_restart_s_by_nodes.csv). The fewest nodes that hold one copy are not
// in them: ours by parameters and 16 GiB, stated beside every result.
Answer<ModelTable> PublishedModel(std::string_view throughput, std::string_view recovery,
                                  std::string_view restart, const std::string& name);

// The models of those tables.
std::vector<std::string> PublishedModels();

// Speeds for every number of nodes, 0 where there are too few, and the profile that says where the
// layers lie. No clamping: under its first row a curve goes to 0 in proportion to the nodes and is
// 0 below what holds it; above its last row more nodes stay idle.
struct Model {
  std::string name;
  std::string source;
  double batch = 0;
  std::uint32_t copies = 2;       // of each layer, for pipelines that survive losses
  std::uint32_t least_nodes = 1;  // of one copy
  std::uint32_t most_nodes = 0;   // that a job uses
  // [nodes], 0 .. most_nodes: samples a second.
  std::vector<double> grid, templates, redundant, ours;
  std::vector<double> best;  // of all of them on at most so many nodes: the oracle
  std::uint32_t redundant_stages = 6;
  std::int64_t reconfigure_us = 0, checkpoint_us = 0, rebalance_us = 0;
  std::vector<std::int64_t> restart_us;  // [nodes]
  planner::Profile profile;
  std::uint64_t microbatches = 0;  // of an iteration

  double Of(const std::vector<double>& curve, std::size_t nodes) const {
    return curve[nodes < curve.size() ? nodes : curve.size() - 1];
  }
};

// Of `from`..`to` nodes those with which `curve` is fastest, the fewest of equals; 0: with none.
std::uint32_t FastestWithin(const std::vector<double>& curve, std::uint32_t from, std::uint32_t to);

struct Speeds {
  // Every way of training as fast as the fastest of them: what is left are recovery's differences.
  bool same = false;
  std::uint32_t faults = 1;  // f: pipelines keep f + 1 copies
};

// The table's speeds. The profile's node memory is set so that the table's least_nodes hold a copy,
// and its times are scaled so that the planner's iteration on the most nodes is as long as
// measured.
Answer<Model> MeasuredModel(const ModelTable& table, const planner::Profile& profile,
                            const Speeds& speeds);

// Speeds from the planner: of its compositions for pipelines, of its best grid of equal pipelines
// for everybody else; none for Bamboo. `table` gives the batch and the costs; its curves are not
// read. REQUIRES most_nodes >= 1.
Answer<Model> PlannedModel(const ModelTable& table, const planner::Profile& profile,
                           std::uint32_t most_nodes, const Speeds& speeds);

// Costs of a model that nobody measured, by its state and in the proportions of the published ones:
// a checkpoint at 0.8 GB/s and 5 s, a restart at 0.15 GB/s and 60 s, 10 s for a switch in place.
ModelTable AssumedCosts(const planner::Profile& profile, double batch);

}  // namespace everstep::policy
