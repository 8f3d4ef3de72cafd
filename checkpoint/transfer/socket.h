// TCP with a limit on everything: a connection is given up when no byte moves for `idle`, and at
// its deadline whatever moves. Errors are texts for a log: "peer HOST:PORT: what".
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

using SteadyTime = std::chrono::steady_clock::time_point;

// Owns the descriptor. One thread at a time; `cancel` may be set from any, and ends a wait soon.
class Connection {
 public:
  Connection() = default;
  Connection(int fd, std::string peer, std::chrono::milliseconds idle, SteadyTime deadline);
  Connection(Connection&& other) noexcept;
  Connection& operator=(Connection&& other) noexcept;
  ~Connection();

  static Result<Connection> Dial(const std::string& address,
                                 std::chrono::milliseconds connect_timeout,
                                 std::chrono::milliseconds idle, SteadyTime deadline,
                                 const std::atomic<bool>* cancel = nullptr);

  Outcome Send(const void* data, std::size_t size, bool more = false);
  // Straight from a file's pages. REQUIRES: BlockSigpipe() in this thread (sendfile has no flag for
  // it).
  Outcome SendFile(int file, std::uint64_t offset, std::uint64_t size);
  // Exactly `size` bytes.
  Outcome Receive(void* data, std::size_t size);
  // Bytes are there, or the peer is gone: does not wait.
  bool Readable() const;
  // Both ends have the same address.
  bool SameHost() const;
  // Before the first bulk byte: between two ends of one host what is under way should stay in the
  // cache; elsewhere the kernel fits its buffers to the link by itself.
  void FitBuffers();
  // At most so many bytes wait in this end's buffer and on the way.
  void LimitInFlight(std::uint64_t bytes);

  void set_deadline(SteadyTime deadline) { deadline_ = deadline; }
  const std::string& peer() const { return peer_; }
  int fd() const { return fd_; }

 private:
  Outcome Wait(short events, const char* doing);
  // The deadline has passed or someone cancelled: what to answer.
  std::optional<Error> Over(const char* doing) const;
  Error System(const char* doing) const;

  int fd_ = -1;
  std::string peer_;
  std::chrono::milliseconds idle_{0};
  SteadyTime deadline_;
  const std::atomic<bool>* cancel_ = nullptr;
};

struct Listening {
  int fd = -1;
  std::uint16_t port = 0;
};
Result<Listening> Listen(const std::string& address, std::uint16_t port);

std::uint64_t RandomNonce();

// For the calling thread, for good: a closed peer is an error to be answered, not a signal to die
// of.
void BlockSigpipe();

}  // namespace everstep::checkpoint
