#include "controller/server/options.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>

#include <fmt/format.h>

#include "controller/server/metrics.h"
#include "proto/base/version.h"

namespace everstep::controller {
namespace {

int Usage(const std::string& text) {
  fmt::print(stderr, "everstep-controller: {}; see everstep-controller --help\n", text);
  return kExitUsage;
}

}  // namespace

int ParseOptions(int argc, char** argv, ServerOptions* out) {
  CLI::App app{
      "The controller of an Everstep cluster: decides which nodes run what, and writes it down "
      "first.\n"
      "SIGTERM ends it in order; jobs run on, and the next controller on the same state directory "
      "takes "
      "them up.",
      "everstep-controller"};
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  bool metrics_reference = false;
  app.set_version_flag("--version", fmt::format("everstep {}", kVersion));
  app.add_option("--listen", out->listen, "gRPC address HOST:PORT; port 0 takes any")
      ->capture_default_str();
  app.add_option("--http", out->http,
                 "HOST:PORT of /metrics and /healthz (the real address goes to "
                 "STATE/http.address); none when not "
                 "given");
  app.add_option("--state-dir", out->state_dir, "Directory of the store, made when absent");
  app.add_option("--cluster", out->cluster,
                 "Cluster id this store must have; a new store takes it");
  app.add_option("--log-file", out->log_file, "Append the log here instead of standard error");
  app.add_flag("--log-json", out->log_json, "One JSON object for each line of the log");
  app.add_option("--address-file", out->address_file,
                 "Write the real gRPC address here once it serves");
  app.add_option("--recover-snapshot,--from-snapshot", out->snapshot,
                 "Start from this snapshot of another controller when the store is empty");
  app.add_option("--known-dead", out->known_dead, "Nodes known to be gone: lost at once, no lease")
      ->delimiter(',')
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_flag("--allow-shutdown", out->allow_shutdown,
               "Let AdminService.Shutdown end this process");
  app.add_option("--lease-ms", out->lease_ms,
                 "Silence after which a node is lost; grows with measured delay")
      ->capture_default_str()
      ->check(CLI::Range(200, 600000));
  app.add_option("--heartbeat-ms", out->heartbeat_ms, "Interval agents are told to beat at")
      ->capture_default_str()
      ->check(CLI::Range(20, 60000));
  app.add_option("--max-nodes", out->max_nodes, "Agents taken at most")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000000));
  app.add_option("--keep-failed-s", out->keep_failed_s,
                 "Seconds for which what a failed job captured stays in its nodes' memory, so that "
                 "it may be handed in again; 0: until everstep job cancel --forget")
      ->capture_default_str()
      ->check(CLI::Range(0, 31536000));
  app.add_flag("--metrics-reference", metrics_reference,
               "Print the tables of docs/reference/metrics.md and end");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {  // CLI11's own way of ending; nothing else throws
    if (e.get_exit_code() != 0) return Usage(e.what());
    app.exit(e);
    return kExitOk;
  }
  if (metrics_reference) {
    fmt::print("{}", MetricsMarkdown());
    return kExitOk;
  }
  std::string host;
  int port = 0;
  if (out->state_dir.empty())
    return Usage("--state-dir is required: a directory for what must outlive this process");
  if (!SplitAddress(out->listen, &host, &port)) {
    return Usage(
        fmt::format("--listen {}: not HOST:PORT with a port from 0 to 65535", out->listen));
  }
  if (!out->http.empty() && !SplitAddress(out->http, &host, &port)) {
    return Usage(fmt::format("--http {}: not HOST:PORT with a port from 0 to 65535", out->http));
  }
  if (out->heartbeat_ms * 2 > out->lease_ms) {
    return Usage(
        fmt::format("--heartbeat-ms {}: a lease of {} ms needs a beat every {} ms or oftener",
                    out->heartbeat_ms, out->lease_ms, out->lease_ms / 2));
  }
  if (out->log_file == "-") out->log_file.clear();
  return -1;
}

bool SplitAddress(const std::string& address, std::string* host, int* port) {
  const std::size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) return false;
  *host = address.substr(0, colon);
  if (host->size() > 2 && host->front() == '[' && host->back() == ']')
    *host = host->substr(1, host->size() - 2);
  if (address[colon + 1] < '0' || address[colon + 1] > '9') return false;
  char* end = nullptr;
  const long number = std::strtol(address.c_str() + colon + 1, &end, 10);
  if (*end != '\0' || number < 0 || number > 65535) return false;
  *port = static_cast<int>(number);
  return true;
}

}  // namespace everstep::controller
