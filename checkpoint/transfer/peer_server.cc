#include "checkpoint/transfer/peer_server.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {

JobId PeerSession::job() const {
  return GetText(request_.job);
}

Outcome PeerSession::Respond(ResponseFrame response) {
  response.mac = ResponseMac(key_, client_nonce_, server_nonce_, response);
  return connection_->Send(&response, sizeof response);
}
Outcome PeerSession::Refuse(Status status, const std::string& message) {
  ResponseFrame response{.status = status};
  PutText(response.message, message);
  return Respond(response);
}
Outcome PeerSession::Acknowledge(std::uint32_t crc_root) {
  AckFrame ack{.crc_root = crc_root};
  ack.mac = AckMac(key_, client_nonce_, server_nonce_, ack);
  return connection_->Send(&ack, sizeof ack);
}
Outcome PeerSession::AcknowledgeError(const Error& error, std::uint64_t chunk) {
  AckFrame ack{.status = ToStatus(error.code), .chunk = static_cast<std::uint32_t>(chunk)};
  PutText(ack.message, error.message);
  ack.mac = AckMac(key_, client_nonce_, server_nonce_, ack);
  return connection_->Send(&ack, sizeof ack);
}

struct PeerServer::Impl {
  struct Worker {
    std::thread thread;
    int fd = -1;  // for shutdown(2); closed by the thread, under the lock
    bool done = false;
  };

  PeerServerOptions options;
  PeerHandler* handler = nullptr;
  int listener = -1;
  std::uint16_t port = 0;
  int wake = -1;
  std::thread acceptor;
  std::mutex mutex;
  bool stopping = false;
  std::list<Worker> workers;

  void Accept();
  void Run(int fd, std::string peer, Worker* self);
  void Handle(Connection* connection);
  void Reap(bool all);
};

namespace {

std::string PeerName(const sockaddr_storage& from) {
  char text[INET6_ADDRSTRLEN] = {};
  if (from.ss_family == AF_INET6) {
    const auto* a = reinterpret_cast<const sockaddr_in6*>(&from);
    inet_ntop(AF_INET6, &a->sin6_addr, text, sizeof text);
    return fmt::format("[{}]:{}", text, ntohs(a->sin6_port));
  }
  const auto* a = reinterpret_cast<const sockaddr_in*>(&from);
  inet_ntop(AF_INET, &a->sin_addr, text, sizeof text);
  return fmt::format("{}:{}", text, ntohs(a->sin_port));
}

}  // namespace

void PeerServer::Impl::Handle(Connection* connection) {
  HelloFrame theirs;
  if (!connection->Receive(&theirs, sizeof theirs).ok()) return;
  const HelloFrame mine{.nonce = RandomNonce()};
  if (!connection->Send(&mine, sizeof mine).ok()) return;
  if (!CheckHello(theirs, connection->peer()).ok()) return;  // it reads our version and says so
  KillPoint("arrive.greeted");
  RequestFrame request;
  if (!connection->Receive(&request, sizeof request).ok()) return;
  const JobId job = GetText(request.job);
  const auto key = handler->KeyOf(job);
  PeerSession session(connection, request, key.value_or(SipKey{}), theirs.nonce, mine.nonce);
  if (request.magic != kFrameMagic || !IsOp(request.op)) return;
  if (!key) {
    (void)session.Refuse(Status::kUnknown, fmt::format("job {} is not on this node (yet)", job));
    return;
  }
  if (!SameTag(request.mac, RequestMac(*key, theirs.nonce, mine.nonce, request))) {
    (void)session.Refuse(Status::kKey, fmt::format("wrong key for job {}", job));
    return;
  }
  handler->Serve(&session);
}

void PeerServer::Impl::Run(int fd, std::string peer, Worker* self) {
  BlockSigpipe();
  {
    Connection connection(fd, std::move(peer), options.limits.io_timeout,
                          DeadlineFor(options.limits, 0));
    connection.FitBuffers();
    Handle(&connection);
    std::lock_guard<std::mutex> lock(mutex);
    self->fd = -1;  // from here on nobody shuts it down
  }
  std::lock_guard<std::mutex> lock(mutex);
  self->done = true;
}

void PeerServer::Impl::Reap(bool all) {
  std::list<Worker> over;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto it = workers.begin(); it != workers.end();) {
      const auto next = std::next(it);
      if (all || it->done) over.splice(over.end(), workers, it);
      it = next;
    }
    for (Worker& w : over) {
      if (w.fd >= 0) shutdown(w.fd, SHUT_RDWR);
    }
  }
  for (Worker& w : over) w.thread.join();
}

void PeerServer::Impl::Accept() {
  for (;;) {
    pollfd fds[2] = {{listener, POLLIN, 0}, {wake, POLLIN, 0}};
    poll(fds, 2, 1000);
    Reap(false);
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (stopping) return;
    }
    if ((fds[0].revents & POLLIN) == 0) continue;
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    const int fd =
        accept4(listener, reinterpret_cast<sockaddr*>(&from), &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) poll(nullptr, 0, 20);  // no descriptor is free: later
      continue;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (workers.size() >= static_cast<std::size_t>(options.max_connections)) {
      close(fd);  // the peer sees a closed connection and tries again
      continue;
    }
    Worker& worker = workers.emplace_back();
    worker.fd = fd;
    try {
      worker.thread =
          std::thread([this, fd, peer = PeerName(from), &worker] { Run(fd, peer, &worker); });
    } catch (const std::system_error&) {  // no thread is free: as with too many connections
      workers.pop_back();
      close(fd);
    }
  }
}

PeerServer::PeerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PeerServer::~PeerServer() {
  Stop();
}
std::uint16_t PeerServer::port() const {
  return impl_->port;
}

Result<std::unique_ptr<PeerServer>> PeerServer::Start(const PeerServerOptions& options,
                                                      PeerHandler* handler) {
  auto listening = Listen(options.bind_address, options.port);
  if (!listening.ok()) return listening.error();
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->handler = handler;
  impl->listener = listening.value().fd;
  impl->port = listening.value().port;
  impl->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  Impl* raw = impl.get();
  impl->acceptor = std::thread([raw] { raw->Accept(); });
  return std::unique_ptr<PeerServer>(new PeerServer(std::move(impl)));
}

void PeerServer::Stop() {
  if (impl_ == nullptr || !impl_->acceptor.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->stopping = true;
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(impl_->wake, &one, sizeof one);
  impl_->acceptor.join();
  impl_->Reap(true);
  close(impl_->listener);
  close(impl_->wake);
}

}  // namespace everstep::checkpoint
