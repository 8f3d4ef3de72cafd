// What a peer that knows the job's key may send: any request, then any bytes. The receiver answers
// or ends the connection, and publishes nothing that fails its checksums.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>

#include "checkpoint/transfer/replica_store.h"
#include "proto/base/crc32c.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace
using everstep::Crc32c;
using everstep::HeldShard;
using everstep::JobId;

namespace {

class Host final : public ArenaHost {
 public:
  ~Host() override {
    for (auto& [name, fd] : arenas_) close(fd);
  }
  Result<std::vector<ArenaName>> List(const JobId&) override { return std::vector<ArenaName>{}; }
  Result<ArenaFds> Open(const JobId& job, const ArenaName& name,
                        std::uint64_t slot_bytes) override {
    auto it = arenas_.find(name);
    if (it == arenas_.end()) {
      if (slot_bytes == 0) return Error{ErrorCode::kNotFound, "none"};
      auto made = CreateArenaFd({job, name.rank, name.replica, slot_bytes});
      if (!made.ok()) return made.error();
      it = arenas_.emplace(name, made.value()).first;
    }
    return ArenaFds{fcntl(it->second, F_DUPFD_CLOEXEC, 0), -1};
  }
  void Drop(const JobId&, const ArenaName&) override {}
  bool AllWhole() {
    for (auto& [name, fd] : arenas_) {
      auto arena = Arena::Open(fcntl(fd, F_DUPFD_CLOEXEC, 0));
      if (!arena.ok()) return false;
      for (std::uint32_t i = 0; i < kSlots; ++i) {
        const auto view = arena.value().Look(i);
        if (view && !arena.value().Verify(*view).ok()) return false;
      }
    }
    return true;
  }

 private:
  std::map<ArenaName, int> arenas_;
};

class Nobody final : public Listener {
 public:
  void OnCaptured(const JobId&, everstep::Generation, everstep::Rank, everstep::Step) override {}
  void OnCopied(const JobId&, const HeldShard&) override {}
  void OnTrouble(const JobId&, const std::string&) override {}
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const bool blocked = [] {
    BlockSigpipe();
    return true;
  }();
  (void)blocked;
  Host host;
  Nobody listener;
  JobTable jobs;
  jobs.Begin("job", 3, "key");
  TransferOptions options;
  options.max_payload_bytes = 2 * kChunkBytes;
  options.io_timeout = std::chrono::milliseconds(20);  // a fetch from a relay waits so long
  Traffic traffic(options.pacing);
  RelayTable relays;
  ReplicaStore store(options, &host, &listener, &jobs, &traffic, &relays);
  // Up to three requests in a row, so that resumes and repeated pushes are reached.
  for (int round = 0; round < 3 && size > 0; ++round) {
    RequestFrame request;
    const std::size_t head = std::min(size, sizeof request);
    const std::uint8_t mode = data[0];
    std::memcpy(&request, data, head);
    data += head;
    size -= head;
    request.op = (mode & 1) != 0    ? Op::kFetch
                 : (mode & 16) != 0 ? Op::kJoin
                 : (mode & 32) != 0 ? Op::kAhead
                                    : Op::kPush;
    std::memset(request.job, 0, sizeof request.job);
    std::memcpy(request.job, "job", 3);
    if ((mode & 2) == 0) {  // plausible, so that more than the first check is reached
      SlotFields& f = request.fields;
      f.job_crc = Crc32c("job", 3);
      f.chunk_bytes = kChunkBytes;
      f.payload_bytes %= 4096;
      if (request.op == Op::kAhead) f.payload_bytes += kChunkBytes;  // whole chunks alone go ahead
      f.table_bytes = 0;
      f.table_offset = f.payload_bytes;
      f.step &= 0xFF;
      f.rank &= 3;
      f.world_size = 4;
      request.generation = 3 + (mode & 4) / 4;
    }
    const std::size_t body = std::min<std::size_t>(size, (mode & 8) != 0 ? 4200 : size);
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) return 0;
    [[maybe_unused]] const ssize_t n = write(pair[1], data, body);
    shutdown(pair[1], SHUT_WR);
    data += body;
    size -= body;
    {
      Connection connection(pair[0], "fuzz", std::chrono::milliseconds(1000),
                            std::chrono::steady_clock::now() + std::chrono::seconds(5));
      PeerSession session(&connection, request, SipKey{1, 2}, 3, 4);
      store.Serve(&session);
    }
    close(pair[1]);
  }
  if (!host.AllWhole()) __builtin_trap();
  return 0;
}
