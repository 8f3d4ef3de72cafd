// The command line of everstep-controller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace everstep::controller {

struct ServerOptions {
  std::string listen = "127.0.0.1:0";
  std::string http;  // empty: no HTTP
  std::string state_dir;
  std::string cluster;
  std::string log_file;
  bool log_json = false;
  std::string address_file;
  std::string snapshot;  // file with a StoreSnapshot, taken when the store is empty
  std::vector<std::string> known_dead;
  bool allow_shutdown = false;
  std::uint32_t lease_ms = 1500;
  std::uint32_t heartbeat_ms = 250;
  std::uint32_t max_nodes = 20000;
  std::uint32_t keep_failed_s = 3600;
};

// Exit codes, documented in docs/reference/exit-codes.md.
inline constexpr int kExitOk = 0;
inline constexpr int kExitOther = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitAddress = 3;      // cannot be bound
inline constexpr int kExitLocked = 4;       // another controller holds the state directory
inline constexpr int kExitStateDir = 5;     // missing, read-only, full
inline constexpr int kExitDamaged = 6;      // store damaged, or of a newer version
inline constexpr int kExitStoreFailed = 7;  // at run time

// -1: go on; else the process's exit code, and what was to be said has been said.
int ParseOptions(int argc, char** argv, ServerOptions* out);

// "host:port" or "[v6]:port". False: it is neither, or the port is not 0 to 65535.
bool SplitAddress(const std::string& address, std::string* host, int* port);

}  // namespace everstep::controller
