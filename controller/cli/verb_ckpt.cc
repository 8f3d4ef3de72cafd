// `everstep ckpt placement|survive|plan`.
#include <algorithm>

#include <fmt/format.h>

#include "controller/cli/render_ckpt.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

constexpr std::int64_t kMaxNodes = 20'000;

std::vector<std::string> Parts(const std::string& list) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    if (comma > at) out.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return out;
}

// What is lost, by names, domains or number, asked of the controller.
Result<v1::LossForecast> Foretell(Context& context, const std::string& verb) {
  v1::ForetellLossRequest request;
  for (const std::string& node : Parts(context.args.Get("lose"))) request.add_nodes(node);
  for (const std::string& domain : Parts(context.args.Get("domain"))) {
    if (domain.find('=') == std::string::npos) {
      return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                      fmt::format("--domain {} is not LEVEL=NAME", domain),
                      "the labels of the agents: everstep node show NODE"};
    }
    request.add_domains(domain);
  }
  if (context.args.Has("nodes")) {
    const Result<std::int64_t> count =
        ParseInteger("--nodes", context.args.Get("nodes"), 1, kMaxNodes);
    if (!count.ok()) return count.error();
    request.set_count(static_cast<std::uint32_t>(count.value()));
  }
  const bool named = request.nodes_size() + request.domains_size() > 0;
  if (named == (request.count() > 0)) {
    return CliError{
        ExitCode::kUsage, "INVALID_ARGUMENT",
        named ? "--nodes goes without --lose and --domain" : verb + " needs to know what is lost",
        fmt::format("everstep {} {} --lose n3,n7 | --domain zone=a | --nodes 2", verb,
                    context.args.words[0])};
  }
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  request.set_job(job.value().job());
  return client.value()->ForetellLoss(request);
}

VerbResult Tell(Context& context, const std::string& verb,
                std::string (*render)(const v1::LossForecast&, const RenderOptions&)) {
  const Result<v1::LossForecast> forecast = Foretell(context, verb);
  if (!forecast.ok()) return forecast.error();
  switch (context.output) {
    case Output::kJson: context.Out(ToJson("LossForecast", forecast.value())); break;
    case Output::kJsonl: context.Out(ToJsonLine(forecast.value())); break;
    case Output::kName:
      for (const std::string& node : forecast.value().lost()) context.Out(node + "\n");
      break;
    default: context.Out(render(forecast.value(), context.render));
  }
  return forecast.value().recoverable() ? ExitCode::kOk : ExitCode::kFailed;
}

}  // namespace

VerbResult RunCkptPlacement(Context& context) {
  v1::GetPlacementRequest request;
  const Result<std::int64_t> most =
      ParseInteger("--nodes", context.args.Get("nodes", "8"), 1, 1000);
  if (!most.ok()) return most.error();
  request.set_max_lost(static_cast<std::uint32_t>(most.value()));
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    const Result<v1::JobStatus> job = FindJob(client, context.args.words[0]);
    if (!job.ok()) return job.error();
    request.set_job(job.value().job());
    const Result<v1::CheckpointPlacement> placement = client->GetPlacement(request);
    if (!placement.ok()) return placement.error();
    switch (context.output) {
      case Output::kJson: return ToJson("CheckpointPlacement", placement.value());
      case Output::kJsonl: return ToJsonLine(placement.value());
      case Output::kName: {
        std::string names;
        for (const v1::NodeCopies& node : placement.value().nodes()) names += node.node() + "\n";
        return names;
      }
      default: return RenderPlacement(placement.value(), context.render);
    }
  });
}

VerbResult RunCkptSurvive(Context& context) {
  return Tell(context, "ckpt survive", RenderForecast);
}

VerbResult RunCkptPlan(Context& context) {
  return Tell(context, "ckpt plan", RenderPlan);
}

}  // namespace everstep::cli
