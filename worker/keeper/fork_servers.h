// The fork servers of a node, one for each job that asked for one: a Python process with the job's
// interpreter, environment and imports, from which workers are forked (fork_server.py explains
// how). A server serves one command. What it cannot do it says, and the caller starts a fresh
// process.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "keeper.pb.h"
#include "worker/keeper/connection.h"
#include "worker/keeper/context.h"

namespace everstep::keeper {

// Program and arguments of a worker as torchrun would start it.
std::vector<std::string> WorkerArgv(std::uint32_t command_kind, const std::string& python,
                                    const std::string& target,
                                    const std::vector<std::string>& args);
bool IsPython(std::uint32_t command_kind);

// True for what differs between the ranks of a job: such keys a fork server need not have been
// started with.
bool IsRankVariable(const std::string& key);

class ForkServers {
 public:
  static constexpr std::size_t kMaxServers = 64;
  static constexpr int kMaxStarts = 3;  // of one job's server, then it is failed

  explicit ForkServers(Context* context) : context_(context) {}

  // Starts, replaces (another command or environment) or stops a job's server. Answers at once; its
  // state follows as KeeperForkServerState events.
  void Configure(const everstep::v1::KeeperForkServer& request, const Done& done);

  // kLater: its imports are under way, on_change will tell; a fresh process would not be faster.
  enum class Answer { kAsked, kLater, kNever };

  // Asks the job's server for a worker. `status_fd` goes with it: the worker writes "P<pid>" there
  // when it begins, "E<text>" if it cannot. Else *reason says why a fresh process must do.
  Answer Fork(const everstep::v1::KeeperSpawn& spawn, int status_fd, std::string* reason);

  // Asks the job's server for a store host on `listener` (StoreHosts says what it writes to
  // status_fd).
  Answer ForkStoreHost(const std::string& job, int listener, int status_fd);

  // Once for each server: what the worker `pid` has imported by itself is imported ahead from now
  // on.
  void Learn(const std::string& job, pid_t pid);

  // The job's server still imports, and had processor time since this was last asked.
  bool Advances(const std::string& job);

  // Called when a server can fork store hosts, and when it will not come.
  std::function<void(const std::string& job)> on_change;

  bool OnExit(pid_t pid, const std::string& how);  // false: not ours
  bool Owns(pid_t pid) const;
  void Forget(const std::string& job);
  void Describe(everstep::v1::KeeperState* state) const;
  std::vector<pid_t> Pids() const;
  std::optional<std::int64_t> NextDeadline() const;  // monotonic ns
  void Tick(std::int64_t now);

 private:
  enum class Phase { kIdle, kStarting, kReady, kFailed };
  struct Server {
    explicit Server(Context* context) : status(context) {}
    everstep::v1::KeeperForkServer spec;  // as it runs
    Phase phase = Phase::kIdle;
    bool store_ready = false;  // may fork store hosts
    std::string message;
    pid_t pid = 0;
    int starts = 0;
    std::int64_t started_ns = 0;  // monotonic
    std::int64_t preload_ms = 0;
    std::int64_t cpu_seen = 0;  // by Advances, ticks
    bool learnt = false;
    std::unique_ptr<Connection> control;  // requests queue here; its token watches for writability
    StatusPipe status;
  };
  Server* Find(const std::string& job);
  void Start(Server* server);
  void Stop(Server* server);
  void Fail(Server* server, const std::string& why);
  void OnLine(const std::string& job, const std::string& line, bool last);
  void Tell(const Server& server);
  bool Send(Server* server, const std::vector<std::string>& fields,
            const std::vector<int>& descriptors);
  void Watch(Server* server);

  Context* context_;
  std::map<std::string, std::unique_ptr<Server>> servers_;
};

}  // namespace everstep::keeper
