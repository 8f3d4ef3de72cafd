// Tells at once when a process of this machine is gone (pidfd), so that a dead node need not wait
// for its lease.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace everstep::controller {

// This machine and pid namespace, as an agent names them at registration.
struct Here {
  std::string boot_id;
  std::uint64_t pid_namespace = 0;
};
Here ReadHere();

// Thread-safe. One thread of its own; the callback runs on it and must only post.
class ProcessWatch {
 public:
  explicit ProcessWatch(std::function<void(std::uint64_t token)> on_dead);
  ~ProcessWatch();
  ProcessWatch(const ProcessWatch&) = delete;
  ProcessWatch& operator=(const ProcessWatch&) = delete;

  // Watches the process with that pid and start time (field 22 of /proc/PID/stat). When it does not
  // exist any more, on_dead follows at once. A token is watched once; Forget takes it back.
  void Watch(std::uint64_t token, std::int32_t pid, std::uint64_t start_time);
  void Forget(std::uint64_t token);

 private:
  void Run();

  const std::function<void(std::uint64_t)> on_dead_;
  int epoll_ = -1;
  int wake_ = -1;
  std::mutex mutex_;
  std::map<std::uint64_t, int> watched_;  // token -> pidfd
  std::thread thread_;
};

}  // namespace everstep::controller
