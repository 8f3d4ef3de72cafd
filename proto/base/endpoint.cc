#include "proto/base/endpoint.h"

#include <cstddef>

namespace everstep {
namespace {

// The host of HOST:PORT, [HOST]:PORT or HOST; an IPv6 address without brackets has no port.
std::string_view HostOf(std::string_view address) {
  if (!address.empty() && address.front() == '[') {
    const std::size_t end = address.find(']');
    return end == std::string_view::npos ? std::string_view() : address.substr(1, end - 1);
  }
  const std::size_t colon = address.find(':');
  if (colon == std::string_view::npos || address.find(':', colon + 1) != std::string_view::npos) {
    return address;
  }
  return address.substr(0, colon);
}

// 127.x.y.z, each at most three digits: a name such as 127.example.com is none.
bool IsLoopbackV4(std::string_view host) {
  if (!host.starts_with("127.")) return false;
  int dots = 0, digits = 0;
  for (const char c : host) {
    if (c == '.') {
      if (digits == 0) return false;
      ++dots;
      digits = 0;
    } else if (c < '0' || c > '9' || ++digits > 3) {
      return false;
    }
  }
  return dots == 3 && digits > 0;
}

}  // namespace

bool IsLoopback(std::string_view address) {
  if (address.starts_with("unix:")) return true;
  const std::string_view host = HostOf(address);
  return host == "localhost" || host == "::1" || IsLoopbackV4(host);
}

}  // namespace everstep
