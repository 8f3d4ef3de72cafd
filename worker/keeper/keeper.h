// The keeper of a node: one thread, one unix socket, the tables it serves from. It must not die: it
// allocates little, blocks on nothing, trusts no peer, and does nothing that could be done
// elsewhere.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "keeper.pb.h"
#include "worker/keeper/arena_table.h"
#include "worker/keeper/connection.h"
#include "worker/keeper/context.h"
#include "worker/keeper/fork_servers.h"
#include "worker/keeper/store_hosts.h"
#include "worker/keeper/workers.h"

namespace everstep::keeper {

struct KeeperOptions {
  std::string socket_path;
  std::string node;
  std::int64_t orphan_timeout_ms = 0;  // without an agent for so long: ends everything; 0: never
  int lifeline = -1;  // end of file on it: whoever brought this node is gone, ends everything at
                      // once; -1: none
};

class Keeper {
 public:
  static constexpr std::size_t kMaxConnections = 256;
  static constexpr std::size_t kMaxToldQueue = 4u << 20;  // waits for the agent; then no more words
  static constexpr std::size_t kMaxMemoryBytes = 8u << 20;  // Remember; half a reply frame

  explicit Keeper(KeeperOptions options);
  ~Keeper();

  // Binds the socket (refusing where a keeper answers already) and lays out the Python parts.
  bool Begin(std::string* error);
  // Until a shutdown is asked for (by request, SIGTERM or the orphan timeout). Returns the exit
  // code.
  int Run();

 private:
  void Accept();
  void OnLifeline();
  void OnReady(Loop::Token token, std::uint32_t events);
  void Drop(Loop::Token token);
  void Sweep();
  void OnRequest(Connection* connection, const everstep::v1::KeeperRequest& request);
  void OnHello(Connection* connection, std::uint64_t id, const everstep::v1::KeeperHello& hello);
  void OnArena(Connection* connection, std::uint64_t id, const everstep::v1::KeeperArena& request);
  void OnRemember(const everstep::v1::KeeperRemember& request, const Done& done);
  void OnForget(const everstep::v1::KeeperForget& request, const Done& done);
  void OnAttach(Connection* connection);
  void OnSession(Connection* connection);
  void OnSessionWords(Connection* connection);
  void Refuse(Connection* connection, std::uint64_t id, int error, const std::string& text);
  everstep::v1::KeeperState State() const;

  void OnChild();
  void BeginShutdown(std::uint32_t grace_ms, const char* why);
  int TimeoutMs() const;

  KeeperOptions options_;
  Context context_;
  OwnedFd listener_;
  Loop::Token lifeline_ = 0;
  OwnedFd lock_;
  OwnedFd signals_;
  std::map<Loop::Token, std::unique_ptr<Connection>> connections_;
  Loop::Token owner_ = 0;
  std::int64_t orphan_since_ns_ = 0;
  std::map<std::string, std::string> memory_;
  std::size_t memory_bytes_ = 0;
  ArenaTable arenas_;
  ForkServers fork_servers_;
  Workers workers_;
  StoreHosts stores_;
  bool shutting_down_ = false;
  std::int64_t shutdown_limit_ns_ = 0;
};

}  // namespace everstep::keeper
