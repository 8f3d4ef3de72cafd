// `everstep plan templates|compose|lose|join|explain`: the planner on a profile, without a cluster.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <optional>
#include <sstream>

#include "controller/cli/plan_pace.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"
#include "controller/planner/picture.h"
#include "controller/planner/replan.h"
#include "proto/base/whole_file.h"

namespace everstep::cli {
namespace {

namespace pl = everstep::planner;

CliError Refused(const pl::Refusal& refusal, ExitCode exit = ExitCode::kConflict) {
  return {exit, exit == ExitCode::kUsage ? "INVALID_ARGUMENT" : "FAILED_PRECONDITION", refusal.what,
          refusal.change.empty() ? "" : "what would work: " + refusal.change};
}

// The option's whole number, or `fallback` where it is not given.
Result<std::int64_t> Number(const Context& context, const std::string& name, std::int64_t fallback,
                            std::int64_t low, std::int64_t high) {
  if (!context.args.Has(name)) return fallback;
  return ParseInteger("--" + name, context.args.Get(name), low, high);
}

Result<pl::Profile> ReadProfile(const Context& context) {
  const std::string path = context.args.Get("profile");
  if (path.empty()) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                    fmt::format("everstep {} needs --profile FILE", context.args.CommandName()),
                    "its form: docs/reference/profile.md"};
  }
  std::ifstream in(path, std::ios::binary);
  std::string text(pl::kMaxProfileBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!in.is_open() || in.bad()) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND", fmt::format("cannot read {}", path), ""};
  }
  text.resize(static_cast<std::size_t>(in.gcount()));
  pl::Answer<pl::Profile> read = pl::ParseProfile(text);
  if (!read.ok()) {
    return Refused({path + ": " + read.refusal().what, read.refusal().change}, ExitCode::kFailed);
  }
  pl::Profile profile = std::move(read.value());
  const auto microbatch = Number(context, "microbatch", profile.microbatch, 1, 1 << 20);
  const auto devices = Number(context, "devices", profile.devices_per_node, 1, pl::kMaxDevices);
  const auto memory =
      Number(context, "device-memory", profile.device_memory_bytes >> 30, 0, 1'000'000);
  for (const auto* number : {&microbatch, &devices, &memory}) {
    if (!number->ok()) return number->error();
  }
  profile.microbatch = static_cast<std::uint32_t>(microbatch.value());
  profile.devices_per_node = static_cast<std::uint32_t>(devices.value());
  if (context.args.Has("device-memory")) profile.device_memory_bytes = memory.value() << 30;
  return profile;
}

struct Asked {
  pl::Library library;
  std::uint32_t nodes = 0;
  std::uint64_t microbatches = 0;
};

// The library for the nodes asked for and `more`.
Result<Asked> Ask(Context& context, std::uint32_t more) {
  Result<pl::Profile> profile = ReadProfile(context);
  if (!profile.ok()) return profile.error();
  const auto nodes = Number(context, "nodes", 16, 1, pl::kMaxNodes);
  const auto faults = Number(context, "faults", 1, 0, pl::kMaxFaults);
  const auto most = Number(context, "most-microbatches", 0, 0, pl::kMaxMicrobatches);
  for (const auto* number : {&nodes, &faults, &most}) {
    if (!number->ok()) return number->error();
  }
  Asked asked{.library = {}, .nodes = static_cast<std::uint32_t>(nodes.value())};
  asked.microbatches = std::uint64_t{4} * asked.nodes;
  if (context.args.Has("batch")) {
    const auto batch = ParseInteger("--batch", context.args.Get("batch"), 1, std::int64_t{1} << 40);
    if (!batch.ok()) return batch.error();
    const auto divided =
        pl::MicrobatchesOf(profile.value(), static_cast<std::uint64_t>(batch.value()));
    if (!divided.ok()) return Refused(divided.refusal(), ExitCode::kUsage);
    asked.microbatches = divided.value();
  }
  pl::Answer<pl::Library> made = pl::MakeLibrary(
      profile.value(), {.nodes = asked.nodes + more,
                        .faults = static_cast<std::uint32_t>(faults.value()),
                        .most_microbatches = static_cast<std::uint32_t>(most.value())});
  if (!made.ok()) return Refused(made.refusal());
  asked.library = std::move(made.value());
  if (asked.library.profile.device_memory_bytes == 0) {
    context.Remark("the profile does not limit devices' memory; --device-memory GIB does");
  }
  return asked;
}

// The composition of all nodes asked for, n0 on the first place and so on.
Result<pl::Seated> SeatAll(const Asked& asked) {
  pl::Answer<pl::Composition> made =
      pl::Compose(asked.library, {.nodes = asked.nodes, .microbatches = asked.microbatches});
  if (!made.ok()) return Refused(made.refusal());
  std::vector<pl::NodeId> nodes(asked.nodes);
  std::iota(nodes.begin(), nodes.end(), 0U);
  return pl::Seat(std::move(made.value()), asked.library, nodes);
}

double Seconds(std::int64_t ns) {
  return static_cast<double>(ns) / 1e9;
}

std::string ModelName(const pl::Profile& profile) {
  return profile.model.empty() ? "a model" : profile.model;
}

std::string StagesJson(const pl::Template& t) {
  std::vector<std::string> stages;
  stages.reserve(t.stages.size());
  for (const pl::Stage& s : t.stages) {
    stages.push_back(fmt::format("{{\"first\":{},\"end\":{},\"seconds\":{:.9f},\"bytes\":\"{}\"}}",
                                 s.first, s.end, Seconds(s.time_ns), s.bytes));
  }
  return fmt::format("[{}]", fmt::join(stages, ","));
}

std::string SeatedJson(const pl::Library& library, const pl::Seated& seated) {
  std::vector<std::string> pipelines;
  pipelines.reserve(seated.nodes.size());
  for (std::size_t i = 0; i < seated.nodes.size(); ++i) {
    const pl::Pipeline& p = seated.composition.pipelines[i];
    const pl::Template& t = library.templates[p.form];
    std::vector<std::string> nodes;
    nodes.reserve(seated.nodes[i].size());
    for (const pl::NodeId node : seated.nodes[i]) nodes.push_back(fmt::format("\"n{}\"", node));
    pipelines.push_back(
        fmt::format("{{\"nodes\":[{}],\"microbatches\":{},\"seconds\":{:.9f},\"stagesPerNode\":{},"
                    "\"nodesPerStage\":{},\"stages\":{}}}",
                    fmt::join(nodes, ","), p.microbatches, Seconds(p.time_ns),
                    t.shape.stages_per_node, t.shape.nodes_per_stage, StagesJson(t)));
  }
  return fmt::format("\"nodes\":{},\"microbatches\":\"{}\",\"seconds\":{:.9f},\"pipelines\":[{}]",
                     seated.composition.nodes, seated.composition.microbatches,
                     Seconds(seated.composition.time_ns), fmt::join(pipelines, ","));
}

std::string Summary(const Asked& asked, const pl::Seated& seated) {
  const pl::Composition& c = seated.composition;
  const double samples =
      static_cast<double>(c.microbatches) * asked.library.profile.microbatch / Seconds(c.time_ns);
  return fmt::format(
      "{} nodes, {} pipelines, {} microbatches: {} an iteration, {:.1f} samples/s, devices busy "
      "{:.0f}%\n",
      c.nodes, c.pipelines.size(), c.microbatches, pl::TimeText(c.time_ns), samples,
      100 * c.Busy(asked.library));
}

Outcome WriteSvg(Context& context, const Asked& asked, const pl::Seated& seated) {
  const std::string path = context.args.Get("svg");
  if (path.empty()) return Done{};
  const int error = WriteWhole(path, pl::PlanSvg(asked.library, seated));
  if (error == 0) return Done{};
  return CliError{ExitCode::kFailed, "FAILED", CannotWrite(path, error), ""};
}

// A plan after a change, as text or JSON.
Outcome Show(Context& context, const Asked& asked, const pl::Seated& before,
             const pl::Replanned& after) {
  if (Outcome written = WriteSvg(context, asked, after.seated); !written.ok()) return written;
  if (context.json()) {
    std::vector<std::string> arrivals;
    arrivals.reserve(after.arrivals.size());
    for (const pl::Arrival& a : after.arrivals) {
      arrivals.push_back(fmt::format("{{\"node\":\"n{}\",\"pipeline\":{},\"bytes\":\"{}\"}}",
                                     a.node, a.pipeline, a.bytes));
    }
    context.Out(fmt::format(
        "{{\"apiVersion\":\"everstep/v1\",\"kind\":\"PlanChange\",\"secondsBefore\":{:.9f},"
        "\"movedBytes\":\"{}\",\"moveSeconds\":{:.9f},\"stayed\":{},\"orphanedLayers\":[{}],"
        "\"arrivals\":[{}],{}}}\n",
        Seconds(before.composition.time_ns), after.moved_bytes, Seconds(after.move_ns),
        after.stayed, fmt::join(after.orphaned, ","), fmt::join(arrivals, ","),
        SeatedJson(asked.library, after.seated)));
    return Done{};
  }
  std::string text = Summary(asked, after.seated);
  text += fmt::format("  before: {} an iteration on {} nodes\n",
                      pl::TimeText(before.composition.time_ns), before.composition.nodes);
  text += after.moved_bytes == 0
              ? "  nothing moves\n"
              : fmt::format("  moves:  {} to {} node{}, {} for the one that gets most\n",
                            pl::SizeText(after.moved_bytes), after.arrivals.size(),
                            after.arrivals.size() == 1 ? "" : "s", pl::TimeText(after.move_ns));
  if (after.stayed > 0)
    text += fmt::format("  stay:   {} nodes in pipelines that do not change\n", after.stayed);
  if (!after.orphaned.empty()) {
    text += fmt::format("  no copy left of layers {}: they come from files\n",
                        fmt::join(after.orphaned, " "));
  }
  context.Out(text + "\n" + pl::PlanPicture(asked.library, after.seated));
  return Done{};
}

Result<std::int64_t> HorizonNs(const Context& context) {
  if (!context.args.Has("next-change")) return std::int64_t{0};
  const auto duration = ParseDuration("--next-change", context.args.Get("next-change"));
  if (!duration.ok()) return duration.error();
  return std::int64_t{duration.value().count()} * 1'000'000;
}

// One node lost after the other; of each number of nodes the loss that costs most.
Result<ExitCode> LoseOneByOne(Context& context, const Asked& asked, pl::Seated now,
                              std::int64_t horizon_ns) {
  Table table({{"NODES", Align::kRight},
               {"PIPELINES", Align::kRight},
               {"SIZES"},
               {"ITERATION", Align::kRight},
               {"WORST LOSS"},
               {"MOVES", Align::kRight},
               {"FOR", Align::kRight}});
  std::vector<std::string> items;
  const auto sizes = [&](const pl::Composition& c) {
    std::string text;
    for (std::size_t i = 0; i < c.pipelines.size();) {
      std::size_t same = i;
      const std::uint32_t form = c.pipelines[i].form;
      while (same < c.pipelines.size() && c.pipelines[same].form == form) ++same;
      text += fmt::format("{}{}x{}", i == 0 ? "" : " + ", same - i,
                          asked.library.templates[form].nodes);
      i = same;
    }
    return text;
  };
  const auto add = [&](const pl::Composition& c, const std::string& lost, std::int64_t bytes,
                       std::int64_t ns) {
    table.Add({std::to_string(c.nodes), std::to_string(c.pipelines.size()), sizes(c),
               pl::TimeText(c.time_ns), lost, lost.empty() ? "" : pl::SizeText(bytes),
               lost.empty() ? "" : pl::TimeText(ns)});
    items.push_back(fmt::format(
        "{{\"nodes\":{},\"pipelines\":{},\"sizes\":\"{}\",\"seconds\":{:.9f},\"worstLoss\":\"{}\","
        "\"movedBytes\":\"{}\",\"moveSeconds\":{:.9f}}}",
        c.nodes, c.pipelines.size(), sizes(c), Seconds(c.time_ns), lost, bytes, Seconds(ns)));
  };
  add(now.composition, "", 0, 0);
  while (now.composition.nodes > asked.library.fewest_nodes) {
    std::optional<pl::Replanned> worst;
    pl::NodeId victim = 0;
    for (const auto& pipeline : now.nodes) {
      for (const pl::NodeId node : pipeline) {
        pl::Answer<pl::Replanned> after = pl::Replan(
            asked.library, now, {.lost = {node}, .joined = {}, .horizon_ns = horizon_ns});
        if (!after.ok()) return Refused(after.refusal());
        const auto cost = [](const pl::Replanned& r) {
          return std::pair(r.move_ns, r.moved_bytes);
        };
        if (worst && cost(after.value()) <= cost(*worst)) continue;
        worst = std::move(after.value());
        victim = node;
      }
    }
    add(worst->seated.composition, fmt::format("n{}", victim), worst->moved_bytes, worst->move_ns);
    now = std::move(worst->seated);
  }
  if (context.json()) {
    context.Out(JsonItems("PlanLosses", items));
  } else {
    context.Out(table.Format(context.render.headers, context.render.max_width));
  }
  return ExitCode::kOk;
}

}  // namespace

VerbResult RunPlanTemplates(Context& context) {
  const Result<Asked> made = Ask(context, 0);
  if (!made.ok()) return made.error();
  const pl::Library& library = made.value().library;
  std::vector<std::string> items;
  Table table({{"NODES", Align::kRight},
               {"STAGES", Align::kRight},
               {"SHAPE"},
               {"TIME", Align::kRight},
               {"SLOWEST", Align::kRight},
               {"MEMORY", Align::kRight},
               {"LAYERS BEGIN AT"}});
  for (const pl::Template& t : library.templates) {
    std::int64_t most = 0;
    for (const pl::Stage& stage : t.stages) most = std::max(most, stage.bytes);
    const std::int64_t time = t.TimeNs(4 * static_cast<std::int64_t>(t.stages.size()));
    table.Add(
        {std::to_string(t.nodes), std::to_string(t.stages.size()), pl::ShapeText(t.shape),
         pl::TimeText(time), pl::TimeText(t.partition.slowest_ns), pl::SizeText(most),
         fmt::format("{}", fmt::join(t.partition.cuts.begin(), t.partition.cuts.end() - 1, " "))});
    items.push_back(
        fmt::format("{{\"nodes\":{},\"stagesPerNode\":{},\"nodesPerStage\":{},\"seconds\":{:.9f},"
                    "\"slowestSeconds\":{:.9f},\"stages\":{}}}",
                    t.nodes, t.shape.stages_per_node, t.shape.nodes_per_stage, Seconds(time),
                    Seconds(t.partition.slowest_ns), StagesJson(t)));
  }
  if (context.output == Output::kJson) {
    context.Out(JsonItems("TemplateList", items));
  } else if (context.output == Output::kJsonl) {
    context.Out(fmt::format("{}\n", fmt::join(items, "\n")));
  } else {
    context.Out(table.Format(context.render.headers, context.render.max_width));
    context.Remark(
        fmt::format("{} to {} nodes are covered with {} cop{} of each layer; fingerprint {:016x}",
                    library.fewest_nodes, library.input.nodes, library.input.faults + 1,
                    library.input.faults == 0 ? "y" : "ies", library.fingerprint));
  }
  return ExitCode::kOk;
}

VerbResult RunPlanCompose(Context& context) {
  const Result<Asked> asked = Ask(context, 0);
  if (!asked.ok()) return asked.error();
  const Result<pl::Seated> seated = SeatAll(asked.value());
  if (!seated.ok()) return seated.error();
  if (Outcome written = WriteSvg(context, asked.value(), seated.value()); !written.ok()) {
    return written.error();
  }
  const pl::Library& library = asked.value().library;
  if (context.args.Has("speed")) {
    const Result<std::int64_t> horizon = HorizonNs(context);
    if (!horizon.ok()) return horizon.error();
    const Result<std::string> shown = PacesShown(library, seated.value(), context.args.Get("speed"),
                                                 horizon.value(), context.render, context.json());
    if (!shown.ok()) return shown.error();
    context.Out(shown.value());
    return ExitCode::kOk;
  }
  if (context.json()) {
    context.Out(fmt::format("{{\"apiVersion\":\"everstep/v1\",\"kind\":\"Plan\",{}}}\n",
                            SeatedJson(library, seated.value())));
  } else {
    context.Out(Summary(asked.value(), seated.value()) + "\n" +
                pl::PlanPicture(library, seated.value()));
  }
  return ExitCode::kOk;
}

VerbResult RunPlanLose(Context& context) {
  const Result<Asked> asked = Ask(context, 0);
  if (!asked.ok()) return asked.error();
  const Result<std::int64_t> horizon = HorizonNs(context);
  if (!horizon.ok()) return horizon.error();
  Result<pl::Seated> seated = SeatAll(asked.value());
  if (!seated.ok()) return seated.error();
  if (context.args.words.empty()) {
    return LoseOneByOne(context, asked.value(), std::move(seated.value()), horizon.value());
  }
  pl::ReplanInput change{.lost = {}, .joined = {}, .horizon_ns = horizon.value()};
  for (const std::string& word : context.args.words) {
    const auto number = ParseInteger("NODE", word.substr(word.rfind('n', 0) == 0 ? 1 : 0), 0,
                                     asked.value().nodes - 1);
    if (!number.ok()) {
      return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                      fmt::format("no node is called \"{}\"", word),
                      fmt::format("n0 to n{}", asked.value().nodes - 1)};
    }
    change.lost.push_back(static_cast<pl::NodeId>(number.value()));
  }
  const auto after = pl::Replan(asked.value().library, seated.value(), change);
  if (!after.ok()) return Refused(after.refusal());
  const Outcome shown = Show(context, asked.value(), seated.value(), after.value());
  return shown.ok() ? VerbResult(ExitCode::kOk) : VerbResult(shown.error());
}

VerbResult RunPlanJoin(Context& context) {
  const auto count = ParseInteger("COUNT", context.args.words[0], 1, pl::kMaxNodes);
  if (!count.ok()) return count.error();
  const Result<Asked> asked = Ask(context, static_cast<std::uint32_t>(count.value()));
  if (!asked.ok()) return asked.error();
  const Result<std::int64_t> horizon = HorizonNs(context);
  if (!horizon.ok()) return horizon.error();
  const Result<pl::Seated> seated = SeatAll(asked.value());
  if (!seated.ok()) return seated.error();
  pl::ReplanInput change{.lost = {}, .joined = {}, .horizon_ns = horizon.value()};
  change.joined.resize(static_cast<std::size_t>(count.value()));
  std::iota(change.joined.begin(), change.joined.end(), asked.value().nodes);
  const auto after = pl::Replan(asked.value().library, seated.value(), change);
  if (!after.ok()) return Refused(after.refusal());
  const Outcome shown = Show(context, asked.value(), seated.value(), after.value());
  return shown.ok() ? VerbResult(ExitCode::kOk) : VerbResult(shown.error());
}

VerbResult RunPlanExplain(Context& context) {
  const Result<Asked> asked = Ask(context, 0);
  if (!asked.ok()) return asked.error();
  const Result<pl::Seated> seated = SeatAll(asked.value());
  if (!seated.ok()) return seated.error();
  const pl::Library& library = asked.value().library;
  const pl::Composition& best = seated.value().composition;
  std::vector<std::string> items;
  Table table({{"PIPELINES", Align::kRight}, {"ITERATION", Align::kRight}, {"VERDICT"}});
  for (const pl::Alternative& a : best.alternatives) {
    const bool chosen = a.pipelines == best.pipelines.size();
    const double slower =
        100 * (static_cast<double>(a.time_ns) / static_cast<double>(best.time_ns) - 1);
    table.Add({std::to_string(a.pipelines), pl::TimeText(a.time_ns),
               chosen       ? "chosen"
               : a.exact    ? fmt::format("{:.2f}% slower", slower)
               : slower > 0 ? fmt::format("{:.2f}% slower at least", slower)
                            : "as fast at best"});
    items.push_back(
        fmt::format("{{\"pipelines\":{},\"seconds\":{:.9f},\"exact\":{},\"chosen\":{}}}",
                    a.pipelines, Seconds(a.time_ns), a.exact, chosen));
  }
  if (context.json()) {
    context.Out(JsonItems("PlanAlternatives", items));
    return ExitCode::kOk;
  }
  const pl::Profile& p = library.profile;
  std::int64_t state = 0, work = 0;
  for (const pl::Layer& layer : p.layers) {
    state += p.StateBytes(layer);
    work += layer.forward_ns + layer.backward_ns;
  }
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"model",
       fmt::format("{}, {} layers, {} of state, {} for a microbatch on one device", ModelName(p),
                   p.layers.size(), pl::SizeText(state), pl::TimeText(work))},
      {"smallest",
       fmt::format("{} one copy, so {} to {} nodes hold {}",
                   library.least_nodes == 1 ? "1 node holds"
                                            : fmt::format("{} nodes hold", library.least_nodes),
                   library.fewest_nodes, library.input.nodes, library.input.faults + 1)},
      {"templates", fmt::format("{} of {} sizes, {} to {} nodes", library.templates.size(),
                                library.sizes.size(), library.sizes.front(), library.sizes.back())},
      {"chosen", fmt::format("{} pipelines, {} an iteration; every other multiset of templates is "
                             "as slow or slower",
                             best.pipelines.size(), pl::TimeText(best.time_ns))},
      {"of it", fmt::format("{} of synchronisation that no backward pass hides; devices busy "
                            "{:.0f}%",
                            pl::TimeText(best.sync_ns), 100 * best.Busy(library))}};
  context.Out(FormatPairs(pairs) + "\n" +
              table.Format(context.render.headers, context.render.max_width));
  return ExitCode::kOk;
}

}  // namespace everstep::cli
