// The C ABI as a foreign caller meets it: right calls, wrong calls, absent and odd keepers.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/store/slot_writer.h"
#include "tests/integration/arena_host.h"
#include "worker/client/everstep.h"

namespace everstep {
namespace {

using std::chrono::steady_clock;

class Silent final : public checkpoint::Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId& job, const HeldShard& shard) override {
    ++copied;
    if (auto* s = service.load(); s != nullptr && commits) {
      s->MarkCommitted(job, shard.generation, shard.step);
    }
  }
  void OnTrouble(const JobId&, const std::string&) override {}
  std::atomic<int> copied{0};
  std::atomic<bool> commits{true};
  std::atomic<checkpoint::TransferService*> service{nullptr};
};

class ClientAbi : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/everstep-abi-XXXXXX";
    folder = mkdtemp(name);
    keeper = folder + "/keeper.sock";
  }
  void TearDown() override {
    for (everstep_client* c : open) everstep_close(c);
    listener.service = nullptr;
    if (service) service->Stop();
    host.reset();
    std::filesystem::remove_all(folder);
  }
  void StartNode() {
    host = std::make_unique<testing::ArenaHost>(keeper);
    auto started = checkpoint::TransferService::Start({}, host.get(), &listener);
    ASSERT_TRUE(started.ok()) << started.error().message;
    service = std::move(started.value());
    listener.service = service.get();
  }
  void Activate(Generation generation, Step step = kNoStep) {
    checkpoint::Part part{.job = "job",
                          .generation = generation,
                          .world_size = 1,
                          .data_key = "k",
                          .workers = {{.rank = 0}},
                          .peers = {}};
    for (const HeldShard& s : service->Survey("job")) {
      if (step == kNoStep || s.step != step) continue;
      part.workers[0].restore = {.step = s.step,
                                 .shard_rank = s.rank,
                                 .shard_generation = s.generation,
                                 .crc_root = s.crc_root,
                                 .bytes = s.bytes};
    }
    std::string error;
    service->Begin("job", generation, "k");
    ASSERT_TRUE(service->Activate(part, &error)) << error;
  }
  everstep_options Options(Generation generation = 1) {
    everstep_options o{};
    o.size = sizeof o;
    o.world_size = 1;
    o.connect_timeout_ms = 2000;
    o.commit_wait_ms = 50;
    o.generation = generation;
    o.job = "job";
    o.keeper = keeper.c_str();
    return o;
  }
  int Open(const everstep_options& options, everstep_client** c) {
    const int code = everstep_open(&options, c);
    if (*c != nullptr) open.push_back(*c);
    return code;
  }
  int Capture(everstep_client* c, std::int64_t step, const std::string& data) {
    const int begun =
        everstep_capture_begin(c, step, data.size() + 1024, EVERSTEP_REPLICATED_LAYOUT);
    if (begun != EVERSTEP_OK) return begun;
    const everstep_piece piece{data.data(), data.size()};
    const int written = everstep_capture_write(c, &piece, 1, nullptr);
    return written != EVERSTEP_OK ? written : everstep_capture_commit(c, "{}", 2);
  }
  bool UntilCopied(int n) {
    const auto deadline = steady_clock::now() + std::chrono::seconds(20);
    while (listener.copied < n && steady_clock::now() < deadline) std::this_thread::yield();
    return listener.copied >= n;
  }
  static std::string Error(everstep_client* c) { return everstep_last_error(c); }
  // Generation 1 leaves steps 3 and 4, both on the peer; generation 2 starts from step 4 with
  // `next`.
  void CaptureTwoStepsAndStartTheNext(everstep_client** next, int* memfd) {
    StartNode();
    Activate(1);
    everstep_client* c = nullptr;
    ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
    ASSERT_EQ(Capture(c, 3, "older"), EVERSTEP_OK);
    ASSERT_TRUE(UntilCopied(1));
    ASSERT_EQ(Capture(c, 4, "newer"), EVERSTEP_OK);
    ASSERT_TRUE(UntilCopied(2));
    Activate(2, 4);
    ASSERT_EQ(Open(Options(2), next), EVERSTEP_OK) << Error(*next);
    auto fds = host->Open("job", {.rank = 0, .replica = false}, 0);
    ASSERT_TRUE(fds.ok()) << fds.error().message;
    close(fds.value().eventfd);
    *memfd = fds.value().memfd;
  }
  template <typename T>
  static T Sized() {
    T t{};
    t.size = sizeof t;
    return t;
  }

  std::string folder, keeper;
  Silent listener;
  std::unique_ptr<testing::ArenaHost> host;
  std::unique_ptr<checkpoint::TransferService> service;
  std::vector<everstep_client*> open;
};

TEST_F(ClientAbi, CapturesAndRestoresTheSameBytes) {
  EXPECT_EQ(everstep_abi_version(), EVERSTEP_ABI_VERSION);
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  auto slot = Sized<everstep_slot>();
  EXPECT_EQ(everstep_restore(c, 1000, &slot), EVERSTEP_NONE);
  EXPECT_EQ(everstep_reserve(c, 1 << 20), EVERSTEP_OK);
  ASSERT_EQ(everstep_capture_begin(c, 4, 1000, 0), EVERSTEP_OK);
  const everstep_piece pieces[] = {{"hello", 5}, {"", 0}, {"world", 5}};
  std::uint64_t offsets[3];
  ASSERT_EQ(everstep_capture_write(c, pieces, 3, offsets), EVERSTEP_OK);
  EXPECT_EQ(offsets[0], 0u);
  EXPECT_EQ(offsets[1], 64u);
  EXPECT_EQ(offsets[2], 64u);
  ASSERT_EQ(everstep_capture_commit(c, "table", 5), EVERSTEP_OK);
  ASSERT_TRUE(UntilCopied(1));

  Activate(2, 4);
  everstep_client* next = nullptr;
  ASSERT_EQ(Open(Options(2), &next), EVERSTEP_OK) << Error(next);
  ASSERT_EQ(everstep_restore(next, 1000, &slot), EVERSTEP_OK) << Error(next);
  EXPECT_EQ(slot.step, 4);
  EXPECT_EQ(slot.generation, 1u);
  EXPECT_EQ(slot.payload_bytes, 133u);
  const void* data = nullptr;
  ASSERT_EQ(everstep_payload(next, &slot, &data), EVERSTEP_OK);
  EXPECT_EQ(std::memcmp(static_cast<const char*>(data) + 64, "world", 5), 0);
  ASSERT_EQ(everstep_restore_table(next, 1000, &slot), EVERSTEP_OK) << Error(next);
  char loaded[8] = "";
  const everstep_target targets[] = {{1, 3, loaded}, {64, 4, loaded + 3}};
  ASSERT_EQ(everstep_load(next, &slot, targets, 2), EVERSTEP_OK) << Error(next);
  EXPECT_STREQ(loaded, "ellworl");
  EXPECT_EQ(everstep_load(next, &slot, nullptr, 1), EVERSTEP_EINVAL);
  const everstep_target outside{133, 1, loaded};
  EXPECT_EQ(everstep_load(next, &slot, &outside, 1), EVERSTEP_EINVAL);
  auto gone = slot;
  ++gone.sequence;
  EXPECT_EQ(everstep_load(next, &gone, targets, 2), EVERSTEP_ESTALE);
  EXPECT_EQ(std::memcmp(static_cast<const char*>(data) + slot.table_offset, "table", 5), 0);
  EXPECT_EQ(Capture(c, 5, "late"), EVERSTEP_ESTALE);
  EXPECT_NE(Error(c).find("generation 1, the job is at 2"), std::string::npos);
}

// The same pieces by either way give the same slot, whatever becomes of the early ones and the
// table after start, and of the late ones after wait.
TEST_F(ClientAbi, AnOverlappedCaptureHasTheBytesOfABlockingOne) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  auto slot = Sized<everstep_slot>();
  ASSERT_EQ(everstep_restore(c, 1000, &slot), EVERSTEP_NONE);
  const std::size_t sizes[] = {3'000'001, 0, 100, 70'000, 5, 0, 64, 1};
  for (std::uint32_t late = 0; late <= 8; ++late) {
    std::vector<std::string> data;
    for (const std::size_t n : sizes) data.emplace_back(n, static_cast<char>('a' + data.size()));
    everstep_piece pieces[8];
    for (std::size_t i = 0; i < 8; ++i) pieces[i] = {data[i].data(), data[i].size()};
    std::string table = "the table";
    std::string bytes[2];
    std::uint64_t offsets[2][8];
    for (int way = 0; way < 2; ++way) {
      const std::int64_t step = 2 * late + way;
      ASSERT_EQ(everstep_capture_begin(c, step, 3'100'000, EVERSTEP_REPLICATED_LAYOUT), EVERSTEP_OK)
          << Error(c);
      if (way == 0) {
        ASSERT_EQ(everstep_capture_write(c, pieces, 8, offsets[0]), EVERSTEP_OK);
        ASSERT_EQ(everstep_capture_commit(c, table.data(), table.size()), EVERSTEP_OK);
      } else {
        ASSERT_EQ(everstep_capture_start(c, pieces, late, pieces + late, 8 - late, table.data(),
                                         table.size(), offsets[1]),
                  EVERSTEP_OK)
            << Error(c);
        EXPECT_EQ(everstep_capture_write(c, pieces, 1, nullptr), EVERSTEP_EINVAL);
        EXPECT_EQ(everstep_capture_begin(c, 99, 10, 0), EVERSTEP_EINVAL);
        for (std::size_t i = late; i < 8; ++i) data[i].assign(data[i].size(), '!');
        table.assign(table.size(), '!');
        while (everstep_capture_wait(c, 100) == EVERSTEP_ETIMEDOUT) {
        }
        for (std::size_t i = 0; i < late; ++i) data[i].assign(data[i].size(), '?');
        EXPECT_EQ(everstep_find(c, INT64_MAX, &slot), EVERSTEP_OK);
        EXPECT_EQ(slot.step, step - 1) << "visible before it was published";
        ASSERT_EQ(everstep_capture_publish(c), EVERSTEP_OK) << Error(c);
      }
      ASSERT_TRUE(UntilCopied(static_cast<int>(step) + 1));
      ASSERT_EQ(everstep_find(c, step, &slot), EVERSTEP_OK) << Error(c);
      ASSERT_EQ(slot.step, step);
      const void* payload = nullptr;
      ASSERT_EQ(everstep_payload(c, &slot, &payload), EVERSTEP_OK);
      bytes[way].assign(static_cast<const char*>(payload), slot.payload_bytes);
    }
    EXPECT_EQ(bytes[0], bytes[1]) << late << " late pieces";
    EXPECT_TRUE(std::equal(offsets[0], offsets[0] + 8, offsets[1]));
  }
}

// A device brings some pieces by itself, into the slot or into an image of the caller's; checksums
// are taken afterwards, in parts or by the thread. The slot is the one that plain writes give.
TEST_F(ClientAbi, WhatADeviceBringsGivesTheSlotThatWritesGive) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  auto slot = Sized<everstep_slot>();
  ASSERT_EQ(everstep_restore(c, 1000, &slot), EVERSTEP_NONE);
  void* data = nullptr;
  std::uint64_t bytes = 0;
  EXPECT_EQ(everstep_capture_mapped(c, 0, 3'100'000, 0, &data, &bytes), EVERSTEP_NONE);
  ASSERT_EQ(everstep_reserve(c, 3'100'000), EVERSTEP_OK) << Error(c);
  const std::size_t sizes[] = {3'000'001, 0, 100, 70'000, 5, 64, 1};
  constexpr std::uint32_t kPieces = std::size(sizes);
  std::vector<std::string> held;
  for (const std::size_t n : sizes) held.emplace_back(n, static_cast<char>('a' + held.size()));
  std::string expected;
  std::uint64_t offsets[2][kPieces];
  std::string image(3'100'000, '#');
  for (std::int64_t step = 0; step < 9; ++step) {
    everstep_piece pieces[kPieces];
    for (std::size_t i = 0; i < kPieces; ++i) pieces[i] = {held[i].data(), held[i].size()};
    ASSERT_EQ(everstep_capture_begin(c, step, 3'100'000, EVERSTEP_REPLICATED_LAYOUT), EVERSTEP_OK)
        << Error(c);
    if (step == 0) {
      ASSERT_EQ(everstep_capture_write(c, pieces, kPieces, offsets[0]), EVERSTEP_OK);
      ASSERT_EQ(everstep_capture_commit(c, "the table", 9), EVERSTEP_OK);
    } else {
      const bool imaged = step % 2 == 0;
      const auto is_devices = [&](std::size_t i) {
        return (i + static_cast<std::size_t>(step)) % 3 != 0;
      };
      for (std::size_t i = 0; i < kPieces; ++i) {
        if (is_devices(i)) pieces[i].data = nullptr;
      }
      void* to = nullptr;
      ASSERT_EQ(everstep_capture_place(c, pieces, kPieces, imaged ? image.data() : nullptr,
                                       offsets[1], &to),
                EVERSTEP_OK)
          << Error(c);
      EXPECT_TRUE(std::equal(offsets[0], offsets[0] + kPieces, offsets[1]));
      ASSERT_EQ(to == image.data(), imaged);
      if (!imaged) {
        bool known = false;
        for (std::uint32_t s = 0; s < 2; ++s) {
          ASSERT_EQ(everstep_capture_mapped(c, s, 3'100'000, 0, &data, &bytes), EVERSTEP_OK);
          EXPECT_GE(bytes, 3'100'000U);
          known |= data == to;
        }
        EXPECT_TRUE(known) << "the slot is one of the two that a device was told of";
      }
      for (std::size_t i = 0; i < kPieces; ++i) {
        if (!is_devices(i)) continue;
        std::memcpy(static_cast<char*>(to) + offsets[1][i], held[i].data(), held[i].size());
      }
      const std::uint64_t total = offsets[1][kPieces - 1] + sizes[kPieces - 1];
      const auto part = [&](std::uint64_t begin, std::uint64_t end) {
        return everstep_piece{imaged ? image.data() + begin : nullptr, end - begin};
      };
      EXPECT_EQ(everstep_find(c, INT64_MAX, &slot), EVERSTEP_OK);
      EXPECT_EQ(slot.step, step - 1) << "visible before its checksums were taken";
      if (step % 4 < 2) {
        const everstep_piece parts[] = {part(0, 1 << 20), part(1 << 20, 2'000'000),
                                        part(2'000'000, total)};
        ASSERT_EQ(everstep_capture_write(c, parts, 3, nullptr), EVERSTEP_OK) << Error(c);
        ASSERT_EQ(everstep_capture_commit(c, "the table", 9), EVERSTEP_OK);
      } else {
        const everstep_piece whole = part(0, total);
        ASSERT_EQ(everstep_capture_start(c, &whole, 1, nullptr, 0, "the table", 9, nullptr),
                  EVERSTEP_OK)
            << Error(c);
        EXPECT_EQ(everstep_capture_place(c, pieces, kPieces, nullptr, nullptr, nullptr),
                  EVERSTEP_EINVAL);
        while (everstep_capture_wait(c, 100) == EVERSTEP_ETIMEDOUT) {
        }
        ASSERT_EQ(everstep_capture_publish(c), EVERSTEP_OK) << Error(c);
      }
    }
    ASSERT_TRUE(UntilCopied(static_cast<int>(step) + 1));
    ASSERT_EQ(everstep_find(c, step, &slot), EVERSTEP_OK) << Error(c);
    ASSERT_EQ(slot.step, step);
    const void* payload = nullptr;
    ASSERT_EQ(everstep_payload(c, &slot, &payload), EVERSTEP_OK);
    const std::string got(static_cast<const char*>(payload), slot.payload_bytes);
    if (step == 0) expected = got;
    EXPECT_TRUE(got == expected) << "step " << step;
  }
  EXPECT_EQ(everstep_capture_mapped(c, 0, 3'200'000, 0, &data, &bytes), EVERSTEP_NONE)
      << "it would have to grow";
  EXPECT_EQ(everstep_capture_mapped(c, 0, 1'000'000, EVERSTEP_SHARE, &data, &bytes), EVERSTEP_NONE)
      << "it would be cut";
  EXPECT_EQ(everstep_capture_mapped(c, 2, 1, 0, &data, &bytes), EVERSTEP_EINVAL);
  const everstep_piece big{nullptr, 101};
  EXPECT_EQ(everstep_capture_place(c, &big, 1, nullptr, nullptr, nullptr), EVERSTEP_EINVAL);
  ASSERT_EQ(everstep_capture_begin(c, 9, 100, 0), EVERSTEP_OK) << Error(c);
  EXPECT_EQ(everstep_capture_place(c, &big, 1, nullptr, nullptr, nullptr), EVERSTEP_EINVAL);
  EXPECT_NE(Error(c).find("101 bytes at 0 do not fit in the 100"), std::string::npos) << Error(c);
}

TEST_F(ClientAbi, AnOverlappedCaptureCanBeGivenUpAtAnyMoment) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  auto slot = Sized<everstep_slot>();
  ASSERT_EQ(everstep_restore(c, 1000, &slot), EVERSTEP_NONE);
  std::uint64_t ended = 0;
  EXPECT_EQ(everstep_capture_wait(c, 0), EVERSTEP_EINVAL) << "there is no thread yet";
  EXPECT_EQ(everstep_capture_watch(c, &ended, 0), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_capture_publish(c), EVERSTEP_EINVAL);
  ASSERT_EQ(Capture(c, 0, "whole"), EVERSTEP_OK);
  ASSERT_TRUE(UntilCopied(1));
  const std::string data(40 << 20, 'x');
  const everstep_piece piece{data.data(), data.size()};
  for (std::int64_t step = 1; step < 6; ++step) {
    ASSERT_EQ(everstep_capture_begin(c, step, data.size() + 1024, EVERSTEP_REPLICATED_LAYOUT),
              EVERSTEP_OK)
        << Error(c);
    ASSERT_EQ(everstep_capture_start(c, &piece, 1, nullptr, 0, "{}", 2, nullptr), EVERSTEP_OK);
    if (step % 2 == 0) {
      while (everstep_capture_wait(c, 100) == EVERSTEP_ETIMEDOUT) {
      }
      EXPECT_EQ(everstep_capture_watch(c, &ended, 1000), EVERSTEP_OK);
      EXPECT_EQ(everstep_capture_watch(c, &ended, 0), EVERSTEP_ETIMEDOUT)
          << "and no more than that";
    }
    everstep_capture_abort(c);
    EXPECT_EQ(everstep_capture_watch(c, &ended, 0), EVERSTEP_OK) << "an end as any other";
    EXPECT_EQ(everstep_capture_publish(c), EVERSTEP_EINVAL);
    ASSERT_EQ(everstep_find(c, INT64_MAX, &slot), EVERSTEP_OK);
    EXPECT_EQ(slot.step, 0);
  }
  // Closing in the middle ends the thread.
  ASSERT_EQ(everstep_capture_begin(c, 6, data.size() + 1024, EVERSTEP_REPLICATED_LAYOUT),
            EVERSTEP_OK);
  ASSERT_EQ(everstep_capture_start(c, &piece, 1, nullptr, 0, "{}", 2, nullptr), EVERSTEP_OK);
  const pid_t child = fork();
  if (child == 0) {
    everstep_close(c);  // the thread is the parent's
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(everstep_capture_wait(c, 20'000), EVERSTEP_OK);
}

TEST_F(ClientAbi, AnOverlappedCaptureBeyondMemoryIsRefusedAndNothingIsThrown) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  ASSERT_EQ(everstep_capture_begin(c, 1, 100, 0), EVERSTEP_OK) << Error(c);
  const everstep_piece early{"x", std::uint64_t{1} << 63};
  EXPECT_EQ(everstep_capture_start(c, nullptr, 0, &early, 1, "{}", 2, nullptr), EVERSTEP_ENOMEM);
  EXPECT_NE(Error(c).find("no memory"), std::string::npos) << Error(c);
  everstep_capture_abort(c);
  EXPECT_EQ(Capture(c, 1, "one"), EVERSTEP_OK) << Error(c);
}

TEST_F(ClientAbi, WrongCallsAreToldAndHarmless) {
  everstep_client* c = nullptr;
  EXPECT_EQ(everstep_open(nullptr, nullptr), EVERSTEP_EINVAL);
  everstep_options small = Options();
  small.size = 8;
  EXPECT_EQ(Open(small, &c), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_capture_begin(c, 0, 10, 0), EVERSTEP_EINVAL);
  EXPECT_NE(Error(c).find("never attached"), std::string::npos);
  EXPECT_NE(std::string(everstep_last_error(nullptr)), "");
  EXPECT_EQ(everstep_capture_begin(nullptr, 0, 10, 0), EVERSTEP_EINVAL);
  everstep_close(nullptr);
  everstep_capture_abort(nullptr);

  StartNode();
  Activate(1);
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK) << Error(c);
  EXPECT_EQ(everstep_capture_commit(c, "", 0), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_capture_write(c, nullptr, 0, nullptr), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_capture_begin(c, -1, 10, 0), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_restore(c, 10, nullptr), EVERSTEP_EINVAL);
  ASSERT_EQ(everstep_capture_begin(c, 0, 100, 0), EVERSTEP_OK);
  EXPECT_EQ(everstep_capture_begin(c, 1, 100, 0), EVERSTEP_EINVAL);
  EXPECT_EQ(everstep_reserve(c, 100), EVERSTEP_EINVAL);
  const std::string much(1 << 20, 'x');
  const everstep_piece piece{much.data(), much.size()};
  EXPECT_EQ(everstep_capture_write(c, &piece, 1, nullptr), EVERSTEP_EINVAL);
  EXPECT_NE(Error(c).find("do not fit"), std::string::npos) << Error(c);
  everstep_capture_abort(c);
  auto slot = Sized<everstep_slot>();
  EXPECT_EQ(everstep_find(c, 100, &slot), EVERSTEP_NONE);
  EXPECT_EQ(Capture(c, 0, "good"), EVERSTEP_OK) << Error(c);
  EXPECT_EQ(everstep_capture_begin(c, 1, std::uint64_t{1} << 43, 0), EVERSTEP_ENOMEM);
  EXPECT_NE(Error(c).find("8.1 TiB"), std::string::npos) << Error(c);
}

TEST_F(ClientAbi, AChecksumOfTwoPiecesIsThatOfTheWhole) {
  const char digits[] = "123456789";
  EXPECT_EQ(everstep_crc32c(0, digits, 9), 0xE3069283u);  // the check value of CRC-32C
  EXPECT_EQ(everstep_crc32c(everstep_crc32c(0, digits, 4), digits + 4, 5), 0xE3069283u);
  EXPECT_EQ(everstep_crc32c(7, nullptr, 0), 7u);
}

TEST_F(ClientAbi, AnOlderCallersStructIsFilledNoFurther) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK);
  ASSERT_EQ(Capture(c, 3, "data"), EVERSTEP_OK);
  everstep_stats stats;
  std::memset(&stats, 0x5A, sizeof stats);
  stats.size = 16;  // up to `captured`
  ASSERT_EQ(everstep_get_stats(c, &stats), EVERSTEP_OK);
  EXPECT_EQ(stats.captured, 1u);
  EXPECT_EQ(stats.skipped, 0x5A5A5A5A5A5A5A5Au);
}

TEST_F(ClientAbi, AForkedChildIsRefused) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK);
  const pid_t pid = fork();
  if (pid == 0) _exit(everstep_report_step(c, 1) == EVERSTEP_EINVAL ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(everstep_report_step(c, 1), EVERSTEP_OK);
}

TEST_F(ClientAbi, FindTakesTheOlderStepWhenTheNewestIsDamaged) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK);
  ASSERT_EQ(Capture(c, 1, "one"), EVERSTEP_OK);
  ASSERT_TRUE(UntilCopied(1));
  ASSERT_EQ(Capture(c, 2, "two"), EVERSTEP_OK);
  auto slot = Sized<everstep_slot>();
  ASSERT_EQ(everstep_find(c, 9, &slot), EVERSTEP_OK);
  EXPECT_EQ(slot.step, 2);
  const void* data = nullptr;
  ASSERT_EQ(everstep_payload(c, &slot, &data), EVERSTEP_OK);
  static_cast<char*>(const_cast<void*>(data))[0] ^= 1;
  ASSERT_EQ(everstep_find(c, 9, &slot), EVERSTEP_OK) << Error(c);
  EXPECT_EQ(slot.step, 1);
  ASSERT_EQ(everstep_find(c, 0, &slot), EVERSTEP_NONE);
}

// Its agent leaves it out of the next survey, and knows that the worker had no chance.
TEST_F(ClientAbi, ADamagedRestoreIsMarkedAndPatienceGrowsWithTheBytesToCome) {
  everstep_client* next = nullptr;
  int memfd = -1;
  ASSERT_NO_FATAL_FAILURE(CaptureTwoStepsAndStartTheNext(&next, &memfd));
  auto opened = checkpoint::Arena::Open(memfd);
  ASSERT_TRUE(opened.ok());
  checkpoint::Arena& arena = opened.value();
  const auto newer = arena.Newest();
  ASSERT_TRUE(newer);
  const_cast<unsigned char*>(arena.Payload(*newer))[1] ^= 1;
  EXPECT_FALSE(service->RestoreFailed("job", 2, 0));
  auto slot = Sized<everstep_slot>();
  EXPECT_EQ(everstep_restore(next, 1000, &slot), EVERSTEP_ECORRUPT);
  EXPECT_TRUE(service->RestoreFailed("job", 2, 0));
  const auto held = service->Survey("job");
  ASSERT_EQ(held.size(), 1u);
  EXPECT_EQ(held[0].step, 3);

  arena.SetRestore({.generation = 2,
                    .state = checkpoint::RestoreState::kPending,
                    .slot_seq = 20'000'000,
                    .step = 4,
                    .message = {}});
  const auto began = std::chrono::steady_clock::now();
  EXPECT_EQ(everstep_restore(next, 1, &slot), EVERSTEP_ETIMEDOUT);
  EXPECT_GE(std::chrono::steady_clock::now() - began, std::chrono::milliseconds(200));
}

// The other ranks start from the step that was announced: an older one would mix two.
TEST_F(ClientAbi, ARestoreWhoseSlotIsGoneTakesNoOtherStep) {
  everstep_client* next = nullptr;
  int memfd = -1;
  ASSERT_NO_FATAL_FAILURE(CaptureTwoStepsAndStartTheNext(&next, &memfd));
  auto arena = checkpoint::Arena::Open(memfd);
  ASSERT_TRUE(arena.ok());
  ASSERT_EQ(arena.value().Restore().state, checkpoint::RestoreState::kReady);
  ASSERT_TRUE(
      checkpoint::SlotWriter::Begin(&arena.value(), arena.value().Restore().slot, 100).ok());
  auto slot = Sized<everstep_slot>();
  EXPECT_EQ(everstep_restore(next, 1000, &slot), EVERSTEP_ECORRUPT) << "took step " << slot.step;
  EXPECT_NE(Error(next).find("step 4"), std::string::npos) << Error(next);
}

TEST_F(ClientAbi, AnUncommittedStepIsLeftAloneUntilItIsReleased) {
  StartNode();
  Activate(1);
  everstep_client* c = nullptr;
  ASSERT_EQ(Open(Options(), &c), EVERSTEP_OK);
  ASSERT_EQ(Capture(c, 1, "one"), EVERSTEP_OK);
  ASSERT_TRUE(UntilCopied(1));
  listener.commits = false;
  auto stats = Sized<everstep_stats>();
  const auto deadline = steady_clock::now() + std::chrono::seconds(20);
  do {
    ASSERT_EQ(everstep_get_stats(c, &stats), EVERSTEP_OK);
  } while (stats.committed_step != 1 && steady_clock::now() < deadline);
  ASSERT_EQ(Capture(c, 2, "two"), EVERSTEP_OK);
  ASSERT_TRUE(UntilCopied(2));
  EXPECT_EQ(Capture(c, 3, "three"), EVERSTEP_SKIPPED);
  ASSERT_EQ(everstep_get_stats(c, &stats), EVERSTEP_OK);
  EXPECT_STREQ(stats.last_skip, "uncommitted");
  EXPECT_EQ(stats.newest_step, 2);
  service->MarkReleased("job", 1, 2);
  EXPECT_EQ(Capture(c, 4, "four"), EVERSTEP_OK) << Error(c);
  ASSERT_EQ(everstep_get_stats(c, &stats), EVERSTEP_OK);
  EXPECT_EQ(stats.replaced, 1u);
  auto slot = Sized<everstep_slot>();
  ASSERT_EQ(everstep_find(c, 3, &slot), EVERSTEP_OK);
  EXPECT_EQ(slot.step, 1) << "the committed step was overwritten";
}

TEST_F(ClientAbi, NoKeeperASilentOneAndAnOddOneAreTold) {
  everstep_client* c = nullptr;
  EXPECT_EQ(Open(Options(), &c), EVERSTEP_EUNAVAILABLE);
  EXPECT_NE(Error(c).find("is the agent of this node running?"), std::string::npos) << Error(c);

  const std::string longer = "/tmp/" + std::string(200, 'x');
  everstep_options far = Options();
  far.keeper = longer.c_str();
  EXPECT_EQ(Open(far, &c), EVERSTEP_EINVAL);
  EXPECT_NE(Error(c).find("1 to 107 bytes"), std::string::npos) << Error(c);

  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, keeper.data(), keeper.size());
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(fd, 8), 0);
  everstep_options hurry = Options();
  hurry.connect_timeout_ms = 100;
  EXPECT_EQ(Open(hurry, &c), EVERSTEP_ETIMEDOUT);
  EXPECT_NE(Error(c).find("no answer in 100 ms"), std::string::npos) << Error(c);

  std::thread odd([fd] {
    close(accept(fd, nullptr, nullptr));  // the one that timed out
    const int client = accept(fd, nullptr, nullptr);
    keeper::AttachRequest
        asked;  // a socket that is closed with bytes unread would break the asking
    EXPECT_EQ(recv(client, &asked, sizeof asked, MSG_WAITALL), ssize_t{sizeof asked});
    const std::vector<char> junk(sizeof(keeper::AttachReply), 'j');
    EXPECT_EQ(write(client, junk.data(), junk.size()), static_cast<ssize_t>(junk.size()));
    close(client);
  });
  EXPECT_EQ(Open(Options(), &c), EVERSTEP_EINVAL);
  EXPECT_NE(Error(c).find("none of an Everstep keeper's"), std::string::npos) << Error(c);
  odd.join();
  close(fd);
}

}  // namespace
}  // namespace everstep
