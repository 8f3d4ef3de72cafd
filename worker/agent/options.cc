#include "worker/agent/options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "proto/base/names.h"
#include "proto/base/version.h"
#include "worker/agent/dial_backoff.h"
#include "worker/agent/log_layout.h"

namespace everstep::agent {
namespace {

constexpr std::size_t kMaxSocketPath = 107;  // sockaddr_un
}  // namespace

std::string CheckOptions(const AgentOptions& o) {
  if (!IsNodeName(o.node)) {
    return fmt::format("--node {}: a node's name is [a-z0-9.-]{{1,63}}; choose another",
                       o.node.substr(0, 200));
  }
  if (o.keeper_socket.size() > kMaxSocketPath) {
    return fmt::format(
        "the keeper's socket {} has {} bytes, the system's limit is {}; choose a "
        "shorter --state-dir or --node",
        o.keeper_socket, o.keeper_socket.size(), kMaxSocketPath);
  }
  return "";
}

ParseOutcome ParseOptions(int argc, const char* const* argv, AgentOptions* o) {
  CLI::App app(
      "One node's agent: dials the controller and runs its workers through everstep-keeper, which "
      "outlives it.\n"
      "SIGTERM ends the node in order (workers, keeper, agent). SIGUSR1 and SIGKILL end the agent "
      "alone: workers run on, and the next agent on the same state directory adopts them.",
      "everstep-agent");
  app.set_version_flag("--version", fmt::format("everstep {}", kVersion));
  std::string controllers;
  std::vector<std::string> labels;
  std::string level = "info";
  double leave = ToSeconds(o->leave_timeout);
  double scrub_every = ToSeconds(o->scrub_every);
  double grace = ToSeconds(o->stop_grace);
  app.add_option(
         "--controller", controllers,
         "HOST:PORT[,HOST:PORT...]; kept in STATE/nodes/NAME/controller, which is read again "
         "at each reconnect")
      ->envname("EVERSTEP_CONTROLLER");
  app.add_option("--node,--name,--node-id", o->node, "This node's name, unique in the cluster")
      ->required()
      ->envname("EVERSTEP_NODE_NAME");
  app.add_option("--state-dir", o->state_dir, "Everything of this node lies in STATE/nodes/NAME")
      ->required()
      ->envname("EVERSTEP_STATE_DIR");
  app.add_option(
      "--address", o->address,
      "Host or IP by which other nodes reach this one (default: the one that reaches the "
      "controller)");
  app.add_option("--slots", o->slots, "Workers this node may run at once; 0: no limit");
  app.add_option(
      "--label", labels,
      "KEY=VALUE: a failure domain (region, zone, pool, rack, host, evict); may be repeated");
  app.add_option("--data-port", o->data_port, "TCP port of the checkpoint data plane; 0: any")
      ->check(CLI::Range(0, 65535));
  app.add_option("--ckpt-streams", o->ckpt_streams,
                 "Connections for one checkpoint at most; small ones take fewer")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  app.add_option("--ckpt-gap-trace", o->ckpt_gap_trace,
                 "File of an iteration's busy and idle network spans, which checkpoints then fill");
  app.add_option("--ckpt-scrub-rate", o->scrub_mib_per_s,
                 "MiB/s at which checkpoint memory is checked in idle time at most; 0: never")
      ->check(CLI::Range(0.0, 1048576.0))
      ->capture_default_str();
  app.add_option("--ckpt-scrub-every", scrub_every,
                 "Seconds within which each copy is checked once")
      ->check(CLI::Range(0.01, 86400.0))
      ->capture_default_str();
  app.add_option("--keeper", o->keeper_program,
                 "Path of everstep-keeper (default: beside this program)");
  app.add_option("--keeper-socket", o->keeper_socket, "Default: STATE/nodes/NAME/keeper.sock");
  app.add_option("--log-dir", o->log_dir,
                 "Workers' output, where the submitter named no directory (default: "
                 "STATE/nodes/NAME/jobs)");
  app.add_option("--log-file", o->log.file,
                 "The agent's own log, '-': stderr (default: STATE/nodes/NAME/agent.log)");
  app.add_flag("--log-json", o->log.json, "One JSON object a line");
  app.add_option("--log-level", level, "debug, info, warning or error")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_option("--lifeline", o->lifeline,
                 "Descriptor of a pipe; when its other end closes, keeper, workers and agent end");
  app.add_option("--local-command", o->local_command,
                 "File of everstep-run: this node's own command line, in place of the job's");
  app.add_option("--leave-timeout", leave,
                 "Seconds that the controller gets, after SIGTERM, to move workers away")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  app.add_option("--stop-grace", grace,
                 "Seconds from SIGTERM to SIGKILL for workers that are left then")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) {
      app.exit(e);
      return ParseOutcome::kExitOk;
    }
    fmt::print(stderr, "everstep-agent: {}; see everstep-agent --help\n", e.what());
    return ParseOutcome::kExitUsage;
  }
  std::vector<std::string> bad;
  o->controllers = ParseAddresses(controllers, &bad);
  std::string error;
  if (!bad.empty()) {
    error = fmt::format("--controller {}: '{}' is not host:port", controllers, bad.front());
  }
  for (const std::string& label : labels) {
    const auto equals = label.find('=');
    if (equals == 0 || equals == std::string::npos) {
      error = fmt::format("--label {} is not KEY=VALUE", label);
      continue;
    }
    o->labels[label.substr(0, equals)] = label.substr(equals + 1);
  }
  std::error_code ec;
  o->state_dir = std::filesystem::absolute(o->state_dir, ec).lexically_normal().string();
  o->node_dir = fmt::format("{}/nodes/{}", o->state_dir, o->node);
  if (o->keeper_socket.empty()) o->keeper_socket = o->node_dir + "/keeper.sock";
  if (o->log.file.empty()) o->log.file = o->node_dir + "/agent.log";
  if (o->log.file == "-") o->log.file.clear();
  o->log.process = "agent";
  o->log.level = level == "debug"     ? LogLevel::kDebug
                 : level == "warning" ? LogLevel::kWarning
                 : level == "error"   ? LogLevel::kError
                                      : LogLevel::kInfo;
  o->scrub_every = Milliseconds(static_cast<std::int64_t>(scrub_every * 1000));
  o->leave_timeout = Milliseconds(static_cast<std::int64_t>(leave * 1000));
  o->stop_grace = Milliseconds(static_cast<std::int64_t>(grace * 1000));
  if (error.empty()) error = CheckOptions(*o);
  if (!error.empty()) {
    fmt::print(stderr, "everstep-agent: {}\n", error);
    return ParseOutcome::kExitUsage;
  }
  return ParseOutcome::kRun;
}

}  // namespace everstep::agent
