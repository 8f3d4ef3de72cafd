// Where the launchers of a job meet: the endpoint of a torchrun command line, and whether it is
// this machine's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/launcher/flags.h"

namespace everstep::launcher {

inline constexpr std::uint16_t kDefaultPort = 29500;      // torchrun's for --master-port
inline constexpr std::uint16_t kDefaultRdzvPort = 29400;  // and for --rdzv-endpoint

struct Endpoint {
  std::string host;
  std::uint16_t port = 0;
  bool loopback = false;     // the host as written is this machine's inside: 127.*, ::1, localhost
  bool here = false;         // the host is this machine (an address of an interface, or its name)
  std::string error;         // not empty: the endpoint cannot be read
  std::string text() const;  // host:port, an IPv6 address in brackets
};

// From --rdzv-endpoint (c10d) or --master-addr and --master-port (static); looks at interfaces and
// asks the resolver. `is_host` in --rdzv-conf decides where it is given, --node-rank with static.
Endpoint FindEndpoint(const LaunchFlags& flags);

// This machine's address as `endpoint` sees it: --local-addr, else the source address of a route to
// it.
std::string LocalAddress(const LaunchFlags& flags, const Endpoint& endpoint);

// A TCP connect with a limit: does anybody listen?
enum class Probe : std::uint8_t {
  kListens,
  kRefused,  // the machine answers that nobody does
  kSilent,   // nothing came back in time, or there is no route
};
Probe ProbeTcp(const std::string& host, std::uint16_t port, int limit_ms);
// Many ("host:port") at the same time; the answers in their order. Each host's first address only.
std::vector<Probe> ProbeAll(const std::vector<std::string>& addresses, int limit_ms);

// "host:port" or "[v6]:port"; false when it is neither.
bool SplitHostPort(const std::string& text, std::string* host, std::uint16_t* port);

}  // namespace everstep::launcher
