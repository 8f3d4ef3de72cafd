#include "controller/cli/render_ckpt.h"

#include <cmath>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/table.h"
#include "controller/cli/units.h"

namespace everstep::cli {
namespace {

// "0-3" for ranks in a row, else "0,4,7".
std::string Ranks(const google::protobuf::RepeatedField<std::int32_t>& ranks) {
  if (ranks.empty()) return "-";
  const std::int32_t first = *ranks.begin(), last = *(ranks.end() - 1);
  if (ranks.size() > 1 && last - first + 1 == ranks.size()) {
    return fmt::format("{}-{}", first, last);
  }
  return fmt::format("{}", fmt::join(ranks, ","));
}

// Six digits, and never a 1 that is not one.
std::string Probability(double p) {
  if (p > 0.999999 && p < 1) return fmt::format("1 - {:.1e}", 1 - p);
  return fmt::format("{:.6g}", p);
}

// For a table of many: four digits.
std::string ShortChance(const v1::Survival& s) {
  const double p = s.probability();
  const std::string text =
      p > 0.9999 && p < 1 ? fmt::format("1 - {:.0e}", 1 - p) : fmt::format("{:.4g}", p);
  return s.exact() ? text : "~" + text;
}

std::string Chance(const v1::Survival& s) {
  if (s.exact()) return Probability(s.probability());
  return fmt::format("{} ({} to {})", Probability(s.probability()), Probability(s.low()),
                     Probability(s.high()));
}

std::string Step(std::int64_t step) {
  return step < 0 ? "-" : HumanCount(step);
}

// "4 of 5", "4 of 5-6": nodes that share parities.
std::string Groups(const v1::PolicyPrice& p) {
  if (p.groups() == 0) return "-";
  if (p.least_group() == p.largest_group()) {
    return fmt::format("{} of {}", p.groups(), p.least_group());
  }
  return fmt::format("{} of {}-{}", p.groups(), p.least_group(), p.largest_group());
}

// What each policy costs and survives. Sizes in bytes, or before the first commit in states of a
// node.
std::string Policies(const v1::CheckpointPlacement& p, const RenderOptions& options) {
  constexpr int kMostColumns = 8;
  constexpr double kSlots = 2;
  if (p.policies().empty()) return {};
  int losses = 0;
  for (const v1::PolicyPrice& policy : p.policies()) {
    losses = std::max(losses, std::min(kMostColumns, policy.survival_size()));
  }
  std::vector<Table::Column> columns = {{"POLICY"},
                                        {"GROUPS"},
                                        {"EXTRA MEMORY", Align::kRight},
                                        {"SENT/STEP", Align::kRight},
                                        {"ENCODE/STEP", Align::kRight},
                                        {"RESTORE", Align::kRight},
                                        {"TAKES", Align::kRight},
                                        {"SURVIVES ANY", Align::kRight},
                                        {"FATAL", Align::kRight}};
  for (int k = 1; k <= losses; ++k) columns.push_back({fmt::format("P({})", k)});
  Table table(std::move(columns));
  const auto size = [&p](double states) {
    if (p.node_bytes() == 0) return fmt::format("{:.3g}x", states);
    return HumanBytes(static_cast<std::uint64_t>(states * static_cast<double>(p.node_bytes())));
  };
  const auto seconds = [&p](double s) { return p.node_bytes() == 0 ? "-" : HumanSeconds(s); };
  for (const v1::PolicyPrice& policy : p.policies()) {
    std::vector<std::string> cells = {
        policy.policy() + (policy.in_force() ? ", in force" : ""),
        Groups(policy),
        size(kSlots * policy.memory()),
        size(policy.sent()),
        policy.encoded() > 0 ? seconds(policy.encode_seconds()) : "-",
        policy.survives_any() > 0 ? size(policy.restored()) : "-",
        policy.survives_any() > 0 ? seconds(policy.restore_seconds()) : "-",
        fmt::format("{}", policy.survives_any()),
        fmt::format("{}", policy.fatal_domains())};
    for (int k = 0; k < std::min(losses, policy.survival_size()); ++k) {
      cells.push_back(ShortChance(policy.survival(k)));
    }
    table.Add(std::move(cells));
  }
  const std::string state =
      p.node_bytes() == 0
          ? "nothing is committed yet: x stands for the bytes of one node's state"
          : fmt::format("a node's state is {}; {}", HumanBytes(p.node_bytes()), p.price_basis());
  return fmt::format("\n{}\n{}", FormatPairs({{"Policies", state}}),
                     table.Format(options.headers, options.max_width));
}

}  // namespace

std::string RenderPlacement(const v1::CheckpointPlacement& p, const RenderOptions& options) {
  std::string out = FormatPairs(
      {{"Job", fmt::format("{}, generation {}", p.job(), p.generation())},
       {"Redundancy", p.redundancy()},
       {"Copies",
        fmt::format("{} of each rank's state, own memory included{}", p.copies(),
                    p.parities_wanted() == 0
                        ? ""
                        : fmt::format("; {} of {} parities", p.parities(), p.parities_wanted()))},
       {"Strategy", fmt::format("{}: {}", p.shape(), p.why())},
       {"Layout", p.layout()},
       {"Committed step", Step(p.committed_step())},
       {"Lost alone, fatal",
        p.fatal().empty() ? "no domain" : fmt::format("{}", fmt::join(p.fatal(), ", "))}});
  Table nodes({{"NODE"},
               {"DOMAIN"},
               {"RANKS"},
               {p.parities_wanted() == 0 ? "COPY ON" : "PARITY ON"},
               {p.parities_wanted() == 0 ? "KEEPS COPIES OF" : "KEEPS PARITY OF"},
               {"BYTES", Align::kRight}});
  for (const v1::NodeCopies& n : p.nodes()) {
    nodes.Add({n.node(), OrDash(n.domain()), Ranks(n.ranks()),
               OrDash(fmt::format("{}", fmt::join(n.peers(), ","))), Ranks(n.keeps()),
               HumanBytes(n.bytes())});
  }
  out += "\n" + nodes.Format(options.headers, options.max_width);
  Table survival({{"LOST", Align::kRight}, {"OF", Align::kRight}, {"WHAT"}, {"STATE SURVIVES"}});
  const auto add = [&](const v1::Survival& s) {
    survival.Add({fmt::format("{}", s.lost()), fmt::format("{}", s.domains()),
                  s.level().empty() ? "node" : s.level(), Chance(s)});
  };
  for (const v1::Survival& s : p.by_nodes()) add(s);
  for (const v1::Survival& s : p.by_domain()) add(s);
  if (survival.rows() > 0) out += "\n" + survival.Format(options.headers, options.max_width);
  return out + Policies(p, options);
}

std::string RenderForecast(const v1::LossForecast& f, const RenderOptions& options) {
  const bool goes_on = f.state() == "ACTIVATING";
  const bool files = f.sources_size() > 0 && f.sources(0).tier() == "file";
  std::string verdict = !f.recoverable() ? "no" : files ? "yes, from files" : "yes, from memory";
  if (f.recoverable() && f.state() == "WAITING") verdict += ", once there are nodes";
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"Job", f.job()},
      {"Lost", fmt::format("{}", fmt::join(f.lost(), ", "))},
      {"Recoverable", verdict},
      {"Why", f.why()},
      {"Back to step", Step(f.step())},
      {"Committed step", Step(f.committed_step())},
      {"Newest step", Step(f.newest_step())}};
  if (f.has_survival()) {
    pairs.insert(pairs.begin() + 2,
                 {fmt::format("Any {} of {}", f.survival().lost(), f.survival().domains()),
                  "state survives with probability " + Chance(f.survival())});
    pairs[1].first = "Worst case";
  }
  if (goes_on) pairs.emplace_back("Goes on with", fmt::format("{}", fmt::join(f.members(), ", ")));
  if (f.sources_size() > 0 && !files) {
    pairs.emplace_back("To move",
                       fmt::format("{} to restore, {} for new copies afterwards",
                                   HumanBytes(f.bytes_to_move()), HumanBytes(f.bytes_to_copy())));
    if (goes_on) {
      pairs.emplace_back("Takes", fmt::format("{} once the loss is seen, which takes at most {}",
                                              HumanSeconds(f.estimated_seconds()),
                                              HumanSeconds(f.detect_seconds())));
      pairs.emplace_back("Estimated by", f.basis());
    }
  }
  std::string out = FormatPairs(pairs);
  if (f.sources_size() == 0) return out;
  Table sources({{"RANK", Align::kRight}, {"ON"}, {"TIER"}, {"FROM"}, {"BYTES", Align::kRight}});
  for (const v1::ShardSource& s : f.sources()) {
    std::string from = s.source_node();
    if (s.source_rank() != s.rank()) from += fmt::format(" (rank {}'s)", s.source_rank());
    sources.Add({fmt::format("{}", s.rank()), s.node(), s.tier(), from,
                 files ? "-" : HumanBytes(s.bytes())});
  }
  return out + "\n" + sources.Format(options.headers, options.max_width);
}

std::string RenderPlan(const v1::LossForecast& f, const RenderOptions& options) {
  const bool goes_on = f.state() == "ACTIVATING";
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"Job", f.job()},
      {"Lost", fmt::format("{}", fmt::join(f.lost(), ", "))},
      {"Step", Step(f.step())},
      {"Why", f.why()}};
  if (goes_on) pairs.emplace_back("Members", fmt::format("{}", fmt::join(f.members(), ", ")));
  if (f.sources_size() > 0) {
    pairs.emplace_back("To move", HumanBytes(f.bytes_to_move()));
    pairs.emplace_back("To copy", fmt::format("{} afterwards, until every shard has its copies",
                                              HumanBytes(f.bytes_to_copy())));
    pairs.emplace_back("Takes", fmt::format("{} once the loss is seen (by {})",
                                            HumanSeconds(f.estimated_seconds()), f.basis()));
  }
  std::string out = FormatPairs(pairs);
  if (f.sources_size() == 0) return out;
  Table sources({{"RANK", Align::kRight},
                 {"ON"},
                 {"TIER"},
                 {"FROM"},
                 {"BYTES", Align::kRight},
                 {"SOURCES", Align::kRight},
                 {"WHY"}});
  for (const v1::ShardSource& s : f.sources()) {
    std::string from = s.source_node();
    if (s.source_rank() != s.rank()) from += fmt::format(" (rank {}'s)", s.source_rank());
    sources.Add({fmt::format("{}", s.rank()), s.node(), s.tier(), from,
                 s.bytes() == 0 ? "-" : HumanBytes(s.bytes()), std::to_string(s.choices()),
                 s.why()});
  }
  return out + "\n" + sources.Format(options.headers, options.max_width);
}

}  // namespace everstep::cli
