// A controller that a test scripts: accepts agents' sessions on loopback, keeps every message,
// sends what the test says. One session at a time is "the" session: the newest.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent.grpc.pb.h"

namespace everstep::test {

class FakeController final : private v1::AgentService::Service {
 public:
  using Message = v1::AgentMessage;
  static constexpr auto kPatience = std::chrono::seconds(30);

  // 0: any port. Registers each agent at once.
  explicit FakeController(int port = 0) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials(),
                             &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeController() override { Stop(); }

  // As a controller that is killed: streams break at once.
  void Stop() {
    if (server_ == nullptr) return;
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    server_.reset();
  }

  int port() const { return port_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

  // The first incarnation that is given out next.
  void SetIncarnation(std::uint64_t next) {
    std::lock_guard<std::mutex> lock(mutex_);
    next_incarnation_ = next;
  }
  void SetKnownJobs(std::vector<std::string> jobs) {
    std::lock_guard<std::mutex> lock(mutex_);
    known_jobs_ = std::move(jobs);
  }
  // Sessions end with this status in place of a registration.
  void Refuse(grpc::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    refusal_ = std::move(status);
  }

  // The first message from number `from` on that `match` takes; none: it did not come in time.
  std::optional<Message> Wait(const std::function<bool(const Message&)>& match,
                              std::size_t from = 0,
                              std::chrono::milliseconds patience = kPatience) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto deadline = std::chrono::steady_clock::now() + patience;
    std::size_t at = from;
    while (true) {
      for (; at < messages_.size(); ++at) {
        if (match(messages_[at])) return messages_[at];
      }
      if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) return std::nullopt;
    }
  }
  std::size_t count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_.size();
  }
  std::size_t dials() {
    std::lock_guard<std::mutex> lock(mutex_);
    return dials_;
  }

  // Stamps incarnation and sequence. False: there is no session.
  bool Send(v1::ControllerMessage message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream_ == nullptr) return false;
    message.set_incarnation(incarnation_);
    message.set_sequence(++sequence_);
    return stream_->Write(message);
  }

 private:
  using Stream = grpc::ServerReaderWriter<v1::ControllerMessage, v1::AgentMessage>;

  grpc::Status Session(grpc::ServerContext*, Stream* stream) override {
    Message message;
    while (stream->Read(&message)) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (message.has_register_()) {
        ++dials_;
        if (!refusal_.ok()) return refusal_;
        stream_ = stream;
        incarnation_ = next_incarnation_++;
        sequence_ = 0;
        v1::ControllerMessage reply;
        reply.set_incarnation(incarnation_);
        reply.set_sequence(++sequence_);
        reply.mutable_registered()->set_cluster("test");
        reply.mutable_registered()->set_heartbeat_interval_ms(100);
        reply.mutable_registered()->set_lease_ms(1500);
        for (const std::string& job : known_jobs_) reply.mutable_registered()->add_known_jobs(job);
        stream->Write(reply);
      }
      messages_.push_back(message);
      changed_.notify_all();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream_ == stream) stream_ = nullptr;
    return grpc::Status::OK;
  }

  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Stream* stream_ = nullptr;
  std::uint64_t incarnation_ = 0;
  std::uint64_t next_incarnation_ = 1;
  std::uint64_t sequence_ = 0;
  std::size_t dials_ = 0;
  std::vector<std::string> known_jobs_ = {"job"};
  grpc::Status refusal_;
  std::vector<Message> messages_;
};

}  // namespace everstep::test
