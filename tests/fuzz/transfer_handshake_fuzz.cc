// What anybody may send to the data plane's port: a hello, a request, any bytes. Nobody who does
// not know a job's key gets beyond the handshake, and every connection ends.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/peer_server.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace
using everstep::JobId;

namespace {

constexpr SipKey kKey{3, 4};

class Handler final : public PeerHandler {
 public:
  std::optional<SipKey> KeyOf(const JobId& job) override {
    if (job == "job") return kKey;
    return std::nullopt;
  }
  void Serve(PeerSession* session) override {
    if (session->job() != "job") __builtin_trap();
    const RequestFrame& request = session->request();
    if (request.magic != kFrameMagic || !IsOp(request.op)) __builtin_trap();
    ++served;
    (void)session->Refuse(Status::kBusy, "not now");
  }
  std::atomic<int> served{0};
};

int Dial(std::uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd < 0 || connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) __builtin_trap();
  return fd;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Handler handler;
  static PeerServer* const server = [] {
    BlockSigpipe();
    auto started = PeerServer::Start({}, &handler);
    if (!started.ok()) __builtin_trap();
    return started.value().release();
  }();
  if (size == 0) return 0;
  const std::uint8_t mode = *data++;
  --size;
  HelloFrame hello{.nonce = 9};
  const auto take = [&](void* to, std::size_t bytes) {
    const std::size_t n = std::min(bytes, size);
    std::memcpy(to, data, n);
    data += n;
    size -= n;
  };
  if ((mode & 1) != 0) take(&hello, sizeof hello);
  const int fd = Dial(server->port());
  const int before = handler.served;
  [[maybe_unused]] ssize_t n = send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
  HelloFrame theirs;
  bool signs = false;
  if (recv(fd, &theirs, sizeof theirs, MSG_WAITALL) == sizeof theirs) {
    RequestFrame request;
    const bool whole = size >= sizeof request;
    take(&request, sizeof request);
    if ((mode & 2) != 0) {
      std::memset(request.job, 0, sizeof request.job);
      std::memcpy(request.job, "job", 3);
    }
    if ((mode & 4) != 0) request.magic = kFrameMagic;
    signs = (mode & 8) != 0;
    if (signs) request.mac = RequestMac(kKey, hello.nonce, theirs.nonce, request);
    const std::size_t bytes = whole || (mode & 16) != 0 ? sizeof request : sizeof request / 2;
    n = send(fd, &request, bytes, MSG_NOSIGNAL);
    if (size > 0) n = send(fd, data, size, MSG_NOSIGNAL);
  }
  shutdown(fd, SHUT_WR);
  char drain[4096];
  while (recv(fd, drain, sizeof drain, 0) > 0) {
  }
  close(fd);
  if (handler.served != before && !signs) __builtin_trap();  // nobody gets in unsigned
  return 0;
}
