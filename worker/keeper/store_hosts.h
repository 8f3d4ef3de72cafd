// The rendezvous stores of a node: one torch TCPStore for each generation, in a process of its own,
// and one spare ahead of need where a fork server makes it cheap. The keeper binds the port itself
// and answers at once; ranks that connect before the process serves wait in the listener's queue.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "keeper.pb.h"
#include "worker/keeper/context.h"
#include "worker/keeper/fork_servers.h"
#include "worker/keeper/telling.h"
#include "worker/keeper/workers.h"

namespace everstep::keeper {

class StoreHosts {
 public:
  static constexpr std::size_t kMaxStores = 256;

  StoreHosts(Context* context, ForkServers* fork_servers, Workers* workers)
      : context_(context), fork_servers_(fork_servers), workers_(workers) {}

  // Answers when the port is bound; ESTALE when its generation is over. A host whose process cannot
  // serve (no torch) closes the port: who connects is refused.
  void Start(const everstep::v1::KeeperStoreHost& request, Done done);
  // Ends the stores of generations up to this one.
  void Kill(const std::string& job, std::uint64_t generation);
  void Forget(const std::string& job);
  void KillAll();

  // The job's fork server can serve, or never will.
  void OnForkServer(const std::string& job);
  bool OnExit(pid_t pid, const std::string& how);  // false: not ours
  bool Owns(pid_t pid) const;
  void Describe(everstep::v1::KeeperState* state) const;
  std::optional<std::int64_t> NextDeadline() const;
  void Tick(std::int64_t now);

 private:
  struct Host {
    explicit Host(Context* context) : status(context) {}
    everstep::v1::KeeperStoreHost spec;
    bool spare = false;
    bool waiting_for_server = false;  // not asked for yet
    bool forked = false;
    OwnedFd listener;  // ours until the process serves it; none: the process binds a name
    pid_t pid = 0;
    std::uint32_t port = 0;     // 0: not bound yet
    std::int64_t limit_ns = 0;  // 0: it serves
    std::vector<Done> waiting;
    StatusPipe status;
    // The process group's forming, as the store sees it (gloo's keys).
    std::uint32_t reached = 0;    // ranks
    std::int64_t reached_ns = 0;  // when the newest did; 0: nothing to look at
    Telling forming;              // that it does not
    bool formed = false;
    std::int64_t next_look_ns = 0;
  };
  using Id = std::uint64_t;

  Id Make(const everstep::v1::KeeperStoreHost& spec, bool spare);
  void Launch(Id id, bool may_fork);
  bool Bind(Host* host, std::string* error);
  void Retry(Id id, const std::string& why);
  void OnLine(Id id, const std::string& line, bool last);
  void Answer(Host* host);
  void Fail(Id id, int error, const std::string& why);
  void End(Id id);
  void WishSpare(const everstep::v1::KeeperStoreHost& like);
  void MakeSpare(const everstep::v1::KeeperStoreHost& like);
  Host* Find(const std::string& job, std::uint64_t generation);
  void LookAtGroup(Host* host, std::int64_t now);

  Context* context_;
  ForkServers* fork_servers_;
  Workers* workers_;
  std::map<Id, std::unique_ptr<Host>> hosts_;
  std::map<std::string, std::uint64_t> fences_;
  struct SpareWish {
    everstep::v1::KeeperStoreHost like;
    std::int64_t at_ns = 0;
  };
  std::map<std::string, SpareWish> wishes_;  // by job
  Id next_ = 1;
};

}  // namespace everstep::keeper
