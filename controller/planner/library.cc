#include "controller/planner/library.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include <fmt/format.h>

namespace everstep::planner {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

std::string GiB(std::int64_t bytes) {
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / kGiB);
}

std::vector<Shape> ShapesOf(const Profile& profile, std::uint32_t most_nodes) {
  std::vector<Shape> shapes;
  for (std::uint32_t s = std::bit_floor(profile.devices_per_node); s > 0; s /= 2) {
    if (profile.devices_per_node % s == 0) shapes.push_back({s, 1});
  }
  for (std::uint32_t s = 2; s <= most_nodes; s *= 2) shapes.push_back({1, s});
  return shapes;
}

// Stage after stage, from its first layer on: the layers up to l are sent once the gradients of l
// are final, which is when only the layers before it are left of the backward pass.
std::vector<Unsynced> UnsyncedOf(const Profile& profile, const Template& t) {
  std::vector<Unsynced> out;
  std::int64_t drain = 0;  // from this stage's end to the pipeline's
  for (const Stage& stage : t.stages) {
    Unsynced now{.hidden_ns = drain};
    for (std::uint32_t l = stage.first; l < stage.end; ++l) {
      const Layer& layer = profile.layers[l];
      ++now.layers;
      now.bytes += profile.GradientBytes(layer);
      const bool outlasted = std::any_of(out.begin(), out.end(), [&now](const Unsynced& other) {
        return other.layers >= now.layers && other.bytes >= now.bytes &&
               other.hidden_ns <= now.hidden_ns;
      });
      if (!outlasted) out.push_back(now);
      now.hidden_ns += (layer.backward_ns + t.devices - 1) / t.devices;
    }
    drain = now.hidden_ns;
  }
  return out;
}

Template FromPartition(const Profile& profile, const ShapeCosts& costs, std::uint32_t nodes,
                       Partition partition, std::uint32_t most_microbatches) {
  Template t;
  t.nodes = nodes;
  t.shape = costs.shape;
  t.devices = costs.devices;
  t.partition = std::move(partition);
  const std::vector<std::uint32_t>& cuts = t.partition.cuts;
  const std::uint32_t stages = t.partition.stages();
  t.stages.reserve(stages);
  for (std::uint32_t i = 0; i < stages; ++i) {
    std::int64_t optimizer = 0;
    for (std::uint32_t l = cuts[i]; l < cuts[i + 1]; ++l) {
      optimizer += profile.layers[l].optimizer_ns;
    }
    t.optimizer_ns = std::max(t.optimizer_ns, optimizer);
    t.stages.push_back({cuts[i], cuts[i + 1], StageNs(costs, cuts, i),
                        StageBytes(costs, cuts, i, most_microbatches)});
  }
  t.unsynced = UnsyncedOf(profile, t);
  return t;
}

std::optional<Template> InShape(const Profile& profile, const ShapeCosts& costs,
                                std::uint32_t nodes, std::uint32_t most_microbatches) {
  if (nodes % costs.shape.nodes_per_stage != 0) return std::nullopt;
  const std::uint64_t stages =
      std::uint64_t{nodes} * costs.shape.stages_per_node / costs.shape.nodes_per_stage;
  if (stages > costs.layers()) return std::nullopt;
  std::optional<Partition> found = BestPartition(
      costs,
      {.stages = static_cast<std::uint32_t>(stages), .most_microbatches = most_microbatches});
  if (!found) return std::nullopt;
  return FromPartition(profile, costs, nodes, std::move(*found), most_microbatches);
}

// Why no template of any size holds the model.
Refusal NothingFits(const Profile& profile, std::uint32_t most_microbatches) {
  std::int64_t least_memory = std::numeric_limits<std::int64_t>::max();
  std::uint32_t worst = 0;
  // The heaviest layer alone, on its lightest stage: the last, which holds one microbatch.
  for (const Shape& shape : ShapesOf(profile, 1)) {
    const auto costs = CostsOf(profile, shape);
    if (!costs) continue;
    std::int64_t heaviest = 0;
    std::uint32_t layer = 0;
    for (std::uint32_t l = 0; l < costs->layers(); ++l) {
      const std::int64_t bytes = costs->resident[l + 1] - costs->resident[l] +
                                 costs->activation[l + 1] - costs->activation[l];
      if (bytes > heaviest) {
        heaviest = bytes;
        layer = l;
      }
    }
    if (heaviest < least_memory) {
      least_memory = heaviest;
      worst = layer;
    }
  }
  if (least_memory == std::numeric_limits<std::int64_t>::max()) {
    return {fmt::format("a microbatch of {} does not divide among the {} devices of a node",
                        profile.microbatch, profile.devices_per_node),
            "a number of devices that has a power of two of stages each node, and a microbatch "
            "that the devices of a stage divide"};
  }
  if (least_memory > profile.device_memory_bytes) {
    return {fmt::format("layer {} needs {} on a device, which has {}", worst, GiB(least_memory),
                        GiB(profile.device_memory_bytes)),
            "a smaller microbatch, that layer divided, or larger devices"};
  }
  return {fmt::format("no division of {} layers fits devices of {}", profile.layers.size(),
                      GiB(profile.device_memory_bytes)),
          most_microbatches == 0 ? "a smaller microbatch, or a limit to the microbatches of a "
                                   "pipeline"
                                 : "a smaller microbatch, layers divided, or larger devices"};
}

// "2-5, 8"
std::string Ranges(const std::vector<std::uint32_t>& sorted) {
  std::string out;
  for (std::size_t i = 0; i < sorted.size();) {
    std::size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    out += i == 0 ? "" : ", ";
    out += last == i ? fmt::format("{}", sorted[i]) : fmt::format("{}-{}", sorted[i], sorted[last]);
    i = last + 1;
  }
  return out;
}

// The least memory of a device with which a pipeline of `nodes` nodes fits; 0: none does.
std::int64_t LeastMemory(Profile profile, std::uint32_t nodes, std::uint32_t most_microbatches) {
  const auto fits = [&](std::int64_t bytes) {
    profile.device_memory_bytes = bytes;
    const auto shapes = ShapesOf(profile, nodes);
    return std::any_of(shapes.begin(), shapes.end(), [&](const Shape& shape) {
      return MakeTemplate(profile, shape, nodes, most_microbatches).has_value();
    });
  };
  if (!fits(0)) return 0;
  std::int64_t low = 0, high = std::int64_t{1} << 30;
  while (!fits(high)) high *= 2;
  constexpr std::int64_t kStep = std::int64_t{1} << 20;
  while (high - low > kStep) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = middle;
  }
  return high;
}

// The smallest change with which `nodes`, which is no sum of f + 1 sizes or more, would be one.
std::string WhatWouldCover(const Library& library, const std::vector<std::uint32_t>& parts,
                           std::uint32_t nodes) {
  std::uint32_t least = library.input.faults + 1;
  for (std::uint32_t n = library.fewest_nodes; n < parts.size(); ++n) {
    least = std::min(least, parts[n]);
  }
  const std::string fewer = least > 0 ? fmt::format("faults of {}, or ", least - 1) : "";
  // A pipeline of the nodes that f smallest ones leave over.
  const std::uint32_t size = nodes - library.input.faults * library.least_nodes;
  const std::int64_t bytes = LeastMemory(library.profile, size, library.input.most_microbatches);
  if (bytes > 0) {
    return fmt::format("{}devices of {}, with which a pipeline of {} nodes fits", fewer, GiB(bytes),
                       size);
  }
  return fmt::format("{}a model of more layers than {}, which make no pipeline of {} nodes", fewer,
                     library.profile.layers.size(), size);
}

std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  for (int i = 0; i < 8; ++i) hash = (hash ^ ((value >> (8 * i)) & 0xFF)) * 0x100000001B3ULL;
  return hash;
}

}  // namespace

std::int64_t Template::MostWithin(std::int64_t ns) const {
  if (ns < partition.t1_ns) return 0;
  const std::int64_t left = ns - partition.t1_ns - partition.t3_ns;
  const std::int64_t w = partition.slowest_ns;
  const std::int64_t whole = left >= 0 ? left / w : -((-left + w - 1) / w);
  return whole + partition.stages() - partition.slowest + 1;
}

std::optional<Template> MakeTemplate(const Profile& profile, Shape shape, std::uint32_t nodes,
                                     std::uint32_t most_microbatches) {
  const auto costs = CostsOf(profile, shape);
  if (!costs || nodes == 0) return std::nullopt;
  return InShape(profile, *costs, nodes, most_microbatches);
}

std::vector<Template> MakeTemplates(const Profile& profile, std::uint32_t most,
                                    std::uint32_t most_microbatches) {
  std::vector<Template> out;
  out.reserve(most);
  for (const Shape& shape : ShapesOf(profile, most)) {
    const auto costs = CostsOf(profile, shape);
    if (!costs) continue;
    for (std::uint32_t n = shape.nodes_per_stage; n <= most; n += shape.nodes_per_stage) {
      if (auto found = InShape(profile, *costs, n, most_microbatches)) {
        out.push_back(std::move(*found));
      } else if (std::uint64_t{n} * shape.stages_per_node / shape.nodes_per_stage >
                 costs->layers()) {
        break;  // more nodes make more stages
      }
    }
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const Template& a, const Template& b) { return a.nodes < b.nodes; });
  return out;
}

std::vector<std::uint32_t> MostParts(const std::vector<std::uint32_t>& sizes, std::uint32_t most) {
  std::vector<std::uint32_t> parts(most + 1, 0);
  for (std::uint32_t n = 1; n <= most; ++n) {
    for (const std::uint32_t size : sizes) {
      if (size > n) break;
      if (size == n || parts[n - size] > 0) parts[n] = std::max(parts[n], parts[n - size] + 1);
    }
  }
  return parts;
}

Answer<Library> MakeLibrary(const Profile& profile, const LibraryInput& input) {
  if (input.nodes == 0 || input.nodes > kMaxNodes) {
    return Refusal{fmt::format("{} nodes", input.nodes), fmt::format("1 to {}", kMaxNodes)};
  }
  if (input.faults > kMaxFaults) {
    return Refusal{fmt::format("{} faults", input.faults), fmt::format("0 to {}", kMaxFaults)};
  }
  Library library{.profile = profile, .input = input};
  const std::uint32_t f = input.faults;
  std::vector<Template> all = MakeTemplates(profile, input.nodes, input.most_microbatches);
  if (all.empty()) {
    // Would more nodes do? Beyond a stage for each layer they would not.
    const auto most =
        static_cast<std::uint32_t>(std::min<std::size_t>(profile.layers.size(), kMaxNodes));
    for (std::uint32_t n = input.nodes + 1; n <= most; ++n) {
      for (const Shape& shape : ShapesOf(profile, 1)) {
        if (!MakeTemplate(profile, shape, n, input.most_microbatches)) continue;
        return Refusal{
            fmt::format("{} nodes cannot hold the model, whose smallest pipeline has {}",
                        input.nodes, n),
            fmt::format("{} nodes for {} {}", (f + 1) * n, f + 1, f == 0 ? "copy" : "copies")};
      }
    }
    return NothingFits(profile, input.most_microbatches);
  }
  library.least_nodes = all.front().nodes;
  const std::uint32_t n0 = library.least_nodes;
  library.fewest_nodes = (f + 1) * n0;
  if (library.fewest_nodes > input.nodes) {
    return Refusal{
        fmt::format("{} copies of a pipeline of {} nodes need {} nodes; there are {}", f + 1, n0,
                    library.fewest_nodes, input.nodes),
        fmt::format("{} nodes, or faults of {}", library.fewest_nodes, input.nodes / n0 - 1)};
  }
  const std::uint32_t most = input.nodes - f * n0;
  std::erase_if(all, [most](const Template& t) { return t.nodes > most; });
  library.templates = std::move(all);
  for (const Template& t : library.templates) {
    if (library.sizes.empty() || library.sizes.back() != t.nodes) library.sizes.push_back(t.nodes);
  }
  const std::vector<std::uint32_t> parts = MostParts(library.sizes, input.nodes);
  for (std::uint32_t n = library.fewest_nodes; n <= input.nodes; ++n) {
    if (parts[n] > f) continue;
    return Refusal{
        fmt::format("{} nodes are no sum of {} or more of the template sizes, which are {}", n,
                    f + 1, Ranges(library.sizes)),
        WhatWouldCover(library, parts, n)};
  }
  library.fingerprint =
      Mix(Mix(Mix(Fingerprint(profile), input.nodes), f), input.most_microbatches);
  return library;
}

std::int64_t SyncNs(const Profile& profile, const Template& t, std::uint32_t copies) {
  const std::uint32_t replicas = copies * t.devices;
  if (replicas <= 1) return 0;
  const Link& link = copies > 1 || t.shape.nodes_per_stage > 1 ? profile.between : profile.inside;
  const std::int64_t rounds = std::bit_width(replicas - 1);
  const auto hops = static_cast<double>(2 * rounds * link.latency_ns);
  // Stages of one node share its link.
  const double factor = 2.0 * (replicas - 1) / replicas * t.shape.stages_per_node;
  const double ns_per_byte =
      link.bytes_per_s == 0 ? 0 : factor * 1e9 / static_cast<double>(link.bytes_per_s);
  std::int64_t exposed = 0;
  for (const Unsynced& u : t.unsynced) {
    const double ns =
        static_cast<double>(u.layers) * hops + static_cast<double>(u.bytes) * ns_per_byte;
    exposed = std::max(exposed, static_cast<std::int64_t>(std::min(ns, 1e15)) - u.hidden_ns);
  }
  return exposed;
}

}  // namespace everstep::planner
