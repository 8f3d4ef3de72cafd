// A thread that runs what it is given, one after the other: for work that may block (files on a
// slow disk, a keeper that starts, gigabytes to verify) and must not stop the engine's heartbeats.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <utility>

#include "proto/base/mailbox.h"

namespace everstep::agent {

class SerialWorker {
 public:
  explicit SerialWorker(std::size_t capacity = 4096)
      : tasks_(capacity), thread_([this] { Run(); }) {}
  // Finishes what was given.
  ~SerialWorker() { Stop(); }
  SerialWorker(const SerialWorker&) = delete;
  SerialWorker& operator=(const SerialWorker&) = delete;

  // Thread-safe. False: full or stopped; the task is dropped.
  bool Post(std::function<void()> task) { return tasks_.Push(std::move(task)); }

  void Stop() {
    tasks_.Close();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void Run() {
    while (true) {
      const auto tasks = tasks_.PopAll(std::chrono::steady_clock::now() + std::chrono::hours(1));
      for (const auto& task : tasks) task();
      if (tasks.empty() && tasks_.closed()) return;
    }
  }

  Mailbox<std::function<void()>> tasks_;
  std::thread thread_;
};

}  // namespace everstep::agent
