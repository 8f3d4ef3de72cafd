// The worker processes of a node: started, watched, killed, and remembered after their end until
// the job is forgotten. Fenced by generation: what a Kill ended is never started again.
#pragma once

#include <sys/types.h>

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "keeper.pb.h"
#include "worker/keeper/context.h"
#include "worker/keeper/fork_servers.h"
#include "worker/keeper/telling.h"

namespace everstep::keeper {

struct WorkerKey {
  std::string job;
  std::uint64_t generation = 0;
  std::int32_t rank = 0;
  friend auto operator<=>(const WorkerKey&, const WorkerKey&) = default;
};

class Workers {
 public:
  static constexpr std::size_t kMaxWorkers = 4096;  // running, and ended but not forgotten

  Workers(Context* context, ForkServers* fork_servers)
      : context_(context), fork_servers_(fork_servers) {}

  // Answers when the worker runs (or cannot): KeeperSpawned; its message says why a worker that
  // asked for the fork server came from a fresh process. ESTALE: the generation is over; EEXIST: it
  // is there.
  void Spawn(const everstep::v1::KeeperSpawn& request, Done done);

  // The job's fork server is ready, or will not come: workers that wait for it start.
  void OnForkServer(const std::string& job);

  // Answers at once; exits follow as events. rank -1: every process of generations up to the given
  // one, then SIGKILL after the grace, and nothing of them starts any more. rank >= 0: that rank of
  // exactly that generation; without a grace only the signal (a drill, not our request).
  void Kill(const everstep::v1::KeeperKill& request, const Done& done);

  // Ends everything of the job at once, then drops what is known of it.
  void Forget(const std::string& job);

  // --- sessions: workers that are parked where others are killed (workers_park.cc) ---

  using Send = std::function<void(std::string bytes)>;
  // The worker of process `pid` may be parked from now on, through `send`. Answers 0, or an errno
  // with its text.
  int OpenSession(const WorkerKey& key, pid_t pid, std::uint64_t token, Send send,
                  std::string* error);
  void OnParked(std::uint64_t token, std::uint64_t generation);
  // Words for the controller; those of a generation that is over are dropped.
  void OnTold(std::uint64_t token, std::uint64_t generation, std::string_view words);
  void OnToldAck(const everstep::v1::KeeperToldAck& request, const Done& done);
  // The worker closed its session, or is gone.
  void OnSessionLost(std::uint64_t token);

  // Everything: SIGTERM now, SIGKILL after the grace.
  void KillAll(std::uint32_t grace_ms);
  bool AnyRunning() const;

  // `pid` has ended and is not reaped yet, so its number and its group's cannot be a stranger's.
  // kLater: it may be a worker whose start is not known yet; ask again when AnyStarting changes.
  enum class ExitAnswer { kReap, kLater, kUnknown };
  ExitAnswer OnExit(pid_t pid, int code);
  void OnStopped(pid_t pid, bool stopped);
  // Children that nobody knows are orphans of workers: killed when their generation is over.
  void ReapOrphans();

  // Local workers of a generation, running: for the store's watch.
  struct Peer {
    std::int32_t rank = 0;
    pid_t pid = 0;
    std::uint32_t world_size = 0;
    std::uint32_t start_timeout_ms = 0;
    std::uint16_t store_port = 0;
  };
  std::vector<Peer> Watched(const std::string& job, std::uint64_t generation) const;

  bool Stale(const std::string& job, std::uint64_t generation) const;
  void Describe(everstep::v1::KeeperState* state) const;
  std::optional<std::int64_t> NextDeadline() const;  // monotonic ns
  void Tick(std::int64_t now);

 private:
  enum class Phase { kStarting, kRunning, kExited };
  struct Worker {
    explicit Worker(Context* context) : status(context) {}
    everstep::v1::KeeperSpawn spec;  // without env once it runs
    Phase phase = Phase::kStarting;
    pid_t pid = 0;
    bool forked = false;   // by the fork server
    bool waiting = false;  // for the fork server, not asked for yet
    bool by_request = false;
    std::string fresh_reason;
    std::string error_file;
    std::uint32_t world_size = 0;
    std::uint16_t store_port = 0;
    std::int64_t started_wall_ns = 0;
    std::int64_t started_ns = 0;      // monotonic
    std::int64_t kill_at_ns = 0;      // 0: no SIGKILL is due
    std::int64_t start_limit_ns = 0;  // 0: started
    std::int64_t asked_ns = 0;        // monotonic, by Spawn
    std::int64_t stopped_ns = 0;      // 0: not stopped
    Telling stop;                     // of stopped_ns
    bool learnt_from = false;
    int signal_on_start = 0;    // killed before its pid was known
    std::uint64_t session = 0;  // token of its connection; 0: it cannot be parked
    Send send;                  // on it
    bool parked = false;
    std::int64_t park_at_ns = 0;     // asked to park by then, or parked until then; 0: neither
    std::int64_t park_grace_ns = 0;  // for one that closes its session instead
    everstep::v1::KeeperExited exit;
    Done done;
    StatusPipe status;
  };
  void StartForked(Worker* worker);
  void StartFresh(Worker* worker);
  void OnLine(const WorkerKey& key, const std::string& line, bool last);
  void Started(Worker* worker);
  void Failed(const WorkerKey& key, int error, const std::string& why);
  void Signal(Worker* worker, int signal);
  void LookAgain();
  void DropWaiting();
  void Ask(Worker* worker, int signal, std::int64_t grace_ns);
  bool Park(const WorkerKey& key, Worker* worker, const everstep::v1::KeeperKill& request);
  void TellParked(const WorkerKey& key, const Worker& worker);
  bool Resume(const everstep::v1::KeeperSpawn& request, const Done& done);
  void Take(Worker* worker, const everstep::v1::KeeperSpawn& request);
  void PruneBefore(const std::string& job, std::uint64_t generation);
  Worker* FindPid(pid_t pid);
  bool Fenced(pid_t pid) const;

  Context* context_;
  ForkServers* fork_servers_;
  std::map<WorkerKey, std::unique_ptr<Worker>> workers_;
  std::map<std::string, std::uint64_t> fences_;  // job -> newest generation that a Kill ended
  std::int64_t memory_kills_ = -1;
  std::int64_t next_scan_ns_ = 0;
};

}  // namespace everstep::keeper
