#include "controller/server/options.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "proto/base/version.h"

namespace everstep::controller {

int ParseOptions(int argc, char** argv, ServerOptions* out) {
  CLI::App app{"The controller of an Everstep cluster: decides which nodes run what, and writes it down first.",
               "everstep-controller"};
  app.set_version_flag("--version", std::string("everstep-controller ") + kVersion);
  app.add_option("--listen", out->listen, "gRPC address HOST:PORT; port 0 takes any")->capture_default_str();
  app.add_option("--http", out->http, "address HOST:PORT of /metrics and /healthz; none when not given");
  app.add_option("--state-dir", out->state_dir, "directory of the store (made when absent)")->required();
  app.add_option("--cluster", out->cluster, "cluster id this store must have; a new store takes it");
  app.add_option("--log-file", out->log_file, "append the log here instead of standard error");
  app.add_flag("--log-json", out->log_json, "one JSON object for each line of the log");
  app.add_option("--address-file", out->address_file, "write the real gRPC address here once it serves");
  app.add_option("--from-snapshot,--recover-snapshot", out->snapshot,
                 "start from this snapshot of another controller when the store is empty");
  app.add_option("--known-dead", out->known_dead, "nodes known to be gone: lost at once, no lease")->delimiter(',');
  app.add_flag("--allow-shutdown", out->allow_shutdown, "let AdminService.Shutdown end this process");
  app.add_option("--lease-ms", out->lease_ms, "silence after which a node is lost; grows with measured delay")
      ->capture_default_str()->check(CLI::Range(200, 600000));
  app.add_option("--heartbeat-ms", out->heartbeat_ms, "interval agents are told to beat at")
      ->capture_default_str()->check(CLI::Range(20, 60000));
  app.add_option("--max-nodes", out->max_nodes, "agents taken at most")->capture_default_str()->check(CLI::Range(1, 1000000));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {  // CLI11's own way of ending; nothing else throws
    const int code = app.exit(e);
    return code == 0 ? kExitOk : kExitUsage;
  }
  if (out->heartbeat_ms * 2 > out->lease_ms) {
    std::fprintf(stderr, "error: a lease of %u ms needs a heartbeat of at most %u ms, not %u\n", out->lease_ms,
                 out->lease_ms / 2, out->heartbeat_ms);
    return kExitUsage;
  }
  return -1;
}

bool IsLoopback(const std::string& address) {
  return address.starts_with("127.") || address.starts_with("localhost:") || address.starts_with("[::1]");
}

}  // namespace everstep::controller
