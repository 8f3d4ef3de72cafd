// What the data plane's tests share: a Node stands for a keeper's arenas plus the agent's service,
// Capture() is what a trainer does, a Proxy is the wire between two nodes and misbehaves as told.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/socket.h"
#include "checkpoint/transfer/transfer_service.h"
#include "proto/base/random.h"
#include "tests/unit/memory_host.h"

namespace everstep::checkpoint {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
inline constexpr auto kPatience = std::chrono::seconds(20);
inline const JobId kJob = "demo";

class Recorder final : public Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step step) override {
    Note([&] { captured.push_back(step); });
  }
  void OnCopied(const JobId&, const HeldShard& shard) override {
    Note([&] { copied.push_back(shard); });
  }
  void OnTrouble(const JobId&, const std::string& what) override {
    Note([&] { trouble.push_back(what); });
  }
  void OnDamaged(const JobId&, const HeldShard& shard, std::int64_t chunk,
                 const char* by) override {
    Note([&] { damaged.push_back({shard, chunk, by}); });
  }
  // False: `truth` did not come true within kPatience.
  bool Until(const std::function<bool()>& truth) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, truth);
  }
  // What was heard so far, outside of Until.
  template <typename T>
  std::vector<T> Now(std::vector<T> Recorder::*what) {
    std::lock_guard<std::mutex> lock(mutex_);
    return this->*what;
  }
  bool Copied(Step step, bool replica) {
    return Until([&] {
      return std::any_of(copied.begin(), copied.end(), [&](const HeldShard& s) {
        return s.step == step && s.replica == replica;
      });
    });
  }
  bool Complains(const std::string& part) {
    return Until([&] {
      return std::any_of(trouble.begin(), trouble.end(),
                         [&](const std::string& t) { return t.find(part) != std::string::npos; });
    });
  }
  std::string Troubles() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string all;
    for (const auto& t : trouble) all += t + "\n";
    return all;
  }

  std::vector<Step> captured;
  std::vector<HeldShard> copied;
  std::vector<std::string> trouble;
  struct Damage {
    HeldShard shard;
    std::int64_t chunk;
    std::string by;
  };
  std::vector<Damage> damaged;

 private:
  void Note(const std::function<void()>& f) {
    std::lock_guard<std::mutex> lock(mutex_);
    f();
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
};

inline std::vector<unsigned char> StateOf(Step step, std::size_t size) {
  Random random(static_cast<std::uint64_t>(step) * 77 + 1);
  std::vector<unsigned char> out(size);
  for (std::size_t i = 0; i + 8 <= size; i += 8) {
    const std::uint64_t v = random.Next();
    std::memcpy(out.data() + i, &v, 8);
  }
  return out;
}

struct Node {
  explicit Node(milliseconds io_timeout = milliseconds(3000)) {
    options.io_timeout = io_timeout;
    options.connect_timeout = milliseconds(1000);
    options.retry_first = milliseconds(10);
    options.retry_last = milliseconds(50);
    options.restore_timeout = milliseconds(4000);
    Boot();
  }
  void Boot() {
    auto started = TransferService::Start(options, &host, &heard);
    ASSERT_TRUE(started.ok()) << started.error().message;
    service = std::move(started.value());
  }
  std::string address() const { return fmt::format("127.0.0.1:{}", service->port()); }

  Part PartOf(Generation generation, Rank rank, const std::string& peer, RestorePart restore = {}) {
    return {.job = kJob,
            .generation = generation,
            .world_size = 8,
            .data_key = "key",
            .workers = {{rank, restore}},
            .peers = peer.empty() ? std::vector<std::string>() : std::vector<std::string>{peer}};
  }
  void Activate(const Part& part) {
    std::string error;
    ASSERT_TRUE(service->Activate(part, &error)) << error;
  }
  Arena Open(Rank rank, bool replica) {
    auto fds = host.Open(kJob, {rank, replica}, 0);
    if (!fds.ok()) return {};
    close(fds.value().eventfd);
    auto arena = Arena::Open(fds.value().memfd);
    return arena.ok() ? std::move(arena.value()) : Arena();
  }
  // One bit of a finished slot's payload.
  void Flip(Rank rank, bool replica, Step step, std::uint64_t at) {
    Arena arena = Open(rank, replica);
    ASSERT_TRUE(arena.open());
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena.Look(i);
      if (view && view->step() == step) {
        const_cast<unsigned char*>(arena.Payload(*view))[at] ^= 16;
      }
    }
  }
  // As libeverstep.so does it, into `slot`.
  SlotView Capture(Generation generation, Rank rank, std::uint32_t slot, Step step,
                   std::size_t size) {
    return CaptureBytes(generation, rank, slot, step, StateOf(step, size));
  }
  SlotView CaptureBytes(Generation generation, Rank rank, std::uint32_t slot, Step step,
                        const std::vector<unsigned char>& state) {
    auto fds = host.Open(kJob, {rank, false}, 4096);
    EXPECT_TRUE(fds.ok());
    auto arena = Arena::Open(fds.value().memfd);
    auto writer = SlotWriter::Begin(&arena.value(), slot, state.size());
    EXPECT_TRUE(writer.ok());
    EXPECT_TRUE(writer.value().Append(state.data(), state.size()).ok());
    auto view = writer.value().Finish(
        {.generation = generation, .step = step, .rank = rank, .world_size = 8}, 0);
    EXPECT_TRUE(view.ok());
    const std::uint64_t one = 1;
    EXPECT_EQ(write(fds.value().eventfd, &one, 8), 8);
    close(fds.value().eventfd);
    return view.value();
  }
  ::testing::AssertionResult Holds(Rank rank, bool replica, Step step, std::size_t size) {
    return HoldsBytes(rank, replica, step, StateOf(step, size));
  }
  ::testing::AssertionResult HoldsBytes(Rank rank, bool replica, Step step,
                                        const std::vector<unsigned char>& state) {
    Arena arena = Open(rank, replica);
    if (!arena.open()) return ::testing::AssertionFailure() << "no arena";
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena.Look(i);
      if (!view || view->step() != step) continue;
      if (auto ok = arena.Verify(*view); !ok.ok())
        return ::testing::AssertionFailure() << ok.error().message;
      if (view->fields.payload_bytes != state.size() ||
          std::memcmp(arena.Payload(*view), state.data(), state.size()) != 0) {
        return ::testing::AssertionFailure() << "other bytes";
      }
      return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure() << "no whole slot of step " << step;
  }

  std::uint64_t Pushes(PeerOutcome outcome) {
    return service->traffic()->Report().pushes[static_cast<std::size_t>(outcome)];
  }
  std::uint64_t Arrivals(PeerOutcome outcome) {
    return service->traffic()->Report().arrivals[static_cast<std::size_t>(outcome)];
  }

  TransferOptions options;
  MemoryHost host;
  Recorder heard;
  std::unique_ptr<TransferService> service;
};

// Forwards connections to a node and misbehaves as told.
class Proxy {
 public:
  // spoil(connection number, offset of the next bytes to the node, bytes): may change them;
  // false: breaks the connection.
  using Spoil = std::function<bool(int, std::uint64_t, char*, std::size_t)>;
  // `back`: the same for the bytes from the node; null: they pass.
  Proxy(std::uint16_t target, Spoil spoil, Spoil back = nullptr)
      : target_(target), spoil_(std::move(spoil)), back_(std::move(back)) {
    auto listening = Listen("127.0.0.1", 0);
    EXPECT_TRUE(listening.ok());
    fd_ = listening.value().fd;
    port_ = listening.value().port;
    thread_ = std::thread([this] { Run(); });
  }
  ~Proxy() {
    stop_ = true;
    thread_.join();
    for (auto& t : pumps_) t.join();
    close(fd_);
  }
  std::string address() const { return fmt::format("127.0.0.1:{}", port_); }
  std::atomic<int> connections{0};
  std::atomic<std::uint64_t> forwarded{0};
  std::atomic<std::uint64_t> returned{0};  // bytes from the node

 private:
  void Run() {
    while (!stop_) {
      pollfd p{fd_, POLLIN, 0};
      if (poll(&p, 1, 20) <= 0) continue;
      const int client = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;
      pumps_.emplace_back([this, client, n = connections++] { Pump(client, n); });
    }
  }
  void Pump(int client, int number) {
    auto node = Connection::Dial(fmt::format("127.0.0.1:{}", target_), milliseconds(1000),
                                 milliseconds(5000), steady_clock::now() + kPatience);
    std::vector<char> buffer(64 << 10);
    std::uint64_t offset = 0, back_offset = 0;
    while (node.ok() && !stop_) {
      pollfd p[2] = {{client, POLLIN, 0}, {node.value().fd(), POLLIN, 0}};
      if (poll(p, 2, 20) <= 0) continue;
      if (p[0].revents != 0) {
        const ssize_t n = recv(client, buffer.data(), buffer.size(), 0);
        if (n <= 0 || !spoil_(number, offset, buffer.data(), static_cast<std::size_t>(n))) break;
        offset += static_cast<std::uint64_t>(n);
        forwarded += static_cast<std::uint64_t>(n);
        if (!node.value().Send(buffer.data(), static_cast<std::size_t>(n)).ok()) break;
      }
      if (p[1].revents != 0) {
        const ssize_t n = recv(node.value().fd(), buffer.data(), buffer.size(), 0);
        if (n <= 0 ||
            (back_ && !back_(number, back_offset, buffer.data(), static_cast<std::size_t>(n)))) {
          break;
        }
        back_offset += static_cast<std::uint64_t>(n);
        returned += static_cast<std::uint64_t>(n);
        if (send(client, buffer.data(), static_cast<std::size_t>(n), MSG_NOSIGNAL) != n) break;
      }
    }
    close(client);
  }
  const std::uint16_t target_;
  const Spoil spoil_;
  const Spoil back_;
  int fd_ = -1;
  std::uint16_t port_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
  std::vector<std::thread> pumps_;
};

// Waits for a truth that nobody announces.
inline bool Becomes(const std::function<bool()>& truth) {
  const auto deadline = steady_clock::now() + kPatience;
  while (!truth()) {
    if (steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

inline constexpr std::size_t kSize = (5u << 20) + 12'345;

}  // namespace everstep::checkpoint
