// One client of the keeper: bounded buffers in both directions, descriptors on the way out.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "keeper.pb.h"
#include "worker/keeper/fd.h"
#include "worker/keeper/framing.h"

namespace everstep::keeper {

class Connection {
 public:
  // A client that does not read is dropped when this much waits for it.
  static constexpr std::size_t kMaxQueuedBytes = 32u << 20;

  Connection(OwnedFd socket, pid_t peer) : socket_(std::move(socket)), peer_(peer) {}

  int fd() const { return socket_.get(); }
  pid_t peer() const { return peer_; }

  // Reads what there is (a bounded piece). False: the peer is gone.
  bool Read();
  FrameReader& reader() { return reader_; }

  // Queues a frame and writes what the socket takes. `descriptors` are duplicated while they wait.
  void Send(const everstep::v1::KeeperReply& reply, const std::vector<int>& descriptors = {});
  void SendRaw(std::string bytes, const std::vector<int>& descriptors = {});
  // False: the peer is gone.
  bool Flush();
  bool wants_write() const { return !out_.empty(); }
  std::size_t queued() const { return queued_; }  // bytes

  // Everything queued is written first, then the caller closes: after a refusal.
  bool closing = false;
  bool owner = false;
  bool greeted = false;
  bool session = false;  // of a worker that may be parked
  bool broken = false;   // to be closed by the loop
  std::uint64_t token = 0;

 private:
  struct Pending {
    std::string bytes;
    std::size_t sent = 0;
    std::vector<OwnedFd> descriptors;
  };
  OwnedFd socket_;
  pid_t peer_;
  FrameReader reader_{kMaxFrameBytes};
  std::deque<Pending> out_;
  std::size_t queued_ = 0;
};

}  // namespace everstep::keeper
