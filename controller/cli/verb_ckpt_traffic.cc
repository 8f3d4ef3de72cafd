// `everstep ckpt traffic`: what each node's checkpoints send, what became of it, and what it costs
// training.
#include <fmt/format.h>

#include <algorithm>

#include "checkpoint/store/memory_limit.h"
#include "checkpoint/transfer/traffic.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

namespace cp = everstep::checkpoint;

std::string Bytes(std::uint64_t bytes) {
  return bytes == 0 ? "-" : cp::HumanBytes(bytes);
}
std::string Rate(double bytes_per_s) {
  return bytes_per_s < 1 ? "-" : cp::HumanBytes(static_cast<std::uint64_t>(bytes_per_s)) + "/s";
}

// One line for each outcome other than "done", by node.
void AddTroubles(const std::string& node, const char* what,
                 const google::protobuf::Map<std::string, std::uint64_t>& counts, Table* table) {
  for (std::size_t i = 1; i < cp::kPeerOutcomes; ++i) {
    const auto outcome = static_cast<cp::PeerOutcome>(i);
    const auto it = counts.find(cp::PeerOutcomeName(outcome));
    if (it == counts.end() || it->second == 0) continue;
    table->Add({node, what, it->first, HumanCount(static_cast<std::int64_t>(it->second)),
                cp::PeerOutcomeExplanation(outcome)});
  }
}

std::uint64_t Count(const google::protobuf::Map<std::string, std::uint64_t>& counts) {
  const auto it = counts.find("done");
  return it == counts.end() ? 0 : it->second;
}

std::string Text(Context& context, const v1::NodeList& nodes) {
  Table table({{"NODE"},
               {"COMMIT", Align::kRight},
               {"REPAIR", Align::kRight},
               {"PERSIST", Align::kRight},
               {"SCRUB", Align::kRight},
               {"UNCHANGED", Align::kRight},
               {"SLOTS", Align::kRight},
               {"RATE", Align::kRight},
               {"LIMIT", Align::kRight},
               {"STEP", Align::kRight},
               {"SLOWDOWN AT MOST", Align::kRight}});
  Table troubles({{"NODE"}, {"WHAT"}, {"OUTCOME"}, {"TIMES", Align::kRight}, {"MEANS"}});
  for (const v1::NodeStatus& node : nodes.items()) {
    const v1::CheckpointTraffic& t = node.traffic();
    const auto sent = [&t](int i) {
      return i < t.sent_bytes_size() ? t.sent_bytes(i) : std::uint64_t{0};
    };
    const bool known = t.baseline_step_s() > 0;
    const double seconds = t.push_seconds();
    table.Add({node.node(), Bytes(sent(0)), Bytes(sent(1)), Bytes(sent(2)), Bytes(sent(3)),
               Bytes(t.unchanged_bytes()), HumanCount(static_cast<std::int64_t>(Count(t.pushes()))),
               Rate(seconds > 0 ? static_cast<double>(sent(0) + sent(1)) / seconds : 0),
               Rate(t.limit_bytes_per_s()), known ? HumanSeconds(t.step_s()) : "-",
               known ? fmt::format("{:.1f}%", 100 * t.slowdown()) : "-"});
    AddTroubles(node.node(), "sending", t.pushes(), &troubles);
    AddTroubles(node.node(), "receiving", t.arrivals(), &troubles);
  }
  std::string text = table.Format(context.render.headers, context.render.max_width);
  if (troubles.rows() > 0)
    text += "\n" + troubles.Format(context.render.headers, context.render.max_width);
  return text;
}

}  // namespace

VerbResult RunCkptTraffic(Context& context) {
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    Result<v1::NodeList> nodes = client->ListNodes();
    if (!nodes.ok()) return nodes.error();
    const std::vector<std::string>& wanted = context.args.words;
    for (const std::string& name : wanted) {
      Result<v1::NodeStatus> known = FindNode(client, name);
      if (!known.ok()) return known.error();
    }
    v1::NodeList shown;
    for (v1::NodeStatus& node : *nodes.value().mutable_items()) {
      if (wanted.empty() || std::find(wanted.begin(), wanted.end(), node.node()) != wanted.end()) {
        *shown.add_items() = std::move(node);
      }
    }
    if (context.output == Output::kTable) return Text(context, shown);
    std::vector<std::string> items;
    std::string lines;
    for (const v1::NodeStatus& node : shown.items()) {
      if (context.output == Output::kName) {
        lines += node.node() + "\n";
        continue;
      }
      // The node's name and its traffic alone.
      v1::NodeStatus only;
      only.set_node(node.node());
      *only.mutable_traffic() = node.traffic();
      lines += ToJsonLine(only);
      items.push_back(ToJsonLine(only));
    }
    return context.output == Output::kJson ? JsonItems("TrafficList", items) : lines;
  });
}

}  // namespace everstep::cli
