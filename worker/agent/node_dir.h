// A node's directory (STATE/nodes/NAME) and what the agent must know of its machine. Not
// thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace everstep::agent {

// Holds the directory for one agent: agent.pid, locked. The lock ends with the process; one that
// was just killed is waited for (kLockPatience).
class NodeDirLock {
 public:
  NodeDirLock() = default;
  ~NodeDirLock();
  NodeDirLock(const NodeDirLock&) = delete;
  NodeDirLock& operator=(const NodeDirLock&) = delete;

  // Makes the directory and writes this process's pid. False: *error says who holds it or what the
  // system refuses.
  bool Take(const std::string& node_dir, std::string* error);

 private:
  int fd_ = -1;
  std::string path_;
};

// The controllers' addresses: one place that a launcher may rewrite while the agent runs.
std::vector<std::string> ReadControllers(const std::string& node_dir);
bool WriteControllers(const std::string& node_dir, const std::vector<std::string>& addresses,
                      std::string* error);

// keeper.pid, for people and drills. pid 0: removes it.
void WriteKeeperPid(const std::string& node_dir, std::int32_t pid);

// data.port: where the node's checkpoint data plane listened last. Plans name it, so an agent that
// is started again takes the same one. 0: unknown.
std::uint16_t ReadDataPort(const std::string& node_dir);
void WriteDataPort(const std::string& node_dir, std::uint16_t port);

std::string BootId();
std::uint64_t PidNamespace();  // inode; 0: unknown

// Field 3 of /proc/PID/stat: R, S, D, T (stopped by a signal), Z...; 0: no such process.
char ProcessState(std::int32_t pid);

// Field 22 of /proc/PID/stat; 0: no such process, or a zombie.
std::uint64_t ProcessStartTime(std::int32_t pid);

// The address of this machine on the route to host:port; "127.0.0.1" when there is none.
std::string LocalAddressTowards(const std::string& controller);

// A TCP port of `address` that nobody listened on a moment ago; 0: none, or no such address.
std::uint32_t FreePort(const std::string& address);

}  // namespace everstep::agent
