// `everstep simulate`: capacity traces through recovery policies, without a cluster.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"
#include "controller/planner/library.h"
#include "controller/policy/paper.h"
#include "controller/policy/plot.h"
#include "controller/policy/simulate.h"
#include "controller/policy/spot.h"
#include "controller/policy/table_text.h"
#include "proto/base/whole_file.h"

namespace everstep::cli {
namespace {

namespace fs = std::filesystem;
namespace pl = everstep::planner;
namespace po = everstep::policy;

constexpr double kSecondUs = 1e6;

CliError Refused(const std::string& where, const pl::Refusal& refusal) {
  return {ExitCode::kFailed, "FAILED_PRECONDITION", where + ": " + refusal.what,
          refusal.change.empty() ? "" : "what would work: " + refusal.change};
}

CliError Wrong(std::string message, std::string hint) {
  return {ExitCode::kUsage, "INVALID_ARGUMENT", std::move(message), std::move(hint)};
}

// The whole of a file of at most `most` bytes and one more.
Result<std::string> ReadFile(const fs::path& path, std::size_t most) {
  std::ifstream in(path, std::ios::binary);
  std::string text(most + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!in.is_open() || in.bad()) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND", fmt::format("cannot read {}", path.string()),
                    ""};
  }
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

std::vector<std::string> Words(const std::string& list) {
  std::vector<std::string> words;
  for (std::size_t at = 0; at < list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    if (comma > at) words.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return words;
}

class Inputs {
 public:
  explicit Inputs(const Context& context) : context_(context) {
    const auto set = context.env.find("EVERSTEP_TRACES");
    if (set != context.env.end()) recordings_ = set->second;
  }

  Result<std::vector<po::Trace>> Traces() const {
    std::vector<po::Trace> traces;
    const std::vector<std::string> words = Words(context_.args.Get("trace"));
    if (context_.args.Has("spot") == !words.empty()) {
      return Wrong("everstep simulate needs --trace FILE or --spot LAW, one of them",
                   "everstep simulate --spot ec2-p3 --seed 1 ...");
    }
    if (words.empty()) {
      const auto seed = ParseInteger("--seed", context_.args.Get("seed", "1"), 0, 1'000'000'000);
      if (!seed.ok()) return seed.error();
      const po::SpotLaw* law = po::FindSpotLaw(context_.args.Get("spot"));
      traces.push_back(po::DrawTrace(*law, static_cast<std::uint64_t>(seed.value())));
      return traces;
    }
    std::vector<fs::path> paths;
    for (const std::string& word : words) {
      const Result<std::vector<fs::path>> found = TracePaths(word);
      if (!found.ok()) return found.error();
      paths.insert(paths.end(), found.value().begin(), found.value().end());
    }
    traces.reserve(paths.size());
    for (const fs::path& path : paths) {
      const Result<std::string> text = ReadFile(path, po::kMaxTraceBytes);
      if (!text.ok()) return text.error();
      po::Answer<po::Trace> trace = po::ParseTrace(text.value(), path.stem().string());
      if (!trace.ok()) return Refused(path.string(), trace.refusal());
      traces.push_back(std::move(trace.value()));
    }
    return traces;
  }

  struct Named {
    po::ModelTable table;
    std::optional<pl::Profile> profile;  // recorded for it
  };

  Result<std::vector<Named>> Tables() const {
    std::vector<Named> tables;
    std::vector<std::string> words = Words(context_.args.Get("model"));
    if (words == std::vector<std::string>{"all"}) words = po::PublishedModels();
    tables.reserve(words.size());
    for (const std::string& word : words) {
      Result<Named> table = Table(word);
      if (!table.ok()) return table.error();
      tables.push_back(std::move(table.value()));
    }
    return tables;
  }

  // --profile, or nothing.
  Result<std::optional<pl::Profile>> Profile() const {
    const std::string path = context_.args.Get("profile");
    if (path.empty()) return std::optional<pl::Profile>();
    Result<pl::Profile> read = ReadProfile(path);
    if (!read.ok()) return read.error();
    return std::optional<pl::Profile>(std::move(read.value()));
  }

 private:
  Result<std::vector<fs::path>> TracePaths(const std::string& word) const {
    std::error_code error;
    if (fs::is_regular_file(word, error)) return std::vector<fs::path>{word};
    if (recordings_.empty()) {
      return CliError{
          ExitCode::kNotFound, "NOT_FOUND", fmt::format("no trace file {}", word),
          "set EVERSTEP_TRACES to the folder of recordings, or draw one: --spot ec2-p3"};
    }
    std::vector<fs::path> found;
    if (word == "all") {
      for (const auto& entry : fs::directory_iterator(recordings_ / "norm", error)) {
        if (entry.path().extension() == ".csv") found.push_back(entry.path());
      }
      std::sort(found.begin(), found.end());
    } else {
      for (const char* folder : {"norm", "oobleck"}) {
        const fs::path path = recordings_ / folder / (word + ".csv");
        if (found.empty() && fs::is_regular_file(path, error)) found.push_back(path);
      }
    }
    if (!found.empty()) return found;
    return CliError{
        ExitCode::kNotFound, "NOT_FOUND",
        fmt::format("no trace {}, as a file or in {}", word, (recordings_ / "norm").string()),
        "a recording's name without .csv, or all"};
  }

  static Result<pl::Profile> ReadProfile(const fs::path& path) {
    const Result<std::string> text = ReadFile(path, pl::kMaxProfileBytes);
    if (!text.ok()) return text.error();
    pl::Answer<pl::Profile> profile = pl::ParseProfile(text.value());
    if (!profile.ok()) return Refused(path.string(), profile.refusal());
    return std::move(profile.value());
  }

  Result<Named> Table(const std::string& word) const {
    std::error_code error;
    if (fs::is_regular_file(word, error)) {
      const Result<std::string> text = ReadFile(word, po::kMaxTableBytes);
      if (!text.ok()) return text.error();
      po::Answer<po::ModelTable> table = po::ParseModel(text.value());
      if (!table.ok()) return Refused(word, table.refusal());
      return Named{std::move(table.value()), std::nullopt};
    }
    // The recorded profile of the same number of layers and parameters.
    static const std::map<std::string, const char*> profiles = {
        {"BERT-large", "bert-mb8-seq512-v100"},
        {"GPT-2", "gpt-2-mb4-seq1024-v100"},
        {"GPT-3-medium", "gpt-2-mb2-seq1024-v100"},
        {"GPT-3-2.7b", "gpt-2.7b-mb1-seq2048-v100"},
        {"GPT-3-6.7b", "gpt-6.7b-mb1-seq2048-v100"}};
    const auto known = profiles.find(word);
    if (known == profiles.end() || recordings_.empty()) {
      return CliError{ExitCode::kNotFound, "NOT_FOUND", fmt::format("no model table {}", word),
                      fmt::format("a file (controller/policy/model.h says its form), or with "
                                  "EVERSTEP_TRACES one of {}",
                                  fmt::join(po::PublishedModels(), ", "))};
    }
    std::vector<std::string> texts;
    for (const char* file :
         {"throughput_by_nodes.csv", "recovery_params.csv", "varuna_restart_s_by_nodes.csv"}) {
      Result<std::string> text = ReadFile(recordings_ / "oobleck" / file, po::kMaxTableBytes);
      if (!text.ok()) return text.error();
      texts.push_back(std::move(text.value()));
    }
    po::Answer<po::ModelTable> table = po::PublishedModel(texts[0], texts[1], texts[2], word);
    if (!table.ok()) return Refused(word, table.refusal());
    Result<pl::Profile> profile =
        ReadProfile(recordings_ / "profiles" / fmt::format("{}.csv", known->second));
    if (!profile.ok()) return profile.error();
    return Named{std::move(table.value()), std::move(profile.value())};
  }

  const Context& context_;
  fs::path recordings_;
};

Result<std::int64_t> Microseconds(const Context& context, const std::string& name,
                                  const std::string& fallback) {
  const auto duration = ParseDuration("--" + name, context.args.Get(name, fallback));
  if (!duration.ok()) return duration.error();
  return std::int64_t{duration.value().count()} * 1000;
}

Result<po::Rules> RulesOf(const Context& context) {
  po::Rules rules;
  const auto boot = Microseconds(context, "boot", "45s");
  const auto detect = Microseconds(context, "detect", "5s");
  const auto notice = Microseconds(context, "notice", "0");
  for (const auto* time : {&boot, &detect, &notice}) {
    if (!time->ok()) return time->error();
  }
  rules.boot_us = boot.value();
  rules.detect_us = detect.value();
  rules.notice_us = notice.value();
  const auto price = po::ParseNumber(context.args.Get("price", "0.91"));
  if (!price) return Wrong("--price is no number", "dollars of a node's hour: 0.91");
  rules.price = *price;
  return rules;
}

Result<std::vector<po::Policy>> PoliciesOf(const Context& context) {
  std::vector<po::Policy> policies;
  std::vector<std::string_view> names;
  names.reserve(po::Policies().size());
  policies.reserve(po::Policies().size());
  for (const po::PolicyName& known : po::Policies()) names.push_back(known.name);
  for (const std::string& word : Words(context.args.Get("policy"))) {
    const auto found = std::find(names.begin(), names.end(), word);
    if (found == names.end()) {
      return Wrong(fmt::format("no policy is called \"{}\"", word),
                   fmt::format("one of: {}", fmt::join(names, ", ")));
    }
    policies.push_back(po::Policies()[static_cast<std::size_t>(found - names.begin())].policy);
  }
  if (policies.empty()) {
    for (const po::PolicyName& known : po::Policies()) policies.push_back(known.policy);
  }
  return policies;
}

Result<std::vector<po::Model>> ModelsOf(const Context& context, const Inputs& inputs) {
  const Result<std::vector<Inputs::Named>> tables = inputs.Tables();
  if (!tables.ok()) return tables.error();
  const Result<std::optional<pl::Profile>> given = inputs.Profile();
  if (!given.ok()) return given.error();
  const auto faults = ParseInteger("--faults", context.args.Get("faults", "1"), 0, pl::kMaxFaults);
  const auto nodes =
      ParseInteger("--nodes", context.args.Get("nodes", "32"), 1, po::kMaxModelNodes);
  if (!faults.ok()) return faults.error();
  if (!nodes.ok()) return nodes.error();
  const po::Speeds speeds{.same = context.args.Has("same-speed"),
                          .faults = static_cast<std::uint32_t>(faults.value())};
  const auto most = static_cast<std::uint32_t>(nodes.value());
  std::vector<po::Model> models;
  const auto add = [&models](const std::string& name,
                             po::Answer<po::Model> model) -> std::optional<CliError> {
    if (!model.ok()) return Refused(name, model.refusal());
    models.push_back(std::move(model.value()));
    return std::nullopt;
  };
  for (const Inputs::Named& named : tables.value()) {
    const std::optional<pl::Profile>& profile = given.value() ? given.value() : named.profile;
    if (!profile) {
      return Wrong(fmt::format("the layers of {} are not known", named.table.name),
                   "--profile FILE: docs/reference/profile.md");
    }
    const bool measured = !named.table.grid.speeds.empty();
    const auto failed =
        add(named.table.name, measured ? po::MeasuredModel(named.table, *profile, speeds)
                                       : po::PlannedModel(named.table, *profile, most, speeds));
    if (failed) return *failed;
  }
  if (!models.empty()) return models;
  if (!given.value()) {
    return Wrong("everstep simulate needs --model TABLE or --profile FILE",
                 "everstep simulate --help");
  }
  const std::int64_t usual = 4 * nodes.value() * given.value()->microbatch;
  const auto batch = ParseInteger("--batch", context.args.Get("batch", std::to_string(usual)), 1,
                                  std::int64_t{1} << 40);
  if (!batch.ok()) return batch.error();
  const po::ModelTable costs = po::AssumedCosts(*given.value(), static_cast<double>(batch.value()));
  if (const auto failed = add(costs.name, po::PlannedModel(costs, *given.value(), most, speeds))) {
    return *failed;
  }
  return models;
}

double Share(const po::Simulation& s, const po::Report& report, po::Account account) {
  return static_cast<double>(report.us[static_cast<std::size_t>(account)]) /
         static_cast<double>(s.capacity.end_us);
}

std::string ReportJson(const po::Simulation& s, const po::Report& r) {
  if (!r.possible) {
    return fmt::format("{{\"policy\":{},\"possible\":false,\"note\":{}}}", JsonQuote(r.policy),
                       JsonQuote(r.note));
  }
  std::vector<std::string> split;
  split.reserve(po::kAccounts);
  for (std::size_t i = 0; i < po::kAccounts; ++i) {
    split.push_back(fmt::format("\"{}\":{:.6f}", po::kAccountNames[i],
                                static_cast<double>(r.us[i]) / kSecondUs));
  }
  return fmt::format(
      "{{\"policy\":{},\"possible\":true,\"samples\":{:.3f},\"ofOracle\":{:.6f},\"seconds\":{{{}}},"
      "\"stopped\":{},\"rolledBack\":{},\"switches\":{},\"costPerMillionSamples\":{:.6f},"
      "\"note\":{}}}",
      JsonQuote(r.policy), r.samples, s.OfOracle(r), fmt::join(split, ","), r.stopped,
      r.rolled_back, r.switches, r.samples > 0 ? s.cost / r.samples * 1e6 : 0.0, JsonQuote(r.note));
}

std::string SimulationJson(const po::Simulation& s, const po::Model& model) {
  std::vector<std::string> reports;
  reports.reserve(s.reports.size());
  for (const po::Report& report : s.reports) reports.push_back(ReportJson(s, report));
  return fmt::format(
      "{{\"trace\":{},\"model\":{},\"speeds\":{},\"hours\":{:.4f},\"meanNodes\":{:.3f},"
      "\"mostNodes\":{},\"losses\":{},\"lossChanges\":{},\"largestLoss\":{},"
      "\"oracleSamples\":{:.3f},\"cost\":{:.4f},\"policies\":[{}]}}",
      JsonQuote(s.trace), JsonQuote(s.model), JsonQuote(model.source),
      static_cast<double>(s.capacity.end_us) / kSecondUs / 3600, s.capacity.mean_nodes,
      s.capacity.most_nodes, s.capacity.losses, s.capacity.loss_changes, s.capacity.largest_loss,
      s.oracle_samples, s.cost, fmt::join(reports, ","));
}

std::string Percent(double share) {
  return fmt::format("{:.1f}%", 100 * share);
}

// What holds for all of them, so that a figure can be judged by itself.
void Remarks(Context& context, const po::Rules& rules, const po::Model& model) {
  const auto seconds = [](std::int64_t us) {
    return HumanSeconds(static_cast<double>(us) / kSecondUs);
  };
  context.Remark(fmt::format(
      "{}: {}; at most {} nodes, one copy needs {}, {} copies; nodes boot {}, losses are known "
      "after {} (notice {})",
      model.name, model.source, model.most_nodes, model.least_nodes, model.copies,
      seconds(rules.boot_us), seconds(rules.notice_us > 0 ? 0 : rules.detect_us),
      seconds(rules.notice_us)));
  context.Remark(fmt::format(
      "  switch in place {}, checkpoint {}, restart {}, restart from memory {}; state moves at "
      "{:.2f} GB/s",
      seconds(model.reconfigure_us), seconds(model.checkpoint_us), seconds(model.restart_us.back()),
      seconds(rules.memory_restart_us),
      static_cast<double>(model.profile.between.bytes_per_s) / 1e9));
}

void ShowOne(Context& context, const po::Simulation& s) {
  Table table({{"POLICY"},
               {"SAMPLES", Align::kRight},
               {"SAMPLES/S", Align::kRight},
               {"OF ORACLE", Align::kRight},
               {"PRODUCTIVE", Align::kRight},
               {"LOST", Align::kRight},
               {"SWITCHING", Align::kRight},
               {"CHECKPOINT", Align::kRight},
               {"IDLE", Align::kRight},
               {"$/MILLION", Align::kRight},
               {"NOTE"}});
  const double seconds = static_cast<double>(s.capacity.end_us) / kSecondUs;
  for (const po::Report& r : s.reports) {
    if (!r.possible) {
      table.Add({r.policy, "", "", "", "", "", "", "", "", "", r.note});
      continue;
    }
    std::vector<std::string> cells = {r.policy, HumanCount(static_cast<std::int64_t>(r.samples)),
                                      fmt::format("{:.2f}", r.samples / seconds),
                                      Percent(s.OfOracle(r))};
    for (std::size_t i = 0; i < po::kAccounts; ++i) {
      cells.push_back(Percent(Share(s, r, static_cast<po::Account>(i))));
    }
    cells.push_back(r.samples > 0 ? fmt::format("{:.2f}", s.cost / r.samples * 1e6) : "");
    cells.push_back(r.note);
    table.Add(std::move(cells));
  }
  context.Out(fmt::format(
      "{} on {}: {:.1f} h, {:.1f} nodes of {} on average, {} lost at {} times (at most {} at "
      "once), ${:.2f}\noracle: {} samples, {:.2f} a second\n\n",
      s.model, s.trace, seconds / 3600, s.capacity.mean_nodes, s.capacity.most_nodes,
      s.capacity.losses, s.capacity.loss_changes, s.capacity.largest_loss, s.cost,
      HumanCount(static_cast<std::int64_t>(s.oracle_samples)), s.oracle_samples / seconds));
  context.Out(table.Format(context.render.headers, context.render.max_width));
}

// Committed samples in % of the oracle's, a row for each trace and model.
void ShowMany(Context& context, const std::vector<po::Simulation>& all) {
  std::vector<Table::Column> columns = {
      {"TRACE"}, {"MODEL"}, {"NODES", Align::kRight}, {"LOSSES EVERY", Align::kRight}};
  for (const po::Report& r : all.front().reports) columns.push_back({r.policy, Align::kRight});
  Table table(columns);
  for (const po::Simulation& s : all) {
    std::vector<std::string> cells = {
        s.trace, s.model, fmt::format("{:.1f}", s.capacity.mean_nodes),
        HumanSeconds(static_cast<double>(s.capacity.mean_loss_gap_us) / kSecondUs)};
    for (const po::Report& r : s.reports) cells.push_back(r.possible ? Percent(s.OfOracle(r)) : "");
    table.Add(std::move(cells));
  }
  context.Out(table.Format(context.render.headers, context.render.max_width));
}

VerbResult Paper(Context& context, const Inputs& inputs, const std::vector<po::Trace>& traces) {
  const Result<std::vector<Inputs::Named>> tables = inputs.Tables();
  if (!tables.ok()) return tables.error();
  if (tables.value().empty()) {
    return Wrong("--paper-mode needs --model", "GPT-3-6.7b, or another of the artifact, or all");
  }
  Table table({{"TRACE"},
               {"MODEL"},
               {"BAMBOO", Align::kRight},
               {"VARUNA", Align::kRight},
               {"OOBLECK", Align::kRight}});
  std::vector<std::string> items;
  for (const po::Trace& trace : traces) {
    for (const Inputs::Named& named : tables.value()) {
      std::vector<std::string> cells = {trace.name, named.table.name}, fields;
      for (const auto& [system, name] : {std::pair{po::PaperSystem::kBamboo, "bamboo"},
                                         std::pair{po::PaperSystem::kVaruna, "varuna"},
                                         std::pair{po::PaperSystem::kOobleck, "oobleck"}}) {
        const double speed = po::PublishedResult(system, named.table, trace).samples_per_s;
        cells.push_back(fmt::format("{:.2f}", speed));
        fields.push_back(fmt::format("\"{}\":{:.6f}", name, speed));
      }
      table.Add(std::move(cells));
      items.push_back(fmt::format("{{\"trace\":{},\"model\":{},\"samplesPerSecond\":{{{}}}}}",
                                  JsonQuote(trace.name), JsonQuote(named.table.name),
                                  fmt::join(fields, ",")));
    }
  }
  if (context.json()) {
    context.Out(JsonItems("PaperResults", items));
  } else {
    context.Out(table.Format(context.render.headers, context.render.max_width));
    context.Remark("samples a second as Oobleck's artifact counts them, not by our rules");
  }
  return ExitCode::kOk;
}

}  // namespace

VerbResult RunSimulate(Context& context) {
  const Inputs inputs(context);
  const Result<std::vector<po::Trace>> traces = inputs.Traces();
  if (!traces.ok()) return traces.error();
  if (context.args.Has("paper-mode")) return Paper(context, inputs, traces.value());
  const Result<po::Rules> rules = RulesOf(context);
  if (!rules.ok()) return rules.error();
  const Result<std::vector<po::Policy>> policies = PoliciesOf(context);
  if (!policies.ok()) return policies.error();
  const Result<std::vector<po::Model>> models = ModelsOf(context, inputs);
  if (!models.ok()) return models.error();
  std::vector<po::Simulation> all;
  std::vector<std::string> items;
  all.reserve(traces.value().size() * models.value().size());
  for (const po::Trace& trace : traces.value()) {
    for (const po::Model& model : models.value()) {
      if (const auto refused = po::TooManySteps(trace, model)) {
        return Refused(trace.name, *refused);
      }
      all.push_back(po::Simulate(trace, model, rules.value(), policies.value()));
      items.push_back(SimulationJson(all.back(), model));
    }
  }
  if (const std::string path = context.args.Get("svg"); !path.empty()) {
    const int error =
        WriteWhole(path, all.size() == 1 ? po::CoursePlot(all.front()) : po::GridPlot(all));
    if (error != 0) return CliError{ExitCode::kFailed, "FAILED", CannotWrite(path, error), ""};
  }
  if (context.json()) {
    context.Out(JsonItems("SimulationList", items));
    return ExitCode::kOk;
  }
  for (const po::Model& model : models.value()) Remarks(context, rules.value(), model);
  if (all.size() == 1) {
    ShowOne(context, all.front());
  } else {
    ShowMany(context, all);
  }
  return ExitCode::kOk;
}

}  // namespace everstep::cli
