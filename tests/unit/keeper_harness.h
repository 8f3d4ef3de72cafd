// A real everstep-keeper in a folder of its own, and waiting for truths with a deadline.
#pragma once

#include <dirent.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "proto/base/clock.h"
#include "proto/base/process_stat.h"
#include "worker/keeper/client.h"
#include "worker/keeper/process.h"

namespace everstep::keeper {

namespace v1 = everstep::v1;

// Polls, for states that nobody announces. False: `limit` passed.
inline bool Eventually(const std::function<bool()>& truth, Duration limit = Seconds(20)) {
  const std::int64_t deadline = MonotonicNanos() + limit.count();
  while (!truth()) {
    if (MonotonicNanos() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

inline bool Alive(pid_t pid) {
  const auto stat = ReadProcessStat(pid);
  return stat && stat->state != 'Z' && stat->state != 'X';
}

inline std::string Slurp(const std::string& path) {
  std::ifstream in(path);
  std::stringstream out;
  out << in.rdbuf();
  return out.str();
}

// Events as they come, from the client's reader thread.
class Events {
 public:
  void Add(v1::KeeperReply reply) {
    std::lock_guard<std::mutex> lock(mutex_);
    all_.push_back(std::move(reply));
    changed_.notify_all();
  }
  // The first event that `wanted` takes; an empty one (no body) when `limit` passed.
  v1::KeeperReply Wait(const std::function<bool(const v1::KeeperReply&)>& wanted,
                       Duration limit = Seconds(20)) {
    std::unique_lock<std::mutex> lock(mutex_);
    v1::KeeperReply found;
    changed_.wait_for(lock, limit, [&] {
      for (const v1::KeeperReply& reply : all_) {
        if (wanted(reply)) {
          found = reply;
          return true;
        }
      }
      return false;
    });
    return found;
  }
  v1::KeeperExited WaitExit(std::int32_t rank, std::uint64_t generation = 1) {
    return Wait([&](const v1::KeeperReply& r) {
             return r.has_exited() && r.exited().rank() == rank &&
                    r.exited().generation() == generation;
           })
        .exited();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::KeeperReply> all_;
};

class KeeperTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/everstep-keeper-XXXXXX";
    folder_ = ::mkdtemp(name);
    StartOptions options{.program = std::string(EVERSTEP_BINARY_DIR) + "/bin/everstep-keeper",
                         .socket_path = socket(),
                         .node = "n0",
                         .log_file = folder_ + "/keeper.log"};
    std::string error;
    ASSERT_TRUE(StartKeeper(options, &error)) << error;
    client_ = Connect();
    ASSERT_NE(client_, nullptr);
  }

  void TearDown() override {
    if (client_ == nullptr) client_ = Connect();
    if (client_ != nullptr) {
      v1::KeeperRequest request;
      request.mutable_shutdown()->set_grace_ms(0);
      client_->Call(request, Seconds(5));
    }
    client_.reset();
    if (keeper_pid_ > 0) {
      EXPECT_TRUE(Eventually([&] { return !Alive(keeper_pid_); }));
    }
    if (HasFailure()) {
      std::fprintf(stderr, "%s\n", Slurp(folder_ + "/keeper.log").c_str());
    }
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string socket() const { return folder_ + "/keeper.sock"; }

  std::unique_ptr<Client> Connect(bool owner = true) {
    events_ = std::make_shared<Events>();
    auto events = events_;
    auto client =
        Client::Connect({.socket_path = socket(),
                         .owner = owner,
                         .on_event = [events](Reply r) { events->Add(std::move(r.message)); },
                         .on_lost =
                             [this](const std::string& why) {
                               std::lock_guard<std::mutex> lock(lost_mutex_);
                               lost_ = why;
                             }},
                        &state_, &error_);
    if (client != nullptr) keeper_pid_ = state_.keeper_pid();
    return client;
  }
  std::string Lost() {
    std::lock_guard<std::mutex> lock(lost_mutex_);
    return lost_;
  }

  // A shell that runs `script` as rank `rank`.
  v1::KeeperRequest ShellSpawn(std::int32_t rank, const std::string& script,
                               std::uint64_t generation = 1) {
    v1::KeeperRequest request;
    v1::KeeperSpawn* spawn = request.mutable_spawn();
    spawn->set_job("job");
    spawn->set_generation(generation);
    spawn->set_rank(rank);
    spawn->set_local_rank(rank);
    spawn->set_command_kind(3);
    spawn->set_target("/bin/sh");
    spawn->add_args("-c");
    spawn->add_args(script);
    (*spawn->mutable_env())["PATH"] = "/usr/bin:/bin";
    (*spawn->mutable_env())["EVERSTEP_JOB"] = "job";
    (*spawn->mutable_env())["EVERSTEP_GENERATION"] = std::to_string(generation);
    spawn->set_cwd(folder_);
    spawn->set_umask(022);
    spawn->set_stdout_path(folder_ + "/out" + std::to_string(rank));
    spawn->set_stderr_path(folder_ + "/err" + std::to_string(rank));
    return request;
  }

  pid_t Spawn(const v1::KeeperRequest& request) {
    const Reply reply = client_->Call(request, Seconds(20));
    EXPECT_EQ(reply.message.error(), 0) << reply.message.message();
    return reply.message.spawned().pid();
  }

  v1::KeeperReply Kill(std::uint64_t generation, std::uint32_t grace_ms, std::int32_t rank = -1,
                       int signal = SIGTERM) {
    v1::KeeperRequest request;
    request.mutable_kill()->set_job("job");
    request.mutable_kill()->set_generation(generation);
    request.mutable_kill()->set_rank(rank);
    request.mutable_kill()->set_signal(signal);
    request.mutable_kill()->set_grace_ms(grace_ms);
    return client_->Call(request, Seconds(10)).message;
  }

  std::string folder_;
  std::unique_ptr<Client> client_;
  std::shared_ptr<Events> events_;
  v1::KeeperState state_;
  ConnectError error_;
  pid_t keeper_pid_ = 0;
  std::mutex lost_mutex_;
  std::string lost_;
};

}  // namespace everstep::keeper
