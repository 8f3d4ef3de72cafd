#include "controller/cli/context.h"

#include <thread>
#include <utility>

#include <fmt/format.h>

namespace everstep::cli {
namespace {

std::string Lookup(const Environment& environment, const std::string& name) {
  const auto it = environment.find(name);
  return it == environment.end() ? "" : it->second;
}

// "host:port[,host:port]", the port a number; the error shows the form.
Outcome CheckAddress(const std::string& from, const std::string& address) {
  for (std::size_t at = 0; at <= address.size();) {
    const std::size_t comma = std::min(address.find(',', at), address.size());
    const std::string one = address.substr(at, comma - at);
    at = comma + 1;
    const std::size_t colon = one.rfind(':');
    const bool good = colon != std::string::npos && colon > 0 && one.rfind("unix:", 0) != 0 &&
                      ParseInteger("", one.substr(colon + 1), 1, 65535).ok();
    if (!good) {
      return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                      fmt::format("{} is no controller's address: \"{}\"", from, address),
                      "the form is host:port, for example 127.0.0.1:7700"};
    }
  }
  return Done{};
}

}  // namespace

Context::Context(const Parsed& parsed, const Environment& environment, Io* io)
    : args(parsed), env(environment), registry(environment), io_(io) {}

Outcome Context::ReadOptions() {
  const std::string format = args.Get("output", "table");
  output = format == "json"    ? Output::kJson
           : format == "jsonl" ? Output::kJsonl
           : format == "name"  ? Output::kName
                               : Output::kTable;
  render.headers = !args.Has("no-headers");
  render.max_width = io_->width;
  if (args.Has("timeout")) {
    const Result<std::chrono::milliseconds> limit = ParseDuration("--timeout", args.Get("timeout"));
    if (!limit.ok()) return limit.error();
    timeout = limit.value();
  }
  return Done{};
}

void Context::Remark(const std::string& line) {
  if (!args.Has("quiet") && !json()) io_->err(line + "\n");
}

Result<Context::Target> Context::CheckedTarget(const std::string& address,
                                               const std::string& from) {
  if (Outcome good = CheckAddress(from, address); !good.ok()) return good.error();
  return Target{address, from};
}

Result<Context::Target> Context::FindTarget() const {
  if (args.Has("controller")) return CheckedTarget(args.Get("controller"), "--controller");
  std::string name = args.Get("cluster");
  std::string from = "--cluster";
  if (name.empty()) {
    if (std::string address = Lookup(env, "EVERSTEP_CONTROLLER"); !address.empty()) {
      return CheckedTarget(address, "EVERSTEP_CONTROLLER");
    }
    name = Lookup(env, "EVERSTEP_CLUSTER");
    from = "EVERSTEP_CLUSTER";
  }
  const Result<ClusterInfo> cluster = name.empty() ? registry.Only() : registry.Find(name);
  if (!cluster.ok()) return cluster.error();
  const ClusterInfo& info = cluster.value();
  if (info.controller.empty()) {
    return CliError{ExitCode::kUnreachable, "UNAVAILABLE",
                    fmt::format("the controller of cluster {} has not said where it is", info.name),
                    fmt::format("its log: {}/controller/controller.log", info.state_dir)};
  }
  return Target{info.controller, name.empty() ? "the only local cluster, " + info.name : from};
}

Result<std::string> Context::ControllerAddress() const {
  Result<Target> target = FindTarget();
  if (!target.ok()) return target.error();
  return target.value().address;
}

Result<std::unique_ptr<AdminClient>> Context::Client() {
  Result<Target> target = FindTarget();
  if (!target.ok()) return target.error();
  AdminClient::Options options;
  options.controller = target.value().address;
  options.named_by = target.value().from;
  // A timeout of 0 is "no limit" where a command waits; a single call always has one.
  if (timeout.count() > 0) options.timeout = timeout;
  return std::make_unique<AdminClient>(std::move(options));
}

Result<ClusterInfo> Context::Cluster() {
  if (args.Has("cluster")) return registry.Find(args.Get("cluster"));
  if (args.Has("controller")) return registry.ByController(args.Get("controller"));
  if (std::string address = Lookup(env, "EVERSTEP_CONTROLLER"); !address.empty()) {
    return registry.ByController(address);
  }
  if (std::string name = Lookup(env, "EVERSTEP_CLUSTER"); !name.empty()) {
    return registry.Find(name);
  }
  return registry.Only();
}

Result<ExitCode> Context::OnceOrWatch(
    const std::function<Result<std::string>(AdminClient*)>& show) {
  Result<std::unique_ptr<AdminClient>> client = Client();
  if (!client.ok()) return client.error();
  for (;;) {
    Result<std::string> text = show(client.value().get());
    if (!args.Has("watch")) {
      if (!text.ok()) return text.error();
      Out(text.value());
      return ExitCode::kOk;
    }
    // A watch outlives its controller: that is when people look most.
    if (!text.ok() && text.error().exit != ExitCode::kUnreachable) return text.error();
    const std::string body = text.ok() ? text.value() : FormatError(text.error());
    if (io_->width > 0) Out("\x1b[H\x1b[2J");
    if (text.ok() || io_->width > 0) Out(body);
    if (!text.ok() && io_->width == 0) io_->err(body);
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

}  // namespace everstep::cli
