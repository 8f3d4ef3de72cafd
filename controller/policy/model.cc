#include "controller/policy/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "controller/planner/compose.h"
#include "controller/policy/table_text.h"

namespace everstep::policy {
namespace {

constexpr double kSecondUs = 1e6;
constexpr double kMostSeconds = 1e6;
constexpr std::string_view kFirstLine = "everstep-model 1";

std::int64_t Us(double seconds) {
  return std::llround(seconds * kSecondUs);
}

// Rows must be consecutive numbers of nodes; empty cells may stand at the ends only.
std::optional<Refusal> Fill(const TextTable& table, std::string_view column, Curve* curve) {
  const auto nodes = table.Column("nodes");
  const auto at = table.Column(column);
  if (!at) return std::nullopt;
  std::map<std::uint32_t, double> values;
  for (const std::vector<std::string>& row : table.rows) {
    const auto n = ParseNumber(row[*nodes]);
    if (!n || *n < 1 || *n > kMaxModelNodes || *n != std::floor(*n)) {
      return Refusal{fmt::format("{} nodes", row[*nodes]), fmt::format("1 to {}", kMaxModelNodes)};
    }
    if (row[*at].empty()) continue;
    const auto value = ParseNumber(row[*at]);
    if (!value) {
      return Refusal{fmt::format("{} of {} nodes is \"{}\"", column, row[*nodes], row[*at]),
                     "a number of at least 0"};
    }
    if (!values.emplace(static_cast<std::uint32_t>(*n), *value).second) {
      return Refusal{fmt::format("{} nodes stand there twice", row[*nodes]), "one row for each"};
    }
  }
  if (values.empty()) return std::nullopt;
  curve->first = values.begin()->first;
  curve->speeds.clear();
  curve->speeds.reserve(values.size());
  for (const auto& [n, value] : values) {
    if (n != curve->first + curve->speeds.size()) {
      return Refusal{
          fmt::format("{} of {} nodes is missing", column, curve->first + curve->speeds.size()),
          "a row for each number of nodes between the first and the last"};
    }
    curve->speeds.push_back(value);
  }
  return std::nullopt;
}

std::string_view Trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// The table's curve for 0..most nodes; nothing below `least`.
std::vector<double> Extended(const Curve& curve, std::uint32_t least, std::uint32_t most) {
  std::vector<double> out(most + 1, 0.0);
  if (curve.speeds.empty()) return out;
  for (std::uint32_t n = std::max(1U, least); n <= most; ++n) {
    if (n < curve.first) {
      out[n] = curve.speeds.front() * n / curve.first;
    } else {
      out[n] = curve.speeds[std::min<std::size_t>(n, curve.last()) - curve.first];
    }
  }
  return out;
}

// Curves are there: the rest of a model that follows from them.
void Finish(const Speeds& speeds, Model* model) {
  const std::size_t rows = model->most_nodes + 1;
  model->copies = speeds.faults + 1;
  model->ours.assign(rows, 0.0);
  model->best.assign(rows, 0.0);
  const std::uint32_t fewest = model->copies * model->least_nodes;
  if (speeds.same) {
    const bool redundant = *std::max_element(model->redundant.begin(), model->redundant.end()) > 0;
    for (std::uint32_t n = 0; n < rows; ++n) {
      const double fastest = std::max(model->grid[n], model->templates[n]);
      model->grid[n] = fastest;
      if (n >= fewest) model->templates[n] = fastest;
      if (redundant) model->redundant[n] = fastest;
    }
  }
  for (std::uint32_t n = 0; n < rows; ++n) {
    model->ours[n] = std::max(model->grid[n], model->templates[n]);
    model->best[n] = std::max({n == 0 ? 0.0 : model->best[n - 1], model->grid[n],
                               model->templates[n], model->redundant[n]});
  }
}

void TakeCosts(const ModelTable& table, Model* model) {
  model->name = table.name;
  model->batch = table.batch;
  model->reconfigure_us = Us(table.reconfigure_s);
  model->checkpoint_us = Us(table.checkpoint_s);
  model->rebalance_us = Us(table.rebalance_s.value_or(0));
  model->redundant_stages = table.redundant_stages;
  model->restart_us.assign(model->most_nodes + 1, Us(table.restart_s));
  if (table.restart.speeds.empty()) return;
  for (std::uint32_t n = 0; n <= model->most_nodes; ++n) {
    const std::uint32_t row = std::clamp(n, table.restart.first, table.restart.last());
    model->restart_us[n] = Us(table.restart.speeds[row - table.restart.first]);
  }
}

// Microbatches of one iteration, and the memory with which `least` nodes just hold a copy.
std::optional<Refusal> FitProfile(double batch, std::uint32_t least, Model* model) {
  planner::Profile& profile = model->profile;
  model->microbatches = std::max<std::uint64_t>(
      1, static_cast<std::uint64_t>(std::llround(batch / profile.microbatch)));
  if (model->microbatches > planner::kMaxMicrobatches) {
    return Refusal{fmt::format("{} microbatches an iteration", model->microbatches),
                   fmt::format("at most {}", planner::kMaxMicrobatches)};
  }
  const auto holds = [&](std::int64_t bytes) {
    profile.device_memory_bytes = bytes;
    return !planner::MakeTemplates(profile, least).empty();
  };
  constexpr std::int64_t kStep = std::int64_t{64} << 20;
  std::int64_t low = 0, high = (std::int64_t{4} << 40) / kStep;  // in steps; high holds it
  if (!holds(high * kStep)) {
    return Refusal{fmt::format("{} nodes for {} layers", least, profile.layers.size()),
                   "no more nodes for one copy than the profile has layers"};
  }
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (holds(middle * kStep) ? high : low) = middle;
  }
  profile.device_memory_bytes = high * kStep;
  return std::nullopt;
}

// One factor on the layers' times, with which the planner's best iteration on the most nodes takes
// as long as was measured, or nearly where links take most of it: it weighs moves and losses
// against iterations.
std::optional<Refusal> Calibrate(const Speeds& speeds, Model* model) {
  const double measured_ns = model->batch / model->ours.back() * 1e9;
  constexpr int kRounds = 12;
  for (int round = 0; round < kRounds; ++round) {
    const planner::Answer<planner::Library> library =
        planner::MakeLibrary(model->profile, {.nodes = model->most_nodes, .faults = speeds.faults});
    if (!library.ok()) return library.refusal();
    const planner::Answer<planner::Composition> planned = planner::Compose(
        library.value(), {.nodes = model->most_nodes, .microbatches = model->microbatches});
    if (!planned.ok()) return planned.refusal();
    const double factor = measured_ns / static_cast<double>(planned.value().time_ns);
    if (std::abs(factor - 1) < 0.005) break;
    const auto scale = [factor](std::int64_t* ns) {
      *ns = std::max<std::int64_t>(1, std::llround(static_cast<double>(*ns) * factor));
    };
    for (planner::Layer& layer : model->profile.layers) {
      scale(&layer.forward_ns);
      scale(&layer.backward_ns);
      if (layer.optimizer_ns > 0) scale(&layer.optimizer_ns);
    }
    const planner::Answer<planner::Profile> checked = planner::CheckProfile(model->profile);
    if (!checked.ok()) return checked.refusal();
  }
  return std::nullopt;
}

}  // namespace

Answer<ModelTable> ParseModel(std::string_view text) {
  if (text.size() > kMaxTableBytes) {
    return Refusal{fmt::format("a model of {} bytes", text.size()),
                   fmt::format("at most {}", kMaxTableBytes)};
  }
  ModelTable out;
  const std::map<std::string_view, double*> numbers = {{"batch", &out.batch},
                                                       {"reconfigure-s", &out.reconfigure_s},
                                                       {"checkpoint-s", &out.checkpoint_s},
                                                       {"restart-s", &out.restart_s}};
  const std::map<std::string_view, std::uint32_t*> counts = {
      {"least-nodes", &out.least_nodes}, {"redundant-stages", &out.redundant_stages}};
  std::set<std::string> seen;
  bool first = true;
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    const std::string_view line = Trimmed(rest.substr(0, end));
    if (first && line != kFirstLine) {
      return Refusal{fmt::format("the first line is \"{}\"", line.substr(0, 80)),
                     std::string(kFirstLine)};
    }
    const std::size_t equals = line.find('=');
    if (!first && !line.empty() && line[0] != '#' && equals == std::string_view::npos) break;
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    if (first || line.empty() || line[0] == '#') {
      first = false;
      continue;
    }
    const std::string_view key = Trimmed(line.substr(0, equals));
    const std::string_view value = Trimmed(line.substr(equals + 1));
    if (!seen.emplace(key).second) {
      return Refusal{fmt::format("{} stands there twice", key), "each setting once"};
    }
    if (key == "model") {
      out.name = std::string(value.substr(0, 200));
      continue;
    }
    const auto number = ParseNumber(value);
    if (!number || *number > (key == "batch" ? 1e9 : kMostSeconds)) {
      return Refusal{fmt::format("{} is \"{}\"", key, value.substr(0, 80)), "a number, at least 0"};
    }
    if (const auto at = numbers.find(key); at != numbers.end()) {
      *at->second = *number;
    } else if (const auto count = counts.find(key); count != counts.end()) {
      if (*number < 1 || *number > kMaxModelNodes || *number != std::floor(*number)) {
        return Refusal{fmt::format("{} is {}", key, value), fmt::format("1 to {}", kMaxModelNodes)};
      }
      *count->second = static_cast<std::uint32_t>(*number);
    } else if (key == "rebalance-s") {
      out.rebalance_s = *number;
    } else {
      return Refusal{fmt::format("no setting is called \"{}\"", key.substr(0, 80)),
                     "model, batch, least-nodes, reconfigure-s, checkpoint-s, restart-s, "
                     "rebalance-s, redundant-stages"};
    }
  }
  if (first) return Refusal{"an empty text", std::string(kFirstLine)};
  for (const char* needed : {"model", "batch", "restart-s", "checkpoint-s", "reconfigure-s"}) {
    if (seen.count(needed) == 0) {
      return Refusal{fmt::format("{} is missing", needed), fmt::format("{} = ...", needed)};
    }
  }
  if (out.batch < 1) return Refusal{fmt::format("a batch of {}", out.batch), "at least 1"};
  out.source = "a model table";
  const Answer<TextTable> table = ParseTable(rest);
  if (!table.ok()) return table.refusal();
  if (table.value().columns.empty()) return out;
  if (!table.value().Column("nodes")) return Refusal{"no column is called nodes", "nodes,grid,..."};
  for (const auto& [column, curve] :
       std::array<std::pair<std::string_view, Curve*>, 4>{{{"grid", &out.grid},
                                                           {"templates", &out.templates},
                                                           {"redundant", &out.redundant},
                                                           {"restart_s", &out.restart}}}) {
    if (auto refused = Fill(table.value(), column, curve)) return *refused;
  }
  return out;
}

namespace {

struct Known {
  std::string_view name;
  std::uint32_t least_nodes;
};
constexpr std::array<Known, 5> kPublished = {
    {{"BERT-large", 2}, {"GPT-2", 2}, {"GPT-3-medium", 3}, {"GPT-3-2.7b", 5}, {"GPT-3-6.7b", 8}}};

// The rows whose columns have these values, `column` of them as a curve by "nodes".
Answer<Curve> CurveOf(std::string_view text, const std::map<std::string, std::string>& where,
                      const std::string& column) {
  const Answer<TextTable> table = ParseTable(text);
  if (!table.ok()) return table.refusal();
  TextTable rows{.columns = {"nodes", column}, .rows = {}};
  const auto nodes = table.value().Column("nodes");
  const auto value = table.value().Column(column);
  if (!nodes || !value) {
    return Refusal{fmt::format("no column is called {}", nodes ? column : "nodes"),
                   "the artifact's table"};
  }
  for (const std::vector<std::string>& row : table.value().rows) {
    const bool match = std::all_of(where.begin(), where.end(), [&](const auto& need) {
      const auto at = table.value().Column(need.first);
      return at && row[*at] == need.second;
    });
    if (match) rows.rows.push_back({row[*nodes], row[*value]});
  }
  Curve curve;
  if (auto refused = Fill(rows, column, &curve)) return *refused;
  return curve;
}

}  // namespace

std::vector<std::string> PublishedModels() {
  std::vector<std::string> names;
  names.reserve(kPublished.size());
  for (const Known& known : kPublished) names.emplace_back(known.name);
  return names;
}

Answer<ModelTable> PublishedModel(std::string_view throughput, std::string_view recovery,
                                  std::string_view restart, const std::string& name) {
  const auto known = std::find_if(kPublished.begin(), kPublished.end(),
                                  [&](const Known& k) { return k.name == name; });
  if (known == kPublished.end()) {
    return Refusal{fmt::format("no published model is called \"{}\"", name),
                   "BERT-large, GPT-2, GPT-3-medium, GPT-3-2.7b, GPT-3-6.7b"};
  }
  ModelTable out;
  out.name = name;
  out.source = "Oobleck's artifact (SOSP '23): speeds measured on 15 to 30 A40 nodes";
  out.least_nodes = known->least_nodes;
  for (const auto& [system, curve] : std::array<std::pair<std::string_view, Curve*>, 3>{
           {{"varuna", &out.grid}, {"oobleck", &out.templates}, {"bamboo", &out.redundant}}}) {
    const Answer<Curve> read =
        CurveOf(throughput, {{"system", std::string(system)}, {"model", name}}, "samples_per_s");
    if (!read.ok()) return read.refusal();
    *curve = read.value();
  }
  if (out.grid.speeds.empty()) {
    return Refusal{fmt::format("no rows of {}", name), "the artifact's throughput_by_nodes.csv"};
  }
  const Answer<Curve> restarts = CurveOf(restart, {{"model", name}}, "restart_s");
  if (!restarts.ok()) return restarts.refusal();
  out.restart = restarts.value();
  const Answer<TextTable> costs = ParseTable(recovery);
  if (!costs.ok()) return costs.refusal();
  const auto named = costs.value().Column("model");
  for (const std::vector<std::string>& row : costs.value().rows) {
    if (!named || row[*named] != name) continue;
    const auto cell = [&](std::string_view column) -> std::optional<double> {
      const auto at = costs.value().Column(column);
      return at ? ParseNumber(row[*at]) : std::nullopt;
    };
    const auto batch = cell("global_batch_samples"), reconfigure = cell("oobleck_reconfig_s");
    const auto checkpoint = cell("varuna_ckpt_stall_s"), stop = cell("varuna_restart_default_s");
    if (!batch || !reconfigure || !checkpoint || !stop || *batch < 1) break;
    out.batch = *batch;
    out.reconfigure_s = *reconfigure;
    out.checkpoint_s = *checkpoint;
    out.restart_s = *stop;
    out.rebalance_s = cell("bamboo_rebalance_s");  // "OOM": nothing
    return out;
  }
  return Refusal{fmt::format("no costs of {}", name), "the artifact's recovery_params.csv"};
}

std::uint32_t FastestWithin(const std::vector<double>& curve, std::uint32_t from,
                            std::uint32_t to) {
  std::uint32_t best = 0;
  for (std::uint32_t n = from; n <= to && n < curve.size(); ++n) {
    if (curve[n] > (best == 0 ? 0.0 : curve[best])) best = n;
  }
  return best;
}

Answer<Model> MeasuredModel(const ModelTable& table, const planner::Profile& profile,
                            const Speeds& speeds) {
  Model model;
  model.profile = profile;
  if (table.grid.speeds.empty()) {
    return Refusal{fmt::format("the table of {} has no speeds", table.name),
                   "a column grid, or speeds from the planner"};
  }
  model.source = table.source;
  model.least_nodes = table.least_nodes;
  model.most_nodes = table.grid.last();
  if (!table.templates.speeds.empty()) {
    model.most_nodes = std::max(model.most_nodes, table.templates.last());
  }
  const std::uint32_t fewest = (speeds.faults + 1) * table.least_nodes;
  if (fewest > model.most_nodes) {
    return Refusal{fmt::format("{} copies on {} nodes each, and speeds up to {} nodes",
                               speeds.faults + 1, table.least_nodes, model.most_nodes),
                   "fewer faults"};
  }
  model.grid = Extended(table.grid, table.least_nodes, model.most_nodes);
  model.templates = Extended(table.templates, fewest, model.most_nodes);
  model.redundant = Extended(table.redundant, table.redundant_stages, model.most_nodes);
  Finish(speeds, &model);
  TakeCosts(table, &model);
  if (auto refused = FitProfile(table.batch, table.least_nodes, &model)) return *refused;
  if (auto refused = Calibrate(speeds, &model)) return *refused;
  return model;
}

Answer<Model> PlannedModel(const ModelTable& table, const planner::Profile& profile,
                           std::uint32_t most_nodes, const Speeds& speeds) {
  Model model;
  model.profile = profile;
  model.source = "the planner's estimate of iteration times";
  model.microbatches = std::max<std::uint64_t>(
      1, static_cast<std::uint64_t>(std::llround(table.batch / profile.microbatch)));
  if (model.microbatches > planner::kMaxMicrobatches) {
    return Refusal{fmt::format("{} microbatches an iteration", model.microbatches),
                   fmt::format("at most {}", planner::kMaxMicrobatches)};
  }
  planner::Answer<planner::Library> made =
      planner::MakeLibrary(profile, {.nodes = most_nodes, .faults = speeds.faults});
  if (!made.ok()) return made.refusal();
  const planner::Library& library = made.value();
  model.least_nodes = library.least_nodes;
  model.most_nodes = most_nodes;
  model.grid.assign(most_nodes + 1, 0.0);
  model.templates.assign(most_nodes + 1, 0.0);
  model.redundant.assign(most_nodes + 1, 0.0);
  const auto speed = [&table](std::int64_t ns) {
    return table.batch * 1e9 / static_cast<double>(ns);
  };
  for (std::uint32_t n = library.least_nodes; n <= most_nodes; ++n) {
    // Equal pipelines on as many of the nodes as they take. They keep no copies: one is enough.
    for (std::uint32_t form = 0; form < library.templates.size(); ++form) {
      const auto pipelines = static_cast<std::uint32_t>(
          std::min<std::uint64_t>(n / library.templates[form].nodes, model.microbatches));
      if (pipelines == 0) continue;
      const planner::Composition grid = planner::ComposeOf(
          library, std::vector<std::uint32_t>(pipelines, form), model.microbatches);
      model.grid[n] = std::max(model.grid[n], speed(grid.time_ns));
    }
    if (n < library.fewest_nodes) continue;
    const auto composed =
        planner::Compose(library, {.nodes = n, .microbatches = model.microbatches});
    if (composed.ok()) model.templates[n] = speed(composed.value().time_ns);
  }
  Finish(speeds, &model);
  TakeCosts(table, &model);
  return model;
}

ModelTable AssumedCosts(const planner::Profile& profile, double batch) {
  double state = 0;
  for (const planner::Layer& layer : profile.layers) {
    state += static_cast<double>(profile.StateBytes(layer));
  }
  ModelTable out;
  out.name = profile.model.empty() ? "a model" : profile.model;
  out.batch = batch;
  out.reconfigure_s = 10;
  out.checkpoint_s = 5 + state / 0.8e9;
  out.restart_s = 60 + state / 0.15e9;
  return out;
}

}  // namespace everstep::policy
