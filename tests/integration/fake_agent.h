// An agent that a test scripts: a real stream to a controller, beats by itself, keeps every
// message, says what the test says. The obliging one (Obey) answers warm, prepare, activate and
// stop as a healthy node does.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent.grpc.pb.h"
#include "proto/base/version.h"
#include "tests/integration/controller_process.h"

namespace everstep::test {

class FakeAgent {
 public:
  using Message = v1::ControllerMessage;

  explicit FakeAgent(std::string node) {
    hello_.set_protocol_version(kProtocolVersion);
    hello_.set_version(kVersion);
    hello_.set_node(std::move(node));
    hello_.set_address("127.0.0.1");
    hello_.set_data_port(4000);
    hello_.set_boot_id("a-test");
    hello_.set_keeper_pid(1000);
    hello_.set_keeper_start_time(1);
  }
  ~FakeAgent() { Break(); }
  FakeAgent(const FakeAgent&) = delete;
  FakeAgent& operator=(const FakeAgent&) = delete;

  // What the next registration says.
  v1::Register& hello() { return hello_; }
  void Obey() { obey_ = true; }

  // Opens a stream. Connect also registers and waits for the answer; false: it did not come (see
  // status()).
  void Open(const std::string& address) {
    Break();
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 200);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
    auto channel =
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
    stub_ = v1::AgentService::NewStub(channel);
    context_ = std::make_unique<grpc::ClientContext>();
    context_->set_wait_for_ready(true);
    context_->set_deadline(std::chrono::system_clock::now() + 3 * kPatience);
    stream_ = stub_->Session(context_.get());
    over_ = false;
    incarnation_ = 0;
    reader_ = std::thread([this] { Read(); });
  }
  bool Connect(const std::string& address) {
    Open(address);
    const std::size_t from = count();
    v1::AgentMessage message;
    *message.mutable_register_() = hello_;
    Send(message);
    const auto answer = Wait([](const Message& m) { return m.has_registered(); }, from);
    if (!answer) return false;
    beating_ = true;
    beats_ = std::thread([this] { Beat(); });
    return true;
  }

  // Stamps the incarnation. False: the stream is over.
  bool Send(v1::AgentMessage message) { return SendAs(incarnation_, std::move(message)); }
  bool SendAs(std::uint64_t incarnation, v1::AgentMessage message) {
    message.set_incarnation(incarnation);
    std::lock_guard<std::mutex> lock(write_);
    return stream_ != nullptr && stream_->Write(message);
  }

  // The first message from number `from` on that `match` takes; none: not in time, or the stream
  // ended.
  std::optional<Message> Wait(const std::function<bool(const Message&)>& match,
                              std::size_t from = 0) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    for (std::size_t at = from;;) {
      for (; at < messages_.size(); ++at) {
        if (match(messages_[at])) return messages_[at];
      }
      if (over_ || changed_.wait_until(lock, deadline) == std::cv_status::timeout)
        return std::nullopt;
    }
  }
  std::optional<Message> WaitActivate(std::uint64_t generation) {
    return Wait([generation](const Message& m) {
      return m.has_activate() && m.activate().generation() == generation;
    });
  }
  std::size_t count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_.size();
  }
  std::vector<Message> messages() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_;
  }
  // Waits for the controller to end the stream, and returns how.
  grpc::Status End() {
    if (reader_.joinable()) reader_.join();
    StopBeats();
    return status_;
  }

  // As an agent that is killed: the stream breaks.
  void Break() {
    if (context_ != nullptr) context_->TryCancel();
    if (reader_.joinable()) reader_.join();
    StopBeats();
    std::lock_guard<std::mutex> lock(write_);
    stream_.reset();
  }
  // Alive and silent: no beats, the stream stays.
  void Hush() { StopBeats(); }

  // The job's workers on this node, as told when registering anew.
  void Hold(const v1::Activate& activate) {
    hello_.clear_jobs();
    v1::JobOnNode* job = hello_.add_jobs();
    job->set_job(activate.job());
    job->set_generation(activate.generation());
    job->set_activated(true);
    for (const v1::WorkerPlan& plan : activate.plan().workers()) *job->add_workers() = Worker(plan);
    hello_.set_previous_incarnation(incarnation_);
  }
  void Exit(const v1::Activate& activate, std::int32_t code) {
    for (const v1::WorkerPlan& plan : activate.plan().workers()) Exit(activate, plan, code);
  }
  void Exit(const v1::Activate& activate, const v1::WorkerPlan& plan, std::int32_t code) {
    v1::AgentMessage message;
    v1::WorkerExited* exited = message.mutable_worker_exited();
    exited->set_job(activate.job());
    exited->set_generation(activate.generation());
    exited->set_rank(plan.rank());
    exited->set_local_rank(plan.local_rank());
    exited->set_pid(5000 + plan.rank());
    exited->mutable_exit()->set_code(code);
    Send(message);
  }
  std::uint64_t incarnation() const { return incarnation_; }

 private:
  static v1::WorkerOnNode Worker(const v1::WorkerPlan& plan) {
    v1::WorkerOnNode worker;
    worker.set_rank(plan.rank());
    worker.set_local_rank(plan.local_rank());
    worker.set_pid(5000 + plan.rank());
    worker.set_running(true);
    return worker;
  }

  void Read() {
    Message message;
    while (stream_->Read(&message)) {
      if (message.has_registered()) incarnation_ = message.incarnation();
      if (obey_) Answer(message);
      std::lock_guard<std::mutex> lock(mutex_);
      messages_.push_back(message);
      changed_.notify_all();
    }
    status_ = stream_->Finish();
    std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }

  void Answer(const Message& message) {
    v1::AgentMessage answer;
    if (message.has_warm()) {
      answer.mutable_node_warm()->set_job(message.warm().job());
      answer.mutable_node_warm()->set_warm(true);
      Send(answer);
    } else if (message.has_prepare()) {
      answer.mutable_prepared()->set_job(message.prepare().job());
      answer.mutable_prepared()->set_generation(message.prepare().generation());
      answer.mutable_prepared()->set_store_port(message.prepare().host_store() ? 29500 : 0);
      answer.mutable_prepared()->mutable_holds()->set_job(message.prepare().job());
      Send(answer);
    } else if (message.has_activate()) {
      v1::Activated* activated = answer.mutable_activated();
      activated->set_job(message.activate().job());
      activated->set_generation(message.activate().generation());
      for (const v1::WorkerPlan& plan : message.activate().plan().workers()) {
        *activated->add_workers() = Worker(plan);
      }
      Send(answer);
    } else if (message.has_stop_job()) {
      answer.mutable_stopped()->set_job(message.stop_job().job());
      answer.mutable_stopped()->set_generation(message.stop_job().generation());
      Send(answer);
    }
  }

  void Beat() {
    std::uint64_t sequence = 0;
    std::unique_lock<std::mutex> lock(beat_mutex_);
    while (beating_) {
      lock.unlock();
      v1::AgentMessage message;
      message.mutable_heartbeat()->set_sequence(++sequence);
      message.mutable_heartbeat()->set_interval_ms(50);
      Send(message);
      lock.lock();
      beat_.wait_for(lock, std::chrono::milliseconds(50), [this] { return !beating_; });
    }
  }
  void StopBeats() {
    {
      std::lock_guard<std::mutex> lock(beat_mutex_);
      beating_ = false;
    }
    beat_.notify_all();
    if (beats_.joinable()) beats_.join();
  }

  v1::Register hello_;
  std::atomic<bool> obey_{false};
  std::unique_ptr<v1::AgentService::Stub> stub_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AgentMessage, Message>> stream_;
  std::thread reader_;
  std::atomic<std::uint64_t> incarnation_{0};
  grpc::Status status_;

  std::mutex write_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Message> messages_;
  bool over_ = true;

  std::mutex beat_mutex_;
  std::condition_variable beat_;
  bool beating_ = false;
  std::thread beats_;
};

}  // namespace everstep::test
