#include "controller/server/http.h"

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <httplib.h>

#include "proto/base/errno_text.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kThreads = 2;       // a scraper and a health check
constexpr std::size_t kMostWaiting = 16;  // accepted connections that no thread serves yet
constexpr std::size_t kMaxRequestBytes = 64 << 10;
constexpr int kTimeoutSeconds = 5;

constexpr char kPlain[] = "text/plain; charset=utf-8";
constexpr char kPrometheus[] = "text/plain; version=0.0.4; charset=utf-8";

bool Split(const std::string& listen, std::string* host, int* port) {
  const std::size_t colon = listen.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == listen.size()) return false;
  *host = listen.substr(0, colon);
  if (host->size() > 2 && host->front() == '[' && host->back() == ']') {
    *host = host->substr(1, host->size() - 2);
  }
  char* end = nullptr;
  const long number = std::strtol(listen.c_str() + colon + 1, &end, 10);
  if (*end != '\0' || number < 0 || number > 65535) return false;
  *port = static_cast<int>(number);
  return true;
}

// httplib's threads, behind a queue with an end: when it is full nothing more is accepted, and who
// comes waits in the kernel's short queue or is refused there. A connection is through after a few
// time-outs at most, so that the wait ends.
class BoundedPool final : public httplib::TaskQueue {
 public:
  void enqueue(std::function<void()> serve) override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      served_.wait(lock, [this] { return waiting_ < kMostWaiting; });
      ++waiting_;
    }
    pool_.enqueue([this, serve = std::move(serve)] {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        --waiting_;
      }
      served_.notify_one();
      serve();
    });
  }
  void shutdown() override { pool_.shutdown(); }

 private:
  std::mutex mutex_;
  std::condition_variable served_;
  std::size_t waiting_ = 0;
  httplib::ThreadPool pool_{kThreads};
};

}  // namespace

struct HttpServer::Impl {
  httplib::Server server;
  std::thread thread;
};

HttpServer::HttpServer() : impl_(std::make_unique<Impl>()) {}

HttpServer::~HttpServer() {
  if (!impl_->thread.joinable()) return;
  impl_->server.stop();
  impl_->thread.join();
}

std::unique_ptr<HttpServer> HttpServer::Start(const std::string& listen, HttpSources sources,
                                              std::string* error) {
  std::string host;
  int port = 0;
  if (!Split(listen, &host, &port)) {
    *error = fmt::format("--http {}: not HOST:PORT with a port from 0 to 65535", listen);
    return nullptr;
  }
  std::unique_ptr<HttpServer> http(new HttpServer());
  httplib::Server& server = http->impl_->server;
  server.new_task_queue = [] { return new BoundedPool; };
  server.set_payload_max_length(kMaxRequestBytes);
  server.set_read_timeout(kTimeoutSeconds);
  server.set_write_timeout(kTimeoutSeconds);
  server.set_keep_alive_max_count(100);
  server.set_keep_alive_timeout(1);  // the destructor waits for idle connections
  // No SO_REUSEPORT, httplib's default: two programs would share one port in silence.
  server.set_socket_options([](int socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  server.set_exception_handler(
      [](const httplib::Request&, httplib::Response& response, const std::exception_ptr&) {
        response.status = 500;
        response.set_content("the controller could not answer\n", kPlain);
      });
  server.Get("/metrics", [metrics = std::move(sources.metrics)](const httplib::Request&,
                                                                httplib::Response& response) {
    std::string page;
    if (metrics(&page)) {
      response.set_content(page, kPrometheus);
    } else {
      response.status = 503;
      response.set_content("the controller's thread did not answer in time\n", kPlain);
    }
  });
  server.Get("/healthz", [trouble = std::move(sources.trouble)](const httplib::Request&,
                                                                httplib::Response& response) {
    const std::string wrong = trouble();
    response.status = wrong.empty() ? 200 : 503;
    response.set_content(wrong.empty() ? std::string("ok\n") : wrong + "\n", kPlain);
  });
  errno = 0;
  const int bound = port == 0                         ? server.bind_to_any_port(host)
                    : server.bind_to_port(host, port) ? port
                                                      : -1;
  if (bound < 0) {
    *error = fmt::format(
        "cannot serve HTTP on {}: {}; choose another --http HOST:PORT, port 0 takes any", listen,
        errno != 0 ? ErrnoText(errno) : std::string("the address is not this machine's"));
    return nullptr;
  }
  http->address_ = fmt::format("{}:{}", listen.substr(0, listen.rfind(':')), bound);
  http->impl_->thread = std::thread([&server] { server.listen_after_bind(); });
  // stop() before the loop began would be lost.
  for (int i = 0; i < 2000 && !server.is_running(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return http;
}

}  // namespace everstep::controller
