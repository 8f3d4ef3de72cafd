// The other direction: what a peer that this node dialled may answer. Its hello, its response, then
// any bytes, to a push and to a fetch. Whatever comes, a push is done only when an ack that knows
// the key says so, and a fetch publishes the very bytes that were asked for, or nothing.
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

namespace {

constexpr SipKey kKey{1, 2};
enum Mode : std::uint8_t {
  kPushes = 1,       // else it fetches
  kOwnHello = 2,     // the input begins with a hello
  kOwnResponse = 4,  // ... and with a response; else a plausible one
  kUnsigned = 8,     // the response does not know the key
  kRealTable = 16,   // the slot's own table and chunks go before the rest of the input
  kWantsAll = 32,    // a push: a want of everything goes before the rest
  kAcks = 64,        // a signed ack ends it all
  kTwoChunks = 128,  // else the slot has one
};

// A slot of this node: what a push sends, and what a fetch asks the peer for.
struct Source {
  Arena arena;
  SlotView view;
  std::vector<std::uint32_t> crcs;
};
Source Make(std::uint64_t bytes) {
  const auto fd = CreateArenaFd({.job = "job", .rank = 0, .replica = false, .slot_bytes = bytes});
  if (!fd.ok()) __builtin_trap();
  auto arena = Arena::Open(fd.value());
  if (!arena.ok()) __builtin_trap();
  Source source{std::move(arena.value()), {}, {}};
  auto writer = SlotWriter::Begin(&source.arena, 0, bytes);
  if (!writer.ok()) __builtin_trap();
  std::string payload(bytes, 'x');
  for (std::size_t i = 0; i < bytes; i += 7) payload[i] = static_cast<char>(i);
  if (!writer.value().Append(payload.data(), bytes).ok()) __builtin_trap();
  const auto view =
      writer.value().Finish({.generation = 3, .step = 5, .rank = 0, .world_size = 2}, 0);
  if (!view.ok()) __builtin_trap();
  source.view = view.value();
  source.crcs = ReadChunkCrcs(source.arena, source.view).value();
  return source;
}

bool WriteAll(int fd, const void* data, std::size_t size) {
  const auto* at = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = send(fd, at, size, MSG_NOSIGNAL);
    if (n <= 0) return false;
    at += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}
bool ReadAll(int fd, void* data, std::size_t size) {
  return size == 0 || recv(fd, data, size, MSG_WAITALL) == static_cast<ssize_t>(size);
}

// Answers one connection at a time with what Set() gave it.
class Peer {
 public:
  Peer() {
    auto listening = Listen("127.0.0.1", 0);
    if (!listening.ok()) __builtin_trap();
    fd_ = listening.value().fd;
    fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_NONBLOCK);
    address_ = "127.0.0.1:" + std::to_string(listening.value().port);
    std::thread([this] { Serve(); }).detach();
  }
  const std::string& address() const { return address_; }
  void Set(Source* source, std::uint8_t mode, const std::uint8_t* data, std::size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    source_ = source;
    mode_ = mode;
    data_.assign(reinterpret_cast<const char*>(data), size);
    signed_ok_ = false;
  }
  // It sent an ack of status ok that knows the key. Waits until its connection is over.
  bool SignedOk() {
    std::unique_lock<std::mutex> lock(mutex_);
    return signed_ok_;
  }

 private:
  void Serve() {
    for (;;) {
      const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) continue;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        Talk(fd);
      }
      shutdown(fd, SHUT_WR);
      char drain[65536];
      while (recv(fd, drain, sizeof drain, 0) > 0) {
      }
      close(fd);
    }
  }
  template <typename Frame>
  void TakeInto(Frame* frame) {
    const std::size_t n = std::min(data_.size(), sizeof *frame);
    std::memcpy(static_cast<void*>(frame), data_.data(), n);
    data_.erase(0, n);
  }
  void Talk(int fd) {
    HelloFrame theirs, mine{.nonce = 7};
    if (!ReadAll(fd, &theirs, sizeof theirs)) return;
    if ((mode_ & kOwnHello) != 0) TakeInto(&mine);
    if (!WriteAll(fd, &mine, sizeof mine)) return;
    RequestFrame request;
    if (!ReadAll(fd, &request, sizeof request)) return;
    ResponseFrame response{.fields = source_->view.fields, .crc_root = source_->view.crc_root};
    if ((mode_ & kOwnResponse) != 0) TakeInto(&response);
    if ((mode_ & kUnsigned) == 0) {
      response.mac = ResponseMac(kKey, theirs.nonce, mine.nonce, response);
    }
    if (!WriteAll(fd, &response, sizeof response)) return;
    const std::uint64_t chunks = source_->crcs.size();
    if ((mode_ & kRealTable) != 0) {
      const TableFrame table{.chunks = static_cast<std::uint32_t>(chunks)};
      if (!WriteAll(fd, &table, sizeof table)) return;
      if (!WriteAll(fd, source_->crcs.data(), 4 * chunks)) return;
      const unsigned char* payload = source_->arena.Payload(source_->view);
      for (std::uint32_t i = 0; i < chunks; ++i) {
        const ChunkFrame chunk{
            .index = i, .bytes = source_->view.chunk_size(i), .crc = source_->crcs[i]};
        if (!WriteAll(fd, &chunk, sizeof chunk)) return;
        if (!WriteAll(fd, payload + std::size_t{i} * kChunkBytes, chunk.bytes)) return;
      }
    }
    if ((mode_ & kWantsAll) != 0) {
      const WantFrame want{.chunks = static_cast<std::uint32_t>(chunks),
                           .wanted = static_cast<std::uint32_t>(chunks)};
      const std::uint8_t bits = 0xFF;
      if (!WriteAll(fd, &want, sizeof want) || !WriteAll(fd, &bits, 1)) return;
    }
    AckFrame ack{.crc_root = source_->view.crc_root};
    if ((mode_ & kAcks) != 0 && !data_.empty()) {
      ack.status = static_cast<Status>(data_[0] & 15);
      data_.erase(0, 1);
    }
    if (!WriteAll(fd, data_.data(), data_.size())) return;
    if ((mode_ & kAcks) != 0) {
      ack.mac = AckMac(kKey, theirs.nonce, mine.nonce, ack);
      signed_ok_ = ack.status == Status::kOk;
      (void)WriteAll(fd, &ack, sizeof ack);
    }
  }

  int fd_ = -1;
  std::string address_;
  std::mutex mutex_;
  Source* source_ = nullptr;
  std::uint8_t mode_ = 0;
  std::string data_;
  bool signed_ok_ = false;
};

class Sink final : public FetchSink {
 public:
  explicit Sink(Arena* arena) : arena_(arena) {}
  SlotWriter* Begin(const SlotFields& fields) override {
    auto writer = SlotWriter::Begin(arena_, 1, fields.payload_bytes);
    if (!writer.ok()) return nullptr;
    writer_.emplace(writer.value());
    return &*writer_;
  }
  std::string Why() const override { return "no memory"; }

 private:
  Arena* arena_;
  std::optional<SlotWriter> writer_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Peer* const peer = [] {
    BlockSigpipe();
    return new Peer;
  }();
  static Source small = Make(2500), large = Make(kChunkBytes + 100);
  if (size == 0) return 0;
  const std::uint8_t mode = data[0];
  Source& source = (mode & kTwoChunks) != 0 ? large : small;
  peer->Set(&source, mode, data + 1, size - 1);
  const PeerTask task{.address = peer->address(),
                      .job = "job",
                      .key = kKey,
                      .generation = 3,
                      .limits = {.io_timeout = std::chrono::milliseconds(300)}};
  if ((mode & kPushes) != 0) {
    PushReport report;
    const bool done = PushSlot(task, &source.arena, source.view, &report).ok();
    // A response "have" that knows the key says so, too.
    const bool may_have = (mode & kOwnResponse) != 0 && (mode & kUnsigned) == 0;
    if (done && !may_have && !peer->SignedOk()) __builtin_trap();
    if (report.sent_bytes > source.view.fields.payload_bytes) __builtin_trap();
    return 0;
  }
  const auto fd = CreateArenaFd({.job = "job", .rank = 0, .replica = false, .slot_bytes = 4096});
  if (!fd.ok()) return 0;
  auto arena = Arena::Open(fd.value());
  if (!arena.ok()) __builtin_trap();
  Sink sink(&arena.value());
  FetchProgress progress;
  SlotFields wanted = source.view.fields;
  const auto view = FetchSlot(task, wanted, source.view.crc_root, &sink, &progress);
  if (!view.ok()) {
    if (view.error().message.empty() || arena.value().Look(1)) __builtin_trap();
    return 0;
  }
  if (!arena.value().Verify(view.value()).ok() || view.value().crc_root != source.view.crc_root ||
      std::memcmp(arena.value().Payload(view.value()), source.arena.Payload(source.view),
                  wanted.payload_bytes) != 0) {
    __builtin_trap();
  }
  return 0;
}
