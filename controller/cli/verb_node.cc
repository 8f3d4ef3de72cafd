// `everstep node list|show|drain|undrain`.
#include <fmt/format.h>

#include "controller/cli/suggest.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

std::string NodesText(Context& context, const v1::NodeList& nodes) {
  if (context.output == Output::kJson) return ToJson("NodeList", nodes);
  if (context.output == Output::kTable) return RenderNodes(nodes, context.render);
  std::string out;
  for (const v1::NodeStatus& node : nodes.items()) {
    out += context.output == Output::kName ? node.node() + "\n" : ToJsonLine(node);
  }
  return out;
}

CliError NoSuchNode(const std::string& name, const v1::NodeList& nodes) {
  std::vector<std::string> names;
  for (const v1::NodeStatus& node : nodes.items()) names.push_back(node.node());
  const std::string near = Nearest(name, names);
  return {ExitCode::kNotFound, "NOT_FOUND", fmt::format("no node is named \"{}\"", name),
          !near.empty()   ? fmt::format("did you mean: {}", near)
          : names.empty() ? "no node has registered yet; a node is an everstep-agent"
                          : "everstep node list shows the nodes"};
}

// Every name first, then the first change: a typo changes nothing.
Outcome CheckNames(AdminClient* client, const std::vector<std::string>& names) {
  Result<v1::NodeList> nodes = client->ListNodes();
  if (!nodes.ok()) return nodes.error();
  for (const std::string& name : names) {
    bool known = false;
    for (const v1::NodeStatus& node : nodes.value().items()) known |= node.node() == name;
    if (!known) return NoSuchNode(name, nodes.value());
  }
  return Done{};
}

}  // namespace

Result<v1::NodeStatus> FindNode(AdminClient* client, const std::string& name) {
  Result<v1::NodeList> nodes = client->ListNodes();
  if (!nodes.ok()) return nodes.error();
  for (v1::NodeStatus& node : *nodes.value().mutable_items()) {
    if (node.node() == name) return std::move(node);
  }
  return NoSuchNode(name, nodes.value());
}

VerbResult RunNodeList(Context& context) {
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    Result<v1::NodeList> nodes = client->ListNodes();
    if (!nodes.ok()) return nodes.error();
    return NodesText(context, nodes.value());
  });
}

VerbResult RunNodeShow(Context& context) {
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::NodeStatus> node = FindNode(client.value().get(), context.args.words[0]);
  if (!node.ok()) return node.error();
  switch (context.output) {
    case Output::kJson: context.Out(ToJson("Node", node.value())); break;
    case Output::kJsonl: context.Out(ToJsonLine(node.value())); break;
    case Output::kName: context.Out(node.value().node() + "\n"); break;
    default: context.Out(RenderNode(node.value(), context.render));
  }
  return ExitCode::kOk;
}

VerbResult RunNodeDrain(Context& context) {
  v1::DrainNodeRequest request;
  request.set_reason(context.args.Get("reason"));
  if (request.reason().empty()) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT", "node drain needs --reason",
                    fmt::format("say why, for whoever finds it drained: everstep node drain {} "
                                "--reason \"memory errors\"",
                                context.args.words[0])};
  }
  const Result<std::chrono::milliseconds> deadline =
      ParseDuration("--deadline", context.args.Get("deadline", "0"));
  if (!deadline.ok()) return deadline.error();
  if (deadline.value().count() > UINT32_MAX) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                    fmt::format("--deadline cannot be {}", context.args.Get("deadline")),
                    "at most 49d"};
  }
  request.set_deadline_ms(static_cast<std::uint32_t>(deadline.value().count()));
  request.set_allow_pause(context.args.Has("allow-pause"));
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  if (Outcome known = CheckNames(client.value().get(), context.args.words); !known.ok()) {
    return known.error();
  }
  v1::NodeList after;
  for (const std::string& name : context.args.words) {
    request.set_node(name);
    Result<v1::NodeStatus> node = client.value()->DrainNode(request);
    if (!node.ok()) return node.error();
    *after.add_items() = std::move(node.value());
  }
  context.Out(NodesText(context, after));
  return ExitCode::kOk;
}

VerbResult RunNodeUndrain(Context& context) {
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  if (Outcome known = CheckNames(client.value().get(), context.args.words); !known.ok()) {
    return known.error();
  }
  v1::NodeList after;
  for (const std::string& name : context.args.words) {
    Result<v1::NodeStatus> node = client.value()->UndrainNode(name);
    if (!node.ok()) return node.error();
    *after.add_items() = std::move(node.value());
  }
  context.Out(NodesText(context, after));
  return ExitCode::kOk;
}

}  // namespace everstep::cli
