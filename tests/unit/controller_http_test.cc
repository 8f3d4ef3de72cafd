// /metrics and /healthz under more clients than it has threads for.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "controller/server/http.h"

namespace everstep::controller {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

std::size_t OpenFiles() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& each : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// Dials, and asks when it is through; the kernel keeps the words for whoever reads them.
int Ask(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<std::uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  (void)connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to);
  pollfd p{fd, POLLOUT, 0};
  poll(&p, 1, 20);  // beyond the kernel's own queue nobody gets through
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
  (void)send(fd, request.data(), request.size(), MSG_NOSIGNAL);
  return fd;
}

TEST(HttpServer, TakesNoMoreConnectionsThanItCanRemember) {
  std::atomic<bool> open{false};
  std::string error;
  auto http = HttpServer::Start("127.0.0.1:0",
                                {.metrics =
                                     [&](std::string* page) {
                                       const auto end = steady_clock::now() + milliseconds(60'000);
                                       while (!open && steady_clock::now() < end) {
                                         std::this_thread::sleep_for(milliseconds(5));
                                       }
                                       *page = "a_metric 1\n";
                                       return true;
                                     },
                                 .trouble = [] { return std::string(); }},
                                &error);
  ASSERT_NE(http, nullptr) << error;
  const int port = std::stoi(http->address().substr(http->address().rfind(':') + 1));
  const std::size_t before = OpenFiles();
  constexpr std::size_t kClients = 100;
  std::vector<int> clients;
  for (std::size_t i = 0; i < kClients; ++i) clients.push_back(Ask(port));
  // Two are served, sixteen wait, one is in its acceptor's hand.
  EXPECT_LE(OpenFiles(), before + kClients + 19);
  EXPECT_GT(OpenFiles(), before + kClients) << "some are taken";
  open = true;
  std::size_t answered = 0;
  for (const int fd : clients) {
    char bytes[64];
    pollfd p{fd, POLLIN, 0};
    if (poll(&p, 1, answered < 19 ? 10'000 : 0) > 0)
      answered += recv(fd, bytes, sizeof bytes, 0) > 0;
    close(fd);
  }
  EXPECT_GE(answered, 19U) << "who was taken is served";
}

}  // namespace
}  // namespace everstep::controller
