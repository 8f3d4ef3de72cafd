// Thousands of agents in one process: each a connection and a stream of its own, none a thread.
// They do as they are told at once and have no workers.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "agent.grpc.pb.h"
#include "proto/base/version.h"

namespace everstep::bench {

class AgentSwarm {
 public:
  AgentSwarm(const std::string& address, int count) {
    for (int i = 0; i < count; ++i) agents_.push_back(std::make_unique<Agent>(this, address, i));
    // In waves: a listen queue is short.
    for (std::size_t i = 0; i < agents_.size(); ++i) {
      agents_[i]->Start();
      const std::size_t lead = 200;
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_for(lock, std::chrono::seconds(10), [&] {
        return i < lead ||
               static_cast<std::size_t>(registered_) + static_cast<std::size_t>(lost_) >= i - lead;
      });
    }
  }
  ~AgentSwarm() {
    for (auto& agent : agents_) agent->Stop();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return done_ == static_cast<int>(agents_.size()); });
  }
  AgentSwarm(const AgentSwarm&) = delete;
  AgentSwarm& operator=(const AgentSwarm&) = delete;

  bool WaitRegistered(std::chrono::seconds patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, patience,
                             [this] { return registered_ == static_cast<int>(agents_.size()); });
  }
  // All agents together, evenly, at this rate. How many went out.
  std::uint64_t Beat(int per_second, std::chrono::seconds length) {
    const auto began = std::chrono::steady_clock::now();
    std::uint64_t sent = 0;
    while (true) {
      const auto now = std::chrono::steady_clock::now();
      if (now >= began + length) return sent;
      const auto due = static_cast<std::uint64_t>(
          std::chrono::duration<double>(now - began).count() * per_second);
      for (; sent < due; ++sent) agents_[sent % agents_.size()]->Beat();
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  int registered() const { return registered_; }
  int lost() const { return lost_; }

 private:
  class Agent final : public grpc::ClientBidiReactor<v1::AgentMessage, v1::ControllerMessage> {
   public:
    Agent(AgentSwarm* swarm, const std::string& address, int number) : swarm_(swarm) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
      stub_ = v1::AgentService::NewStub(
          grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
      v1::Register* hello = out_.mutable_register_();
      hello->set_protocol_version(kProtocolVersion);
      hello->set_node(fmt::format("n{:05}", number));
      hello->set_address("127.0.0.1");
      hello->set_keeper_pid(number + 1);
      hello->set_boot_id("bench");
    }
    void Start() {
      stub_->async()->Session(&context_, this);
      AddHold();
      StartRead(&in_);
      writing_ = true;
      StartWrite(&out_);
      StartCall();
    }
    void Stop() {
      std::lock_guard<std::mutex> lock(mutex_);
      context_.TryCancel();
    }
    void Beat() {
      std::lock_guard<std::mutex> lock(mutex_);
      if (writing_ || over_ || incarnation_ == 0) return;
      writing_ = true;
      out_.Clear();
      out_.set_incarnation(incarnation_);
      out_.mutable_heartbeat()->set_sequence(++beats_);
      out_.mutable_heartbeat()->set_interval_ms(1000);
      StartWrite(&out_);
    }
    void OnReadDone(bool ok) override {
      if (!ok) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!over_) RemoveHold();
        over_ = true;
        return;
      }
      Answer();
      if (in_.has_registered()) {
        {
          std::lock_guard<std::mutex> lock(mutex_);
          incarnation_ = in_.incarnation();
        }
        swarm_->Count(&swarm_->registered_);
      }
      StartRead(&in_);
    }
    void OnWriteDone(bool) override {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      if (over_ || answers_.empty()) return;
      writing_ = true;
      out_ = std::move(answers_.front());
      answers_.pop_front();
      StartWrite(&out_);
    }
    void OnDone(const grpc::Status& status) override {
      if (status.error_code() != grpc::StatusCode::CANCELLED) swarm_->Count(&swarm_->lost_);
      swarm_->Count(&swarm_->done_);
    }

   private:
    // As a healthy node: prepared, activated, stopped at once.
    void Answer() {
      v1::AgentMessage answer;
      if (in_.has_prepare()) {
        answer.mutable_prepared()->set_job(in_.prepare().job());
        answer.mutable_prepared()->set_generation(in_.prepare().generation());
        answer.mutable_prepared()->set_store_port(in_.prepare().host_store() ? 29500 : 0);
      } else if (in_.has_activate()) {
        v1::Activated* activated = answer.mutable_activated();
        activated->set_job(in_.activate().job());
        activated->set_generation(in_.activate().generation());
        for (const v1::WorkerPlan& plan : in_.activate().plan().workers()) {
          v1::WorkerOnNode* worker = activated->add_workers();
          worker->set_rank(plan.rank());
          worker->set_local_rank(plan.local_rank());
          worker->set_pid(1000 + plan.local_rank());
          worker->set_running(true);
        }
      } else if (in_.has_stop_job()) {
        answer.mutable_stopped()->set_job(in_.stop_job().job());
        answer.mutable_stopped()->set_generation(in_.stop_job().generation());
      } else {
        return;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      answer.set_incarnation(incarnation_);
      if (writing_ || over_) {
        answers_.push_back(std::move(answer));
        return;
      }
      writing_ = true;
      out_ = std::move(answer);
      StartWrite(&out_);
    }

    AgentSwarm* const swarm_;
    std::deque<v1::AgentMessage> answers_;  // while another write is on its way
    std::unique_ptr<v1::AgentService::Stub> stub_;
    grpc::ClientContext context_;
    v1::AgentMessage out_;
    v1::ControllerMessage in_;
    std::mutex mutex_;
    bool writing_ = false;
    bool over_ = false;
    std::uint64_t incarnation_ = 0;
    std::uint64_t beats_ = 0;
  };

  void Count(std::atomic<int>* counter) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++*counter;
    changed_.notify_all();
  }

  std::vector<std::unique_ptr<Agent>> agents_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> registered_{0}, lost_{0}, done_{0};
};

}  // namespace everstep::bench
