#include "worker/client/attach.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "worker/keeper/attach_protocol.h"

namespace everstep::client {
namespace {

using checkpoint::Error;
using checkpoint::ErrorCode;
using std::chrono::steady_clock;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// False: the deadline came first.
bool WaitFor(int fd, short events, steady_clock::time_point deadline) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - steady_clock::now());
    if (left.count() <= 0) return false;
    pollfd p{fd, events, 0};
    const int n = poll(&p, 1, static_cast<int>(left.count()) + 1);
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return true;  // the next call on fd says what is wrong
  }
}

}  // namespace

checkpoint::Result<Attached> Attach(const std::string& keeper, const JobId& job, Rank rank,
                                    Generation generation, std::uint64_t slot_bytes,
                                    std::chrono::milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  const std::string who =
      fmt::format("rank {} of job {}: the node's keeper at {}", rank, job, keeper);
  const auto system = [&](const char* what) {
    return Error{
        ErrorCode::kUnavailable,
        fmt::format("{}: {}: {}; is the agent of this node running?", who, what, ErrnoText(errno))};
  };
  const auto late = [&] {
    return Error{ErrorCode::kTimedOut,
                 fmt::format("{}: no answer in {} ms; is it stopped (process state T)?", who,
                             timeout.count())};
  };

  keeper::AttachRequest request;
  if (job.empty() || job.size() >= sizeof request.job) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}: a job's id has 1 to {} characters", who, sizeof request.job - 1)};
  }
  std::memcpy(request.job, job.data(), job.size());
  request.rank = rank;
  request.generation = generation;
  request.slot_bytes = slot_bytes;

  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (keeper.empty() || keeper.size() >= sizeof address.sun_path) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: a socket's path has 1 to {} bytes", who,
                                                  sizeof address.sun_path - 1)};
  }
  std::memcpy(address.sun_path, keeper.data(), keeper.size());

  const Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket.get() < 0) return system("socket");
  while (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno == EISCONN) break;
    if (errno == EAGAIN) {  // its backlog is full
      if (steady_clock::now() >= deadline) return late();
      poll(nullptr, 0, 5);
    } else if (errno != EINTR) {
      return system("connecting");
    }
  }

  const auto* out = reinterpret_cast<const char*>(&request);
  for (std::size_t sent = 0; sent < sizeof request;) {
    const ssize_t n = send(socket.get(), out + sent, sizeof request - sent, MSG_NOSIGNAL);
    if (n > 0) {
      sent += static_cast<std::size_t>(n);
    } else if (errno == EAGAIN) {
      if (!WaitFor(socket.get(), POLLOUT, deadline)) return late();
    } else if (errno != EINTR) {
      return system("sending");
    }
  }

  keeper::AttachReply reply;
  auto* in = reinterpret_cast<char*>(&reply);
  Attached attached;
  const auto drop = [&attached] {
    if (attached.memfd >= 0) close(attached.memfd);
    if (attached.eventfd >= 0) close(attached.eventfd);
  };
  for (std::size_t got = 0; got < sizeof reply;) {
    if (!WaitFor(socket.get(), POLLIN, deadline)) {
      drop();
      return late();
    }
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
    iovec iov{in + got, sizeof reply - got};
    msghdr message{};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) {
      if (n == 0) errno = ECONNRESET;
      Error error = system("it closed the connection");
      drop();
      return error;
    }
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
        if (attached.memfd < 0) {
          attached.memfd = fd;
        } else if (attached.eventfd < 0) {
          attached.eventfd = fd;
        } else {
          close(fd);
        }
      }
    }
    got += static_cast<std::size_t>(n);
  }
  if (reply.magic != keeper::kAttachMagic) {
    drop();
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}: its answer is none of an Everstep keeper's", who)};
  }
  if (reply.error != 0) {
    drop();
    reply.message[sizeof reply.message - 1] = '\0';
    return Error{reply.error == ENOMEM ? ErrorCode::kNoMemory : ErrorCode::kRefused,
                 fmt::format("{} refused: {} ({})", who, reply.message, ErrnoText(reply.error))};
  }
  if (attached.memfd < 0 || attached.eventfd < 0) {
    drop();
    return Error{ErrorCode::kInvalid, fmt::format("{}: its answer came without descriptors", who)};
  }
  attached.slot_bytes = reply.slot_bytes;
  return attached;
}

}  // namespace everstep::client
