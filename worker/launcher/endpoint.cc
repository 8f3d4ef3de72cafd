#include "worker/launcher/endpoint.h"

#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/endpoint.h"

namespace everstep::launcher {
namespace {

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

std::vector<Address> Resolve(const std::string& host, std::uint16_t port, int type) {
  addrinfo hints{};
  hints.ai_socktype = type;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return {};
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, ::freeaddrinfo);
  std::vector<Address> addresses;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    if (entry->ai_addrlen > sizeof(sockaddr_storage)) continue;
    Address address;
    std::memcpy(&address.storage, entry->ai_addr, entry->ai_addrlen);
    address.length = entry->ai_addrlen;
    addresses.push_back(address);
  }
  return addresses;
}

std::string Numeric(const sockaddr* address, socklen_t length) {
  std::array<char, NI_MAXHOST> text{};
  if (::getnameinfo(address, length, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST) != 0) {
    return {};
  }
  return text.data();
}

bool IsOwnAddress(const std::string& numeric) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return false;
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, ::freeifaddrs);
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) continue;
    const socklen_t length = entry->ifa_addr->sa_family == AF_INET    ? sizeof(sockaddr_in)
                             : entry->ifa_addr->sa_family == AF_INET6 ? sizeof(sockaddr_in6)
                                                                      : 0;
    if (length != 0 && Numeric(entry->ifa_addr, length) == numeric) return true;
  }
  return false;
}

bool IsTrue(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text == "1" || text == "true" || text == "t" || text == "yes" || text == "y";
}

}  // namespace

std::string Endpoint::text() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

bool SplitHostPort(const std::string& text, std::string* host, std::uint16_t* port) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  const char* last = text.data() + text.size();
  const auto read = std::from_chars(text.data() + colon + 1, last, *port);
  if (read.ec != std::errc() || read.ptr != last) return false;
  *host = text.substr(0, colon);
  if (host->front() == '[' && host->back() == ']') *host = host->substr(1, host->size() - 2);
  return true;
}

Endpoint FindEndpoint(const LaunchFlags& flags) {
  Endpoint endpoint;
  const bool is_static = flags.rdzv_backend == "static";
  // torchrun reads --rdzv-endpoint with static, too, and falls back to the master's address.
  if (!flags.rdzv_endpoint.empty()) {
    if (!SplitHostPort(flags.rdzv_endpoint, &endpoint.host, &endpoint.port)) {
      endpoint.host = flags.rdzv_endpoint;
      endpoint.port = is_static ? kDefaultPort : kDefaultRdzvPort;
      if (endpoint.host.find(':') != std::string::npos &&
          endpoint.host.find(']') == std::string::npos &&
          endpoint.host.find(':') == endpoint.host.rfind(':')) {
        endpoint.error = fmt::format(
            "everstep-run: --rdzv-endpoint={}: the port must be a number from 0 to 65535; write "
            "HOST:PORT",
            flags.rdzv_endpoint);
        return endpoint;
      }
    }
  } else if (is_static) {
    endpoint.host = flags.master_addr;
    endpoint.port = flags.master_port.value_or(kDefaultPort);
  } else {
    endpoint.error =
        "everstep-run: --rdzv-backend=c10d with more than one node needs "
        "--rdzv-endpoint=HOST:PORT, the "
        "same on every node";
    return endpoint;
  }
  const std::vector<Address> addresses = Resolve(endpoint.host, endpoint.port, SOCK_STREAM);
  if (addresses.empty()) {
    endpoint.error = fmt::format(
        "everstep-run: the endpoint's host {} has no address; correct the name, or give an IP "
        "address",
        endpoint.host);
    return endpoint;
  }
  bool own = false;
  endpoint.loopback = true;
  for (const Address& address : addresses) {
    const std::string numeric =
        Numeric(reinterpret_cast<const sockaddr*>(&address.storage), address.length);
    endpoint.loopback = endpoint.loopback && IsLoopback(numeric);
    own = own || IsLoopback(numeric) || IsOwnAddress(numeric);
  }
  endpoint.here = own;
  if (is_static) endpoint.here = flags.node_rank == 0;
  const auto is_host = flags.rdzv_conf.find("is_host");
  if (is_host != flags.rdzv_conf.end()) endpoint.here = IsTrue(is_host->second);
  return endpoint;
}

std::string LocalAddress(const LaunchFlags& flags, const Endpoint& endpoint) {
  if (!flags.local_addr.empty()) return flags.local_addr;
  for (const Address& address :
       Resolve(endpoint.host, endpoint.port == 0 ? 1 : endpoint.port, SOCK_DGRAM)) {
    // Connecting a datagram socket sends nothing: it asks the kernel for the route.
    const int probe = ::socket(address.storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (probe < 0) continue;
    Address own;
    own.length = sizeof(own.storage);
    const bool known =
        ::connect(probe, reinterpret_cast<const sockaddr*>(&address.storage), address.length) ==
            0 &&
        ::getsockname(probe, reinterpret_cast<sockaddr*>(&own.storage), &own.length) == 0;
    ::close(probe);
    if (!known) continue;
    std::string numeric = Numeric(reinterpret_cast<const sockaddr*>(&own.storage), own.length);
    if (!numeric.empty()) return numeric;
  }
  return "127.0.0.1";
}

namespace {

// A connect under way, or its immediate answer.
struct Attempt {
  int socket = -1;
  Probe answer = Probe::kSilent;
};

Probe AnswerOf(int error) {
  return error == 0 ? Probe::kListens : (error == ECONNREFUSED ? Probe::kRefused : Probe::kSilent);
}

Attempt Begin(const Address& address) {
  Attempt attempt;
  attempt.socket =
      ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (attempt.socket < 0) return attempt;
  const int failed = ::connect(attempt.socket, reinterpret_cast<const sockaddr*>(&address.storage),
                               address.length);
  if (failed != 0 && errno == EINPROGRESS) return attempt;
  attempt.answer = AnswerOf(failed == 0 ? 0 : errno);
  ::close(std::exchange(attempt.socket, -1));
  return attempt;
}

void Finish(std::vector<Attempt>* attempts, int limit_ms) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(limit_ms);
  while (true) {
    std::vector<pollfd> polled;
    for (const Attempt& attempt : *attempts) {
      if (attempt.socket >= 0) polled.push_back({attempt.socket, POLLOUT, 0});
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (polled.empty() || left.count() < 0) break;
    if (::poll(polled.data(), polled.size(), static_cast<int>(left.count())) == 0) break;
    for (const pollfd& ready : polled) {
      if (ready.revents == 0) continue;
      for (Attempt& attempt : *attempts) {
        if (attempt.socket != ready.fd) continue;
        int error = 0;
        socklen_t length = sizeof(error);
        if (::getsockopt(ready.fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
        attempt.answer = AnswerOf(error);
        ::close(std::exchange(attempt.socket, -1));
      }
    }
  }
  for (Attempt& attempt : *attempts) {
    if (attempt.socket >= 0) ::close(std::exchange(attempt.socket, -1));
  }
}

}  // namespace

Probe ProbeTcp(const std::string& host, std::uint16_t port, int limit_ms) {
  std::vector<Attempt> attempts;
  for (const Address& address : Resolve(host, port, SOCK_STREAM))
    attempts.push_back(Begin(address));
  Finish(&attempts, limit_ms);
  Probe result = Probe::kSilent;
  for (const Attempt& attempt : attempts) {
    if (attempt.answer == Probe::kListens) return Probe::kListens;
    if (attempt.answer == Probe::kRefused) result = Probe::kRefused;
  }
  return result;
}

std::vector<Probe> ProbeAll(const std::vector<std::string>& addresses, int limit_ms) {
  std::vector<Attempt> attempts;
  for (const std::string& text : addresses) {
    std::string host;
    std::uint16_t port = 0;
    std::vector<Address> resolved;
    if (SplitHostPort(text, &host, &port) && port != 0) resolved = Resolve(host, port, SOCK_STREAM);
    attempts.push_back(resolved.empty() ? Attempt{} : Begin(resolved.front()));
  }
  Finish(&attempts, limit_ms);
  std::vector<Probe> answers;
  answers.reserve(attempts.size());
  for (const Attempt& attempt : attempts) answers.push_back(attempt.answer);
  return answers;
}

}  // namespace everstep::launcher
