#include "controller/cli/plan_pace.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/table.h"
#include "controller/planner/pace.h"
#include "controller/planner/picture.h"

namespace everstep::cli {
namespace {

namespace pl = everstep::planner;

constexpr std::array<const char*, 4> kRemedies = {"nothing", "microbatches", "layers", "eviction"};

Result<std::vector<pl::NodePace>> ReadPaces(const std::string& text, std::uint32_t nodes) {
  std::vector<pl::NodePace> paces;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, comma - at);
    at = comma + 1;
    const std::size_t equals = word.find('=');
    const char* first = word.data() + (word.rfind('n', 0) == 0 ? 1 : 0);
    std::uint32_t node = 0;
    double speed = 0;
    if (equals != std::string::npos) {
      const char* end = word.data() + equals;
      const auto named = std::from_chars(first, end, node);
      const auto given = std::from_chars(end + 1, word.data() + word.size(), speed);
      if (named.ec == std::errc() && named.ptr == end && given.ec == std::errc() &&
          given.ptr == word.data() + word.size() && node < nodes && std::isfinite(speed) &&
          speed >= 0 && speed <= pl::kMostPace / pl::kUsualPace) {
        paces.push_back({node, static_cast<std::uint32_t>(std::lround(speed * pl::kUsualPace))});
        continue;
      }
    }
    return CliError{
        ExitCode::kUsage, "INVALID_ARGUMENT", fmt::format("--speed cannot be \"{}\"", word),
        fmt::format("a node of n0 to n{} and its part of the usual speed: n3=0.7", nodes - 1)};
  }
  return paces;
}

std::string NodesText(const std::vector<pl::NodeId>& nodes, const char* format) {
  std::vector<std::string> names;
  names.reserve(nodes.size());
  for (const pl::NodeId node : nodes) names.push_back(fmt::format(fmt::runtime(format), node));
  return fmt::format("{}", fmt::join(names, format[0] == '"' ? "," : " "));
}

double Seconds(std::int64_t ns) {
  return static_cast<double>(ns) / 1e9;
}

std::string OptionsJson(const pl::PacedChoice& choice) {
  std::vector<std::string> items;
  items.reserve(choice.options.size());
  for (std::size_t i = 0; i < choice.options.size(); ++i) {
    const pl::PacedPlan& plan = choice.options[i];
    std::vector<std::string> pipelines;
    pipelines.reserve(plan.cuts.size());
    for (std::size_t p = 0; p < plan.cuts.size(); ++p) {
      pipelines.push_back(
          fmt::format("{{\"nodes\":[{}],\"microbatches\":{},\"layersBeginAt\":[{}]}}",
                      NodesText(plan.seated.nodes[p], "\"n{}\""),
                      plan.seated.composition.pipelines[p].microbatches,
                      fmt::join(plan.cuts[p].begin(), plan.cuts[p].end() - 1, ",")));
    }
    items.push_back(
        fmt::format("{{\"remedy\":\"{}\",\"chosen\":{},\"seconds\":{:.9f},\"movedBytes\":\"{}\","
                    "\"moveSeconds\":"
                    "{:.9f},\"evicted\":[{}],\"pipelines\":[{}]}}",
                    kRemedies[static_cast<std::size_t>(plan.remedy)], i == choice.best,
                    Seconds(plan.time_ns), plan.moved_bytes, Seconds(plan.move_ns),
                    NodesText(plan.evicted, "\"n{}\""), fmt::join(pipelines, ",")));
  }
  return fmt::format("{{\"apiVersion\":\"everstep/v1\",\"kind\":\"PlanSpeeds\",\"items\":[{}]}}\n",
                     fmt::join(items, ","));
}

}  // namespace

Result<std::string> PacesShown(const pl::Library& library, const pl::Seated& seated,
                               const std::string& speeds, std::int64_t horizon_ns,
                               const RenderOptions& render, bool json) {
  const Result<std::vector<pl::NodePace>> paces = ReadPaces(speeds, seated.composition.nodes);
  if (!paces.ok()) return paces.error();
  const pl::Answer<pl::PacedChoice> answer =
      pl::PlanForPaces(library, seated, paces.value(), horizon_ns);
  if (!answer.ok()) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT", answer.refusal().what,
                    "what would work: " + answer.refusal().change};
  }
  const pl::PacedChoice& choice = answer.value();
  if (json) return OptionsJson(choice);
  Table options({{"REMEDY"},
                 {"ITERATION", Align::kRight},
                 {"SLOWER", Align::kRight},
                 {"MOVES", Align::kRight},
                 {"FOR", Align::kRight},
                 {"VERDICT"}});
  for (std::size_t i = 0; i < choice.options.size(); ++i) {
    const pl::PacedPlan& plan = choice.options[i];
    const double slower =
        static_cast<double>(plan.time_ns) / static_cast<double>(seated.composition.time_ns) - 1;
    std::string verdict = i == choice.best ? "chosen" : "";
    if (!plan.evicted.empty()) {
      verdict += (verdict.empty() ? "without " : ", without ") + NodesText(plan.evicted, "n{}");
    }
    options.Add({kRemedies[static_cast<std::size_t>(plan.remedy)], pl::TimeText(plan.time_ns),
                 fmt::format("{:.1f}%", 100 * slower), pl::SizeText(plan.moved_bytes),
                 pl::TimeText(plan.move_ns), verdict});
  }
  const pl::PacedPlan& best = choice.options[choice.best];
  std::map<pl::NodeId, std::uint32_t> given;
  for (const pl::NodePace& pace : paces.value()) given[pace.node] = pace.permille;
  Table who({{"PIPELINE", Align::kRight},
             {"MICROBATCHES", Align::kRight},
             {"NODE"},
             {"SPEED", Align::kRight},
             {"LAYERS"}});
  for (std::size_t p = 0; p < best.cuts.size(); ++p) {
    const pl::Pipeline& pipeline = best.seated.composition.pipelines[p];
    const pl::Shape shape = library.templates[pipeline.form].shape;
    for (std::uint32_t place = 0; place < best.seated.nodes[p].size(); ++place) {
      const std::uint32_t stage = place * shape.stages_per_node / shape.nodes_per_stage;
      const std::uint32_t first = best.cuts[p][stage];
      const std::uint32_t last = best.cuts[p][stage + shape.stages_per_node] - 1;
      const pl::NodeId node = best.seated.nodes[p][place];
      const auto pace = given.find(node);
      who.Add({place == 0 ? std::to_string(p) : " ",
               place == 0 ? std::to_string(pipeline.microbatches) : " ", fmt::format("n{}", node),
               pace == given.end() ? "1" : fmt::format("{}", pace->second / 1000.0),
               first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last)});
    }
  }
  return options.Format(render.headers, render.max_width) + "\n" +
         who.Format(render.headers, render.max_width);
}

}  // namespace everstep::cli
