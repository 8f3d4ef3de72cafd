#include "controller/planner/picture.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace everstep::planner {
namespace {

constexpr std::size_t kBar = 32;  // columns of the longest bar

std::string Name(const std::vector<std::string>& names, NodeId node) {
  return node < names.size() ? names[node] : fmt::format("n{}", node);
}

// The nodes of a stage of a pipeline: "n3", "n3-n6".
std::string NodesOf(const Template& t, std::uint32_t stage, const std::vector<NodeId>& nodes,
                    const std::vector<std::string>& names) {
  const std::uint32_t first = stage / t.shape.stages_per_node * t.shape.nodes_per_stage;
  std::string text = Name(names, nodes[first]);
  for (std::uint32_t i = 1; i < t.shape.nodes_per_stage; ++i) {
    text += ' ';
    text += Name(names, nodes[first + i]);
  }
  return text;
}

std::string LayersText(const Stage& stage) {
  return stage.end - stage.first == 1 ? fmt::format("{}", stage.first)
                                      : fmt::format("{}-{}", stage.first, stage.end - 1);
}

std::int64_t SlowestStage(const Library& library, const Seated& seated) {
  std::int64_t slowest = 1;
  for (const Pipeline& p : seated.composition.pipelines) {
    slowest = std::max(slowest, library.templates[p.form].partition.slowest_ns);
  }
  return slowest;
}

}  // namespace

std::string Escaped(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string TimeText(std::int64_t ns) {
  const auto value = static_cast<double>(ns);
  if (ns >= 1'000'000'000) return fmt::format("{:.3f} s", value / 1e9);
  if (ns >= 1'000'000) return fmt::format("{:.1f} ms", value / 1e6);
  if (ns >= 1'000) return fmt::format("{:.1f} us", value / 1e3);
  return fmt::format("{} ns", ns);
}

std::string SizeText(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes >= std::int64_t{1} << 30) return fmt::format("{:.1f} GiB", std::ldexp(value, -30));
  if (bytes >= std::int64_t{1} << 20) return fmt::format("{:.1f} MiB", std::ldexp(value, -20));
  if (bytes >= std::int64_t{1} << 10) return fmt::format("{:.1f} KiB", std::ldexp(value, -10));
  return fmt::format("{} B", bytes);
}

std::string ShapeText(Shape shape) {
  if (shape.stages_per_node > 1) return fmt::format("{} a node", shape.stages_per_node);
  if (shape.nodes_per_stage > 1) return fmt::format("on {} nodes", shape.nodes_per_stage);
  return "one a node";
}

std::string PlanPicture(const Library& library, const Seated& seated,
                        const std::vector<std::string>& names) {
  const std::int64_t slowest = SlowestStage(library, seated);
  std::size_t node_width = 0, layer_width = 0;
  for (std::size_t i = 0; i < seated.nodes.size(); ++i) {
    const Template& t = library.templates[seated.composition.pipelines[i].form];
    for (std::uint32_t s = 0; s < t.stages.size(); ++s) {
      node_width = std::max(node_width, NodesOf(t, s, seated.nodes[i], names).size());
      layer_width = std::max(layer_width, LayersText(t.stages[s]).size());
    }
  }
  std::string out;
  for (std::size_t i = 0; i < seated.nodes.size(); ++i) {
    const Pipeline& p = seated.composition.pipelines[i];
    const Template& t = library.templates[p.form];
    out += fmt::format("pipeline {}: {} node{}, {} microbatch{} in {}\n", i, t.nodes,
                       t.nodes == 1 ? "" : "s", p.microbatches, p.microbatches == 1 ? "" : "es",
                       TimeText(p.time_ns));
    for (std::uint32_t s = 0; s < t.stages.size(); ++s) {
      const Stage& stage = t.stages[s];
      const auto bar = static_cast<std::size_t>(
          std::max<std::int64_t>(1, stage.time_ns * static_cast<std::int64_t>(kBar) / slowest));
      out += fmt::format("  {:<{}}  layers {:<{}}  {:<{}}  {:>9}  {:>9}{}\n",
                         NodesOf(t, s, seated.nodes[i], names), node_width, LayersText(stage),
                         layer_width, std::string(bar, '='), kBar, TimeText(stage.time_ns),
                         SizeText(stage.bytes),
                         t.stages.size() > 1 && s == t.partition.slowest ? "  slowest" : "");
    }
  }
  return out;
}

std::string PlanSvg(const Library& library, const Seated& seated,
                    const std::vector<std::string>& names) {
  constexpr int kWidth = 960, kLeft = 110, kRow = 56, kTop = 40;
  constexpr double kLetter = 6.1;  // pixels of its width
  const std::int64_t slowest = SlowestStage(library, seated);
  const auto layers = static_cast<double>(library.profile.layers.size());
  const int height = kTop + kRow * static_cast<int>(seated.nodes.size()) + 16;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" "
      "font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" "
      "fill=\"white\"/>\n<text x=\"8\" y=\"22\" font-size=\"14\">{} nodes, {} pipelines, {} "
      "microbatches: {} an iteration</text>\n",
      kWidth, height, seated.composition.nodes, seated.nodes.size(),
      seated.composition.microbatches, TimeText(seated.composition.time_ns));
  for (std::size_t i = 0; i < seated.nodes.size(); ++i) {
    const Pipeline& p = seated.composition.pipelines[i];
    const Template& t = library.templates[p.form];
    const int y = kTop + kRow * static_cast<int>(i);
    out += fmt::format("<text x=\"8\" y=\"{}\">{} x {}</text>\n", y + 26, p.microbatches,
                       TimeText(t.partition.slowest_ns));
    for (std::uint32_t s = 0; s < t.stages.size(); ++s) {
      const Stage& stage = t.stages[s];
      const double scale = (kWidth - kLeft - 16) / layers;
      const double x = kLeft + scale * stage.first;
      const double width = scale * (stage.end - stage.first) - 2;
      // Blue for quick stages, red for those that everything waits for.
      const auto heat = static_cast<int>(120 * stage.time_ns / slowest);
      const std::string nodes = NodesOf(t, s, seated.nodes[i], names);
      out += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{}\" width=\"{:.1f}\" height=\"40\" rx=\"3\" "
          "fill=\"hsl({},60%,80%)\" stroke=\"#555\"><title>{}: layers {}, {}, {}</title></rect>\n",
          x, y, width, (240 + heat) % 360, Escaped(nodes), LayersText(stage),
          TimeText(stage.time_ns), SizeText(stage.bytes));
      // What does not fit its box is in its title alone.
      const std::string layers_text = LayersText(stage);
      const auto letters = static_cast<double>(std::max(nodes.size(), layers_text.size()));
      if (kLetter * letters + 4 > width) continue;
      out += fmt::format(
          "<text x=\"{:.1f}\" y=\"{}\">{}</text>\n<text x=\"{:.1f}\" y=\"{}\" fill=\"#444\">{}"
          "</text>\n",
          x + 4, y + 16, Escaped(nodes), x + 4, y + 32, layers_text);
    }
  }
  return out + "</svg>\n";
}

}  // namespace everstep::planner
