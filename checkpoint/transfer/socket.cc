#include "checkpoint/transfer/socket.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <utility>

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

struct FreeAddress {
  void operator()(addrinfo* a) const { freeaddrinfo(a); }
};
using AddressList = std::unique_ptr<addrinfo, FreeAddress>;

// "host:port", "[v6]:port"
Result<AddressList> Resolve(const std::string& address, int flags) {
  const auto colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    return Error{ErrorCode::kInvalid, fmt::format("'{}' is not host:port", address)};
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int code = getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &list);
  if (code != 0) {
    return Error{ErrorCode::kUnavailable, fmt::format("{}: {}", address, gai_strerror(code))};
  }
  return AddressList(list);
}

constexpr milliseconds kLookForCancel{100};

int ClampMs(steady_clock::duration d) {
  const auto ms = std::chrono::duration_cast<milliseconds>(d).count();
  return static_cast<int>(std::clamp<std::int64_t>(ms + 1, 0, 60'000));
}

}  // namespace

Connection::Connection(int fd, std::string peer, milliseconds idle, SteadyTime deadline)
    : fd_(fd), peer_(std::move(peer)), idle_(idle), deadline_(deadline) {
  const int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}
Connection::Connection(Connection&& other) noexcept {
  *this = std::move(other);
}
Connection& Connection::operator=(Connection&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(peer_, other.peer_);
  std::swap(idle_, other.idle_);
  std::swap(deadline_, other.deadline_);
  std::swap(cancel_, other.cancel_);
  return *this;
}
Connection::~Connection() {
  if (fd_ >= 0) close(fd_);
}

Error Connection::System(const char* doing) const {
  return {ErrorCode::kUnavailable, fmt::format("peer {}: {}: {}", peer_, doing, ErrnoText(errno))};
}

std::optional<Error> Connection::Over(const char* doing) const {
  if (cancel_ != nullptr && cancel_->load(std::memory_order_relaxed)) {
    return Error{ErrorCode::kStale, fmt::format("peer {}: {}: given up here", peer_, doing)};
  }
  if (steady_clock::now() < deadline_) return std::nullopt;
  return Error{
      ErrorCode::kTimedOut,
      fmt::format("peer {}: {}: not done by its deadline, the peer is too slow", peer_, doing)};
}

Outcome Connection::Wait(short events, const char* doing) {
  const SteadyTime until = steady_clock::now() + idle_;
  for (;;) {
    if (auto over = Over(doing)) return *over;
    const SteadyTime now = steady_clock::now();
    if (now >= until) {
      return Error{ErrorCode::kTimedOut, fmt::format("peer {}: {}: no byte moved for {} ms", peer_,
                                                     doing, idle_.count())};
    }
    pollfd p{fd_, events, 0};
    const auto look = cancel_ != nullptr ? now + kLookForCancel : until;
    const int n = poll(&p, 1, ClampMs(std::min({until, deadline_, look}) - now));
    if (n > 0) return Done{};
    if (n < 0 && errno != EINTR) return System(doing);
  }
}

Result<Connection> Connection::Dial(const std::string& address, milliseconds connect_timeout,
                                    milliseconds idle, SteadyTime deadline,
                                    const std::atomic<bool>* cancel) {
  auto list = Resolve(address, 0);
  if (!list.ok()) return list.error();
  Error error{ErrorCode::kUnavailable, fmt::format("peer {}: no address", address)};
  for (const addrinfo* a = list.value().get(); a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) continue;
    Connection c(fd, address, std::min(idle, connect_timeout), deadline);
    c.cancel_ = cancel;
    if (connect(fd, a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS) {
      error = c.System("connecting");
      continue;
    }
    if (auto ok = c.Wait(POLLOUT, "connecting"); !ok.ok()) {
      error = ok.error();
      continue;
    }
    int failure = 0;
    socklen_t size = sizeof failure;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &size);
    if (failure != 0) {
      errno = failure;
      error = c.System("connecting");
      continue;
    }
    c.idle_ = idle;
    c.FitBuffers();
    return c;
  }
  return error;
}

Outcome Connection::Send(const void* data, std::size_t size, bool more) {
  const auto* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = send(fd_, p, size, MSG_NOSIGNAL | (more ? MSG_MORE : 0));
    if (n > 0) {
      p += n;
      size -= static_cast<std::size_t>(n);
    } else if (errno == EAGAIN) {
      if (auto ok = Wait(POLLOUT, "sending"); !ok.ok()) return ok;
    } else if (errno != EINTR) {
      return System("sending");
    }
  }
  return Done{};
}

Outcome Connection::SendFile(int file, std::uint64_t offset, std::uint64_t size) {
  auto at = static_cast<off_t>(offset);
  while (size > 0) {
    const ssize_t n = sendfile(fd_, file, &at, size);
    if (n > 0) {
      size -= static_cast<std::uint64_t>(n);
    } else if (n == 0) {
      return Error{ErrorCode::kInternal, fmt::format("peer {}: the file ends too soon", peer_)};
    } else if (errno == EAGAIN) {
      if (auto ok = Wait(POLLOUT, "sending"); !ok.ok()) return ok;
    } else if (errno != EINTR) {
      return System("sending");
    }
    if (auto over = Over("sending"); over && size > 0) return *over;
  }
  return Done{};
}

Outcome Connection::Receive(void* data, std::size_t size) {
  auto* p = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t n = recv(fd_, p, size, 0);
    if (n > 0) {
      p += n;
      size -= static_cast<std::size_t>(n);
      if (size == 0) break;
      if (auto over = Over("receiving")) return *over;
    } else if (n == 0) {
      return Error{
          ErrorCode::kUnavailable,
          fmt::format("peer {}: closed the connection with {} bytes to come", peer_, size)};
    } else if (errno == EAGAIN) {
      if (auto ok = Wait(POLLIN, "receiving"); !ok.ok()) return ok;
    } else if (errno != EINTR) {
      return System("receiving");
    }
  }
  return Done{};
}

bool Connection::Readable() const {
  pollfd p{fd_, POLLIN, 0};
  return poll(&p, 1, 0) > 0;
}

bool Connection::SameHost() const {
  sockaddr_storage here{}, there{};
  socklen_t here_size = sizeof here, there_size = sizeof there;
  if (getsockname(fd_, reinterpret_cast<sockaddr*>(&here), &here_size) != 0 ||
      getpeername(fd_, reinterpret_cast<sockaddr*>(&there), &there_size) != 0 ||
      here.ss_family != there.ss_family) {
    return false;
  }
  if (here.ss_family == AF_INET6) {
    return std::memcmp(&reinterpret_cast<sockaddr_in6*>(&here)->sin6_addr,
                       &reinterpret_cast<sockaddr_in6*>(&there)->sin6_addr, 16) == 0;
  }
  return here.ss_family == AF_INET && reinterpret_cast<sockaddr_in*>(&here)->sin_addr.s_addr ==
                                          reinterpret_cast<sockaddr_in*>(&there)->sin_addr.s_addr;
}

void Connection::FitBuffers() {
  constexpr int kInCache = 1 << 20;
  if (!SameHost()) return;
  setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &kInCache, sizeof kInCache);
  setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &kInCache, sizeof kInCache);
}

void Connection::LimitInFlight(std::uint64_t bytes) {
  const int half = static_cast<int>(std::min<std::uint64_t>(bytes, 1u << 30) / 2);  // it is doubled
  setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &half, sizeof half);
}

Result<Listening> Listen(const std::string& address, std::uint16_t port) {
  const std::string host = address.find(':') == std::string::npos ? address : "[" + address + "]";
  auto list = Resolve(fmt::format("{}:{}", host, port), AI_PASSIVE);
  if (!list.ok()) return list.error();
  const addrinfo* a = list.value().get();
  const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int on = 1;
  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
      bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, 128) != 0) {
    Error error{ErrorCode::kUnavailable,
                fmt::format("checkpoint data plane: cannot listen on {}:{}: {}{}", address, port,
                            ErrnoText(errno),
                            errno == EADDRINUSE ? "; choose another port, or 0 for any" : "")};
    if (fd >= 0) close(fd);
    return error;
  }
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
  const std::uint16_t got = bound.ss_family == AF_INET6
                                ? ntohs(reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port)
                                : ntohs(reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
  return Listening{fd, got};
}

std::uint64_t RandomNonce() {
  std::uint64_t value = 0;
  for (std::size_t got = 0; got < sizeof value;) {
    const ssize_t n = getrandom(reinterpret_cast<char*>(&value) + got, sizeof value - got, 0);
    if (n > 0) got += static_cast<std::size_t>(n);
  }
  return value;
}

void BlockSigpipe() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

}  // namespace everstep::checkpoint
