// Two or three nodes' data planes over loopback, real memfds, real sockets. A Node stands for a
// keeper's arenas plus the agent's service; Capture() is what a trainer does.
#include "checkpoint/transfer/transfer_service.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/siphash.h"
#include "checkpoint/transfer/socket.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::seconds(20);
const JobId kJob = "demo";

// A keeper's arenas, held in this process.
class MemoryHost final : public ArenaHost {
 public:
  ~MemoryHost() override {
    for (auto& [key, fds] : arenas_) {
      close(fds.memfd);
      close(fds.eventfd);
    }
  }
  Result<std::vector<ArenaName>> List(const JobId& job) override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<ArenaName> out;
    for (auto& [key, fds] : arenas_) {
      if (key.first == job) out.push_back(key.second);
    }
    return out;
  }
  Result<ArenaFds> Open(const JobId& job, const ArenaName& name,
                        std::uint64_t slot_bytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = arenas_.find({job, name});
    if (it == arenas_.end()) {
      if (slot_bytes == 0) return Error{ErrorCode::kNotFound, "no such arena"};
      auto fd = CreateArenaFd({job, name.rank, name.replica, slot_bytes});
      if (!fd.ok()) return fd.error();
      it = arenas_
               .emplace(std::pair(job, name),
                        ArenaFds{fd.value(), eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)})
               .first;
    }
    return ArenaFds{fcntl(it->second.memfd, F_DUPFD_CLOEXEC, 0),
                    fcntl(it->second.eventfd, F_DUPFD_CLOEXEC, 0)};
  }
  void Drop(const JobId& job, const ArenaName& name) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = arenas_.find({job, name});
    if (it == arenas_.end()) return;
    close(it->second.memfd);
    close(it->second.eventfd);
    arenas_.erase(it);
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<JobId, ArenaName>, ArenaFds> arenas_;
};

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
  // False: `truth` did not come true within kPatience.
  bool Until(const std::function<bool()>& truth) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, truth);
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

 private:
  void Note(const std::function<void()>& f) {
    std::lock_guard<std::mutex> lock(mutex_);
    f();
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
};

std::vector<unsigned char> StateOf(Step step, std::size_t size) {
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
            .replica_address = peer};
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
  // As libeverstep.so does it, into `slot`.
  SlotView Capture(Generation generation, Rank rank, std::uint32_t slot, Step step,
                   std::size_t size) {
    auto fds = host.Open(kJob, {rank, false}, 4096);
    EXPECT_TRUE(fds.ok());
    auto arena = Arena::Open(fds.value().memfd);
    auto writer = SlotWriter::Begin(&arena.value(), slot, size);
    EXPECT_TRUE(writer.ok());
    const auto state = StateOf(step, size);
    EXPECT_TRUE(writer.value().Append(state.data(), size).ok());
    auto view = writer.value().Finish(
        {.generation = generation, .step = step, .rank = rank, .world_size = 8}, 0);
    EXPECT_TRUE(view.ok());
    const std::uint64_t one = 1;
    EXPECT_EQ(write(fds.value().eventfd, &one, 8), 8);
    close(fds.value().eventfd);
    return view.value();
  }
  ::testing::AssertionResult Holds(Rank rank, bool replica, Step step, std::size_t size) {
    Arena arena = Open(rank, replica);
    if (!arena.open()) return ::testing::AssertionFailure() << "no arena";
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const auto view = arena.Look(i);
      if (!view || view->step() != step) continue;
      if (auto ok = arena.Verify(*view); !ok.ok())
        return ::testing::AssertionFailure() << ok.error().message;
      const auto state = StateOf(step, size);
      if (view->fields.payload_bytes != size ||
          std::memcmp(arena.Payload(*view), state.data(), size) != 0) {
        return ::testing::AssertionFailure() << "other bytes";
      }
      return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure() << "no whole slot of step " << step;
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
  Proxy(std::uint16_t target, Spoil spoil) : target_(target), spoil_(std::move(spoil)) {
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
    std::uint64_t offset = 0;
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
        if (n <= 0 || send(client, buffer.data(), static_cast<std::size_t>(n), MSG_NOSIGNAL) != n)
          break;
      }
    }
    close(client);
  }
  const std::uint16_t target_;
  const Spoil spoil_;
  int fd_ = -1;
  std::uint16_t port_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
  std::vector<std::thread> pumps_;
};

constexpr std::size_t kSize = (5u << 20) + 12'345;

TEST(SipHash, AgreesWithThePublishedVector) {
  unsigned char key[16], input[15];
  for (unsigned char i = 0; i < 16; ++i) key[i] = i;
  for (unsigned char i = 0; i < 15; ++i) input[i] = i;
  SipKey k;
  std::memcpy(k.data(), key, 16);
  EXPECT_EQ(SipHash(k, input, 15), 0xa129ca6149be45e5ull);  // the paper's appendix A
}

TEST(Transfer, ACapturedSlotReachesThePeerBitForBit) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(a.heard.Copied(7, false)) << a.heard.Troubles();
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_EQ(a.heard.copied.front().crc_root, b.heard.copied.front().crc_root);
  EXPECT_EQ(a.heard.captured.front(), 7);
  Arena arena = a.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.header()->slot[0].replicated_seq != arena.Look(0)->seq &&
         steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(arena.header()->slot[0].replicated_seq, arena.Look(0)->seq);
}

TEST(Transfer, ThePeerKeepsTheTwoNewestStepsOfAStream) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  for (Step step = 0; step < 20; ++step) {
    a.Capture(1, 0, static_cast<std::uint32_t>(step % 2), step, 100'000);
    ASSERT_TRUE(b.heard.Copied(step, true)) << step << a.heard.Troubles() << b.heard.Troubles();
    a.service->MarkCommitted(kJob, 1, step);
    b.service->MarkCommitted(kJob, 1, step);
  }
  EXPECT_TRUE(b.Holds(0, true, 18, 100'000));
  EXPECT_TRUE(b.Holds(0, true, 19, 100'000));
}

TEST(Transfer, ThePeerNeverOverwritesTheNewestCommittedStep) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 1, 1000);
  ASSERT_TRUE(b.heard.Copied(1, true));
  a.service->MarkCommitted(kJob, 1, 1);  // b is told by the next push alone
  for (Step step : {2, 3, 4}) {
    a.Capture(1, 0, 1, step, 1000);
    ASSERT_TRUE(b.heard.Copied(step, true)) << a.heard.Troubles() << b.heard.Troubles();
  }
  EXPECT_TRUE(b.Holds(0, true, 1, 1000));
  EXPECT_TRUE(b.Holds(0, true, 4, 1000));
}

TEST(Transfer, AStaleGenerationIsRefused) {
  Node a, b;
  b.service->Begin(kJob, 5, "key");
  a.Activate(a.PartOf(4, 0, b.address()));
  a.Capture(4, 0, 0, 7, 1000);
  EXPECT_TRUE(a.heard.Complains("generation 4 of job demo is over; this node is at 5"))
      << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).open());
}

TEST(Transfer, AWrongKeyIsRefused) {
  Node a, b;
  b.service->Begin(kJob, 1, "another key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(a.heard.Complains("wrong key for job demo")) << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).open());
}

TEST(Transfer, AJobThatComesLaterIsPushedToThen) {
  Node a, b;
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  ASSERT_TRUE(a.heard.Complains("not on this node (yet)"));
  b.service->Begin(kJob, 1, "key");
  EXPECT_TRUE(b.heard.Copied(7, true));
}

TEST(Transfer, AByteFlippedOnTheWayIsCaughtAndSentAgain) {
  Node a, b;
  std::atomic<bool> flipped{false};
  Proxy proxy(b.service->port(), [&](int, std::uint64_t offset, char* data, std::size_t n) {
    const std::uint64_t victim = 3'000'000;
    if (!flipped && offset <= victim && victim < offset + n) {
      data[victim - offset] ^= 1;
      flipped = true;
    }
    return true;
  });
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(flipped);
  EXPECT_TRUE(b.heard.Complains("arrived with CRC")) << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_LT(proxy.forwarded, kSize * 18 / 10) << "sent from the start again";
}

TEST(Transfer, ABrokenConnectionIsResumedBehindTheVerifiedChunks) {
  Node a, b;
  Proxy proxy(b.service->port(), [&](int number, std::uint64_t offset, char*, std::size_t) {
    return number != 0 || offset < 4'300'000;
  });
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(b.heard.Copied(7, true)) << a.heard.Troubles() << b.heard.Troubles();
  EXPECT_TRUE(b.Holds(0, true, 7, kSize));
  EXPECT_GE(proxy.connections, 2);
  EXPECT_LT(proxy.forwarded, kSize + (2u << 20));
}

TEST(Transfer, ASourceWhoseMemoryChangedAfterTheCaptureIsNamed) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.service->Begin(kJob, 2, "key");  // nothing is pushed while the byte is flipped
  const SlotView view = a.Capture(2, 0, 0, 7, kSize);
  Arena arena = a.Open(0, false);
  const_cast<unsigned char*>(arena.Payload(view))[100] ^= 4;
  a.Activate(a.PartOf(2, 0, b.address()));
  EXPECT_TRUE(a.heard.Complains("memory is suspect")) << a.heard.Troubles();
  EXPECT_FALSE(b.Open(0, true).Newest());
}

TEST(Transfer, APeerThatSaysNothingIsGivenUpAndStopDoesNotWaitForIt) {
  auto silent = Listen("127.0.0.1", 0);
  ASSERT_TRUE(silent.ok());
  Node a(milliseconds(200));
  a.Activate(a.PartOf(1, 0, fmt::format("127.0.0.1:{}", silent.value().port)));
  a.Capture(1, 0, 0, 7, kSize);
  EXPECT_TRUE(a.heard.Complains("no byte moved for 200 ms")) << a.heard.Troubles();
  Node slow(milliseconds(60'000));
  slow.Activate(slow.PartOf(1, 0, fmt::format("127.0.0.1:{}", silent.value().port)));
  slow.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(slow.heard.Copied(7, false));
  const auto began = steady_clock::now();
  slow.service->Stop();
  EXPECT_LT(steady_clock::now() - began, std::chrono::seconds(5));
  close(silent.value().fd);
}

TEST(Transfer, APeerThatDiesInTheMiddleCostsNothingHere) {
  Node a;
  auto b = std::make_unique<Node>();
  b->service->Begin(kJob, 1, "key");
  std::atomic<bool> reached{false};
  Proxy proxy(b->service->port(), [&](int, std::uint64_t offset, char*, std::size_t) {
    if (offset > 2'000'000) reached = true;
    return !reached;
  });
  a.Activate(a.PartOf(1, 0, proxy.address()));
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(a.heard.Complains("pushing step 7"));
  b.reset();
  a.Capture(1, 0, 1, 8, kSize);
  EXPECT_TRUE(a.heard.Copied(8, false));
  EXPECT_TRUE(a.Holds(0, false, 7, kSize));
  EXPECT_TRUE(a.Holds(0, false, 8, kSize));
}

TEST(Transfer, ANewcomerFetchesItsRestoreFromThePeerThatHoldsIt) {
  Node a, b, c;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const HeldShard shard = b.heard.copied.front();
  a.service->Stop();  // its node is gone
  b.service->Begin(kJob, 2, "key");
  const RestorePart restore{7, 0, 1, shard.crc_root, shard.bytes, b.address()};
  c.Activate(c.PartOf(2, 0, b.address(), restore));
  Arena arena = c.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.Restore().state == RestoreState::kPending && steady_clock::now() < deadline)
    std::this_thread::yield();
  ASSERT_EQ(arena.Restore().state, RestoreState::kReady) << arena.Restore().message;
  EXPECT_EQ(arena.Restore().generation, 2u);
  EXPECT_TRUE(c.Holds(0, false, 7, kSize));
}

TEST(Transfer, ARestoreFromThisNodesOwnMemoryNeedsNoWire) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 3, b.address()));
  a.Capture(1, 3, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const HeldShard shard = b.heard.copied.front();
  b.Activate(b.PartOf(
      2, 0, "", {7, 3, 1, shard.crc_root, shard.bytes, b.address()}));  // rank 0 takes rank 3's
  Arena arena = b.Open(0, false);
  const auto deadline = steady_clock::now() + kPatience;
  while (arena.Restore().state == RestoreState::kPending && steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(arena.Restore().state, RestoreState::kReady) << arena.Restore().message;
  EXPECT_TRUE(b.Holds(0, false, 7, kSize));
}

TEST(Transfer, ARestoreThatCannotBeHadSaysWhy) {
  Node a, b;
  b.service->Begin(kJob, 2, "key");
  a.Activate(a.PartOf(2, 0, "", {7, 0, 1, 1234, 1000, b.address()}));
  Arena arena = a.Open(0, false);
  EXPECT_TRUE(a.heard.Complains("is not here (any more)")) << a.heard.Troubles();
  const RestoreView word = arena.Restore();
  EXPECT_EQ(word.state, RestoreState::kFailed);
  EXPECT_NE(word.message.find("step 7 of rank 0"), std::string::npos) << word.message;
}

TEST(Transfer, AFreshStartIsSaidAtOnceAndALocalSlotIsReadyAtOnce) {
  Node a;
  a.Activate(a.PartOf(1, 0, ""));
  Arena arena = a.Open(0, false);
  EXPECT_EQ(arena.Restore().state, RestoreState::kFresh);
  const SlotView view = a.Capture(1, 0, 1, 7, kSize);
  a.Activate(a.PartOf(2, 0, "", {7, 0, 1, view.crc_root, kSize, ""}));
  EXPECT_EQ(arena.Restore().state, RestoreState::kReady);
  EXPECT_EQ(arena.Restore().slot, 1u);
  EXPECT_EQ(arena.header()->agent.fence_generation, 2u);
}

TEST(Transfer, SurveyReportsWholeSlotsAndLeavesOutADamagedOne) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  a.Activate(a.PartOf(1, 2, b.address()));
  a.Capture(1, 2, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  const SlotView newer = a.Capture(1, 2, 1, 8, kSize);
  ASSERT_TRUE(b.heard.Copied(8, true));
  EXPECT_EQ(a.service->Survey(kJob).size(), 2u);
  const auto held = b.service->Survey(kJob);
  ASSERT_EQ(held.size(), 2u);
  EXPECT_TRUE(held[0].replica);
  EXPECT_EQ(held[0].rank, 2);
  Arena arena = a.Open(2, false);
  const_cast<unsigned char*>(arena.Payload(newer))[kSize - 1] ^= 1;
  const auto left = a.service->Survey(kJob);
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].step, 7);
  EXPECT_TRUE(a.heard.Complains("slot 1, step 8: chunk 5 of 6"));
  EXPECT_TRUE(a.service->Survey("no such job").empty());
}

TEST(Transfer, ARestartedAgentGoesOnWithTheSamePart) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  const Part part = a.PartOf(1, 0, b.address());
  a.Activate(part);
  a.Capture(1, 0, 0, 7, kSize);
  ASSERT_TRUE(b.heard.Copied(7, true));
  a.service.reset();
  a.Capture(1, 0, 1, 8, kSize);  // nobody listened
  a.Boot();
  a.Activate(part);
  EXPECT_EQ(a.Open(0, false).Restore().state, RestoreState::kFresh)
      << "a running trainer was told anew";
  EXPECT_TRUE(b.heard.Copied(8, true)) << a.heard.Troubles();
}

TEST(Transfer, ArenasOfEarlierMembershipsGoWhenANewStepIsCommitted) {
  Node a, b;
  a.Activate(a.PartOf(1, 5, ""));
  a.Capture(1, 5, 0, 1, 1000);
  a.Activate(a.PartOf(2, 0, ""));
  a.Capture(2, 0, 0, 2, 1000);
  ASSERT_TRUE(a.heard.Copied(2, false));
  EXPECT_TRUE(a.Open(5, false).open());
  a.service->MarkCommitted(kJob, 2, 2);
  const auto deadline = steady_clock::now() + kPatience;
  while (a.Open(5, false).open() && steady_clock::now() < deadline) std::this_thread::yield();
  EXPECT_FALSE(a.Open(5, false).open());
  EXPECT_TRUE(a.Holds(0, false, 2, 1000));
}

TEST(Transfer, GarbageOnThePortIsDroppedAndTheNextPushWorks) {
  Node a, b;
  b.service->Begin(kJob, 1, "key");
  Random random(9);
  for (int i = 0; i < 50; ++i) {
    auto c = Connection::Dial(b.address(), milliseconds(1000), milliseconds(1000),
                              steady_clock::now() + kPatience);
    ASSERT_TRUE(c.ok());
    std::vector<unsigned char> junk(random.Below(2000));
    for (auto& j : junk) j = static_cast<unsigned char>(random.Next());
    if (i % 2 == 0 && junk.size() > sizeof(HelloFrame)) {
      const HelloFrame hello{.nonce = 1};
      std::memcpy(junk.data(), &hello, sizeof hello);
    }
    (void)c.value().Send(junk.data(), junk.size());
  }
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(b.heard.Copied(7, true));
}

TEST(Transfer, TooManyConnectionsWaitForTheirTurn) {
  Node a, b;
  b.service.reset();
  b.options.max_connections = 1;
  b.options.io_timeout = milliseconds(300);
  b.Boot();
  b.service->Begin(kJob, 1, "key");
  auto idle = Connection::Dial(b.address(), milliseconds(1000), milliseconds(1000),
                               steady_clock::now() + kPatience);
  ASSERT_TRUE(idle.ok());
  a.Activate(a.PartOf(1, 0, b.address()));
  a.Capture(1, 0, 0, 7, 1000);
  EXPECT_TRUE(b.heard.Copied(7, true)) << "the idle connection was never given up";
}

TEST(Transfer, APortInUseIsNamed) {
  Node a;
  MemoryHost host;
  Recorder heard;
  TransferOptions options;
  options.port = a.service->port();
  const auto second = TransferService::Start(options, &host, &heard);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.error().message.find(std::to_string(options.port)), std::string::npos);
  EXPECT_NE(second.error().message.find("choose another port"), std::string::npos);
}

}  // namespace
}  // namespace everstep::checkpoint
