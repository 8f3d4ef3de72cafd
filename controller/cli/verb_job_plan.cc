// `everstep job plan`: what a pipeline job's ranks would plan after a loss or a join, by asking the
// planner what they would ask it. What they told: the profile, and of the plan the question that
// the next change asks (everstep/pipeline/_agree.py, told_plan; controller/planner/abi/plan_abi.h).
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"
#include "controller/planner/abi/plan_abi.h"
#include "controller/planner/picture.h"
#include "controller/planner/profile.h"

namespace everstep::cli {
namespace {

namespace pl = everstep::planner;

constexpr std::string_view kForm = "everstep-told-plan 1";

struct Row {
  std::uint64_t microbatches = 0;
  std::vector<std::uint32_t> cuts, nodes;
};
struct Plan {
  std::int64_t time_ns = 0;
  std::vector<Row> rows;
  std::uint32_t copies = 0;  // of each layer, at least; 0: as many as the job asks for
};
struct Question {
  std::string checksum;
  std::vector<std::uint32_t> nodes;  // by rank
  std::uint32_t most_nodes = 0, faults = 0;
  std::vector<std::string> others;  // lines that stay as they are
  Plan plan;
};

std::string_view Next(std::string_view* text, std::string_view mark) {
  const std::size_t end = text->find(mark);
  const std::string_view out = text->substr(0, end);
  text->remove_prefix(end == std::string_view::npos ? text->size() : end + mark.size());
  return out;
}

template <typename Number>
Number NumberOf(std::string_view text) {
  Number value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

std::vector<std::uint32_t> Numbers(std::string_view text) {
  std::vector<std::uint32_t> out;
  while (!text.empty()) out.push_back(NumberOf<std::uint32_t>(Next(&text, ",")));
  return out;
}

Plan ReadPlan(std::string_view text) {
  Plan plan;
  while (!text.empty()) {
    std::string_view line = Next(&text, "\n");
    const std::string_view name = Next(&line, " = ");
    if (name == "time-ns") plan.time_ns = NumberOf<std::int64_t>(line);
    if (name != "pipeline") continue;
    Row& row = plan.rows.emplace_back();
    row.microbatches = NumberOf<std::uint64_t>(Next(&line, "; "));
    row.cuts = Numbers(Next(&line, "; "));
    row.nodes = Numbers(line);
  }
  return plan;
}

// False: none of this release's.
bool ReadTold(std::string_view text, Question* out) {
  if (Next(&text, "\n") != kForm) return false;
  while (!text.empty()) {
    const std::string_view whole = Next(&text, "\n");
    std::string_view line = whole;
    const std::string_view name = Next(&line, " = ");
    if (name == "checksum") {
      out->checksum = line;
    } else if (name == "nodes") {
      out->nodes = Numbers(line);
    } else if (name == "faults") {
      out->faults = NumberOf<std::uint32_t>(line);
    } else if (name == "most-nodes") {
      out->most_nodes = NumberOf<std::uint32_t>(line);
    } else if (whole == "profile =") {
      out->plan = ReadPlan(text);
      break;
    } else {
      out->others.emplace_back(whole);
    }
  }
  const bool fits = std::all_of(out->plan.rows.begin(), out->plan.rows.end(),
                                [](const Row& r) { return r.cuts.size() == r.nodes.size() + 1; });
  return fits && !out->nodes.empty() && !out->plan.rows.empty();
}

// The planner's answer to the question with other nodes, with as many copies as they allow.
Result<Plan> Ask(const Question& question, const std::vector<std::uint32_t>& nodes,
                 const std::string& profile, std::uint32_t faults) {
  const std::string request = fmt::format(
      "{}\nfaults = {}\nmost-nodes = {}\nnodes = {}\nprofile =\n{}",
      fmt::join(question.others, "\n"), faults,
      std::max<std::size_t>(question.most_nodes, nodes.size()), fmt::join(nodes, ","), profile);
  std::string answer(1 << 16, '\0');
  std::int64_t need = everstep_plan(request.data(), request.size(), answer.data(), answer.size());
  if (static_cast<std::size_t>(std::abs(need)) > answer.size()) {
    answer.resize(static_cast<std::size_t>(std::abs(need)));
    need = everstep_plan(request.data(), request.size(), answer.data(), answer.size());
  }
  answer.resize(static_cast<std::size_t>(std::abs(need)) - 1);
  if (need < 0 && faults > 0) {
    Result<Plan> fewer = Ask(question, nodes, profile, faults - 1);
    if (fewer.ok()) return fewer;
  }
  if (need < 0) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    "the planner has no plan for that: " + answer, ""};
  }
  Plan plan = ReadPlan(answer);
  plan.copies = faults + 1;
  return plan;
}

struct Move {
  std::uint32_t node = 0, first = 0, end = 0;  // layers that it receives
  std::int64_t bytes = 0;
};

// What nodes of `after` have not had in `before`.
std::vector<Move> Moves(const Plan& before, const Plan& after, const pl::Profile& profile) {
  std::map<std::uint32_t, std::pair<std::uint32_t, std::uint32_t>> had;
  for (const Row& row : before.rows) {
    for (std::size_t i = 0; i < row.nodes.size(); ++i)
      had[row.nodes[i]] = {row.cuts[i], row.cuts[i + 1]};
  }
  std::vector<Move> out;
  for (const Row& row : after.rows) {
    for (std::size_t i = 0; i < row.nodes.size(); ++i) {
      const auto old = had.find(row.nodes[i]);
      for (std::uint32_t layer = row.cuts[i]; layer < row.cuts[i + 1]; ++layer) {
        if (old != had.end() && layer >= old->second.first && layer < old->second.second) continue;
        const std::int64_t bytes =
            layer < profile.layers.size() ? profile.StateBytes(profile.layers[layer]) : 0;
        if (!out.empty() && out.back().node == row.nodes[i] && out.back().end == layer) {
          out.back().end = layer + 1;
          out.back().bytes += bytes;
        } else {
          out.push_back({row.nodes[i], layer, layer + 1, bytes});
        }
      }
    }
  }
  return out;
}

const v1::ToldRecord* Of(const v1::JobTold& told, const std::string& kind) {
  const auto found = std::find_if(told.items().begin(), told.items().end(),
                                  [&](const v1::ToldRecord& r) { return r.kind() == kind; });
  return found == told.items().end() ? nullptr : &*found;
}

std::string Layers(std::uint32_t first, std::uint32_t end) {
  return end - first == 1 ? std::to_string(first) : fmt::format("{}-{}", first, end - 1);
}

double Seconds(std::int64_t ns) {
  return static_cast<double>(ns) / 1e9;
}

// The planner's nodes are ranks: of node n3 its only one is "n3", else "n3/0", "n3/1".
class NodeNames {
 public:
  NodeNames(const Question& question, const v1::ToldRecord& told) {
    std::map<std::string, int> of_node;
    for (int rank = 0; rank < told.nodes_size(); ++rank) ++of_node[told.nodes(rank)];
    std::map<std::string, int> next;
    for (std::size_t rank = 0; rank < question.nodes.size(); ++rank) {
      const bool known = rank < static_cast<std::size_t>(told.nodes_size());
      const std::string node = known ? told.nodes(static_cast<int>(rank)) : "";
      const std::string name = node.empty()         ? fmt::format("rank {}", rank)
                               : of_node[node] == 1 ? node
                                                    : fmt::format("{}/{}", node, next[node]++);
      names_[question.nodes[rank]] = name;
      ranks_[node].push_back(question.nodes[rank]);
    }
  }
  std::string operator()(std::uint32_t id) const {
    const auto it = names_.find(id);
    return it == names_.end() ? fmt::format("new {}", id) : it->second;
  }
  const std::map<std::string, std::vector<std::uint32_t>>& ranks() const { return ranks_; }

 private:
  std::map<std::uint32_t, std::string> names_;
  std::map<std::string, std::vector<std::uint32_t>> ranks_;
};

}  // namespace

VerbResult RunJobPlan(Context& context) {
  const Result<std::int64_t> join =
      context.args.Has("join") ? ParseInteger("--join", context.args.Get("join"), 1, pl::kMaxNodes)
                               : Result<std::int64_t>(std::int64_t{0});
  if (!join.ok()) return join.error();
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> found = FindJob(client.value().get(), context.args.words[0]);
  if (!found.ok()) return found.error();
  const Result<v1::JobTold> told = client.value()->GetTold(found.value().job());
  if (!told.ok()) return told.error();
  const std::string& job = told.value().job();
  const v1::ToldRecord* profile_told = Of(told.value(), "profile");
  const v1::ToldRecord* plan_told = Of(told.value(), "plan");
  if (profile_told == nullptr || plan_told == nullptr) {
    return CliError{
        ExitCode::kConflict, "FAILED_PRECONDITION",
        fmt::format("job {} has told no {}", job, profile_told == nullptr ? "profile" : "plan"),
        "scripts with everstep.Pipeline do, once they have measured their layers; for a "
        "job of another kind: everstep ckpt survive " +
            job};
  }
  Question question;
  pl::Answer<pl::Profile> profile = pl::ParseProfile(profile_told->body());
  if (!ReadTold(plan_told->body(), &question) || !profile.ok()) {
    return CliError{ExitCode::kFailed, "FAILED",
                    fmt::format("what job {} told is none of this release's {}", job,
                                profile.ok() ? "plans" : "profiles: " + profile.refusal().what),
                    "use the same release of everstep for the job and this command"};
  }
  const NodeNames names(question, *plan_told);

  std::vector<std::uint32_t> nodes = question.nodes;
  std::string_view lose_text;
  const std::string lose = context.args.Get("lose");
  lose_text = lose;
  while (!lose_text.empty()) {
    const std::string node(Next(&lose_text, ","));
    const auto ranks = names.ranks().find(node);
    if (ranks == names.ranks().end()) {
      std::vector<std::string> known;
      for (const auto& [name, unused] : names.ranks()) known.push_back(name);
      return CliError{ExitCode::kNotFound, "NOT_FOUND",
                      fmt::format("job {} does not run on a node \"{}\"", job, node),
                      fmt::format("its nodes: {}", fmt::join(known, ", "))};
    }
    for (const std::uint32_t id : ranks->second) std::erase(nodes, id);
  }
  if (nodes.empty()) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("without {} job {} has no node left", lose, job),
                    "it would wait for nodes, and go on from its files"};
  }
  const std::uint32_t newest = *std::max_element(question.nodes.begin(), question.nodes.end());
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(join.value()); ++i) {
    nodes.push_back(newest + 1 + i);
  }
  const bool change = nodes != question.nodes;
  Result<Plan> after =
      change ? Ask(question, nodes, profile_told->body(), question.faults) : question.plan;
  if (!after.ok()) return after.error();
  const std::vector<Move> moves = Moves(question.plan, after.value(), profile.value());
  std::int64_t bytes = 0;
  for (const Move& move : moves) bytes += move.bytes;

  if (context.json()) {
    std::vector<std::string> pipelines, arrivals;
    for (const Row& row : after.value().rows) {
      std::vector<std::string> stages;
      for (std::size_t i = 0; i < row.nodes.size(); ++i) {
        stages.push_back(fmt::format("{{\"node\":\"{}\",\"first\":{},\"end\":{}}}",
                                     names(row.nodes[i]), row.cuts[i], row.cuts[i + 1]));
      }
      pipelines.push_back(fmt::format("{{\"microbatches\":{},\"stages\":[{}]}}", row.microbatches,
                                      fmt::join(stages, ",")));
    }
    for (const Move& move : moves) {
      arrivals.push_back(fmt::format("{{\"node\":\"{}\",\"first\":{},\"end\":{},\"bytes\":\"{}\"}}",
                                     names(move.node), move.first, move.end, move.bytes));
    }
    context.Out(fmt::format(
        "{{\"apiVersion\":\"everstep/"
        "v1\",\"kind\":\"JobPlan\",\"job\":\"{}\",\"generation\":\"{}\","
        "\"checksum\":\"{}\",\"secondsBefore\":{:.9f},\"seconds\":{:.9f},\"movedBytes\":\"{}\","
        "\"pipelines\":[{}],\"arrivals\":[{}]}}\n",
        job, plan_told->generation(), question.checksum, Seconds(question.plan.time_ns),
        Seconds(after.value().time_ns), bytes, fmt::join(pipelines, ","),
        fmt::join(arrivals, ",")));
    return ExitCode::kOk;
  }
  std::string text =
      fmt::format("job {}, generation {}, plan {}: {} ranks in {} pipelines, {} a step\n", job,
                  plan_told->generation(), question.checksum, question.nodes.size(),
                  question.plan.rows.size(), pl::TimeText(question.plan.time_ns));
  if (plan_told->generation() != told.value().generation()) {
    text += fmt::format("  the job is at generation {}, which has not told its plan yet\n",
                        told.value().generation());
  }
  if (change) {
    text += fmt::format("then: {} ranks in {} pipelines, {} a step\n", nodes.size(),
                        after.value().rows.size(), pl::TimeText(after.value().time_ns));
    if (after.value().copies <= question.faults) {
      text += fmt::format("  {} cop{} of each layer, the job asks for {}\n", after.value().copies,
                          after.value().copies == 1 ? "y" : "ies", question.faults + 1);
    }
    text += moves.empty() ? "  nothing moves\n" : fmt::format("  {} move\n", pl::SizeText(bytes));
  }
  Table table({{"PIPELINE", Align::kRight},
               {"MICROBATCHES", Align::kRight},
               {"NODE"},
               {"LAYERS", Align::kRight},
               {"RECEIVES", Align::kRight},
               {"BYTES", Align::kRight}});
  for (std::size_t p = 0; p < after.value().rows.size(); ++p) {
    const Row& row = after.value().rows[p];
    for (std::size_t i = 0; i < row.nodes.size(); ++i) {
      std::string layers;
      std::int64_t size = 0;
      for (const Move& move : moves) {
        if (move.node != row.nodes[i]) continue;
        layers += (layers.empty() ? "" : ",") + Layers(move.first, move.end);
        size += move.bytes;
      }
      table.Add({i == 0 ? std::to_string(p) : "", i == 0 ? std::to_string(row.microbatches) : "",
                 names(row.nodes[i]), Layers(row.cuts[i], row.cuts[i + 1]), OrDash(layers),
                 layers.empty() ? "-" : pl::SizeText(size)});
    }
  }
  context.Out(text + "\n" + table.Format(context.render.headers, context.render.max_width));
  return ExitCode::kOk;
}

}  // namespace everstep::cli
