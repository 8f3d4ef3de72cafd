#include "controller/policy/plot.h"

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "controller/planner/picture.h"

namespace everstep::policy {
namespace {

using planner::Escaped;

constexpr double kHourUs = 3.6e9;

const char* ColourOf(const std::string& policy) {
  static const std::map<std::string, const char*> colours = {{"varuna", "#444444"},
                                                             {"bamboo", "#2e8b57"},
                                                             {"oobleck", "#ff8a1d"},
                                                             {"memory", "#7b5cd6"},
                                                             {"everstep", "#1f6fd6"}};
  const auto found = colours.find(policy);
  return found == colours.end() ? "#bb0000" : found->second;
}

std::string Head(double width, double height) {
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0f}\" height=\"{:.0f}\" "
      "font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" "
      "fill=\"white\"/>\n",
      width, height);
}

std::string Text(double x, double y, const std::string& text, const char* more = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, more, Escaped(text));
}

std::string Line(double x1, double y1, double x2, double y2, const char* colour) {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"/>\n", x1, y1, x2,
      y2, colour);
}

// Points of a course, at most one a column of pixels.
template <typename Value>
std::string Path(const std::vector<std::pair<std::int64_t, Value>>& points, double x0, double y0,
                 double per_us, double per_value, bool steps) {
  std::string d = fmt::format("M{:.1f} {:.1f}", x0, y0);
  double drawn = -1, last = y0;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const double x = x0 + static_cast<double>(points[i].first) * per_us;
    const double y = y0 - static_cast<double>(points[i].second) * per_value;
    if (x - drawn < 1 && i + 1 < points.size() && !steps) continue;
    if (steps) d += fmt::format("L{:.1f} {:.1f}", x, last);
    d += fmt::format("L{:.1f} {:.1f}", x, y);
    drawn = x;
    last = y;
  }
  return d;
}

}  // namespace

std::string CoursePlot(const Simulation& s) {
  constexpr double kWidth = 960, kLeft = 70, kRight = 150, kTop = 40, kNodes = 110, kGap = 30,
                   kSamples = 360;
  const double plot = kWidth - kLeft - kRight;
  const double per_us = plot / static_cast<double>(s.capacity.end_us);
  const double nodes_y = kTop + kNodes, samples_y = nodes_y + kGap + kSamples;
  std::string out = Head(kWidth, samples_y + 40);
  out += Text(8, 22, fmt::format("{} on {}", s.model, s.trace), "font-size=\"14\"");
  out += Line(kLeft, nodes_y, kLeft + plot, nodes_y, "#999");
  out += Line(kLeft, samples_y, kLeft + plot, samples_y, "#999");
  out += Text(8, kTop + 12, fmt::format("{} nodes", s.capacity.most_nodes));
  out += Text(8, nodes_y + kGap + 12, "100 %");
  out += Text(8, nodes_y + kGap + 26, "of the oracle");
  std::vector<std::pair<std::int64_t, std::uint32_t>> nodes = s.nodes;
  nodes.emplace_back(s.capacity.end_us, nodes.back().second);
  out += fmt::format(
      "<path d=\"{}\" fill=\"none\" stroke=\"#888\"/>\n",
      Path(nodes, kLeft, nodes_y, per_us, kNodes / std::max(1U, s.capacity.most_nodes), true));
  const double per_sample = s.oracle_samples > 0 ? kSamples / s.oracle_samples : 0;
  out += fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"#bbb\" stroke-dasharray=\"4 3\"/>\n",
                     Path(s.oracle_course, kLeft, samples_y, per_us, per_sample, false));
  out += Text(kLeft + plot + 6, samples_y - s.oracle_samples * per_sample, "oracle");
  std::vector<std::pair<double, const Report*>> labels;
  for (const Report& report : s.reports) {
    if (!report.possible) continue;
    out += fmt::format(
        "<path d=\"{}\" fill=\"none\" stroke=\"{}\" "
        "stroke-width=\"1.6\"><title>{}</title></path>\n",
        Path(report.course, kLeft, samples_y, per_us, per_sample, false), ColourOf(report.policy),
        Escaped(report.policy));
    labels.emplace_back(samples_y - report.samples * per_sample, &report);
  }
  std::sort(labels.begin(), labels.end());
  double free_y = samples_y - s.oracle_samples * per_sample + 13;
  for (const auto& [y, report] : labels) {
    const double at = std::max(y + 4, free_y);
    free_y = at + 13;
    out += Text(kLeft + plot + 6, at,
                fmt::format("{} {:.0f}%", report->policy, 100 * s.OfOracle(*report)),
                fmt::format("fill=\"{}\"", ColourOf(report->policy)).c_str());
  }
  const double hours = static_cast<double>(s.capacity.end_us) / kHourUs;
  for (int i = 0; i <= 4; ++i) {
    out += Text(kLeft + plot * i / 4 - 8, samples_y + 16, fmt::format("{:.1f} h", hours * i / 4));
  }
  return out + "</svg>\n";
}

std::string GridPlot(const std::vector<Simulation>& simulations) {
  constexpr double kName = 170, kPanel = 190, kGap = 16, kRow = 20, kTop = 60;
  std::vector<std::string> traces, models;
  for (const Simulation& s : simulations) {
    if (std::find(traces.begin(), traces.end(), s.trace) == traces.end()) traces.push_back(s.trace);
    if (std::find(models.begin(), models.end(), s.model) == models.end()) models.push_back(s.model);
  }
  const double width = kName + (kPanel + kGap) * static_cast<double>(models.size()) + 16;
  const double bottom = kTop + kRow * static_cast<double>(traces.size());
  std::string out = Head(width, bottom + 40);
  out += Text(8, 20, "committed samples, % of the oracle", "font-size=\"14\"");
  std::map<std::string, bool> seen;
  double legend = 260;
  for (const Simulation& s : simulations) {
    for (const Report& report : s.reports) {
      if (!seen.emplace(report.policy, true).second) continue;
      out += fmt::format("<circle cx=\"{:.1f}\" cy=\"16\" r=\"4\" fill=\"{}\"/>\n", legend,
                         ColourOf(report.policy));
      out += Text(legend + 8, 20, report.policy);
      legend += 90;
    }
  }
  const auto panel_x = [&](std::size_t model) {
    return kName + (kPanel + kGap) * static_cast<double>(model);
  };
  for (std::size_t m = 0; m < models.size(); ++m) {
    out += Text(panel_x(m), kTop - 14, models[m], "font-weight=\"bold\"");
    for (int percent = 0; percent <= 100; percent += 25) {
      const double x = panel_x(m) + kPanel * percent / 100;
      out += Line(x, kTop - 6, x, bottom, "#e4e4e4");
      out += Text(x - 6, bottom + 14, std::to_string(percent), "fill=\"#777\"");
    }
  }
  for (std::size_t t = 0; t < traces.size(); ++t) {
    const double y = kTop + kRow * (static_cast<double>(t) + 0.5);
    out += Text(8, y + 4, traces[t]);
    for (const Simulation& s : simulations) {
      if (s.trace != traces[t]) continue;
      const auto m = static_cast<std::size_t>(std::find(models.begin(), models.end(), s.model) -
                                              models.begin());
      out += Line(panel_x(m), y, panel_x(m) + kPanel, y, "#f0f0f0");
      for (const Report& report : s.reports) {
        if (!report.possible) continue;
        out += fmt::format(
            "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" fill=\"{}\" "
            "fill-opacity=\"0.85\"><title>{} "
            "{:.1f}%</title></circle>\n",
            panel_x(m) + kPanel * s.OfOracle(report), y, ColourOf(report.policy),
            Escaped(report.policy), 100 * s.OfOracle(report));
      }
    }
  }
  return out + "</svg>\n";
}

}  // namespace everstep::policy
