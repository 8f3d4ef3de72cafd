// /metrics and /healthz over HTTP, on threads of its own. Reads only; no other path is served.
//
// cpp-httplib stays in http.cc: it is heavy to compile.
#pragma once

#include <functional>
#include <memory>
#include <string>

namespace everstep::controller {

struct HttpSources {
  // The page of /metrics; false: the controller did not answer in time (503). Called on HTTP
  // threads.
  std::function<bool(std::string* page)> metrics;
  // Empty: healthy; else one line that says what is wrong (503).
  std::function<std::string()> trouble;
};

class HttpServer {
 public:
  // Binds host:port (0: any) and serves. Null: *error says who, what and what to do.
  static std::unique_ptr<HttpServer> Start(const std::string& listen, HttpSources sources,
                                           std::string* error);
  // Waits for requests under way, at most a few seconds (read and write time-outs bound them).
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  const std::string& address() const { return address_; }  // with the real port

 private:
  struct Impl;
  HttpServer();

  std::string address_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace everstep::controller
