// SIGKILL of a trainer at random instants of its captures. After each: the newest whole slot is of
// the step that was being captured or of the one before, and its bits are those that the trainer
// wrote; the next trainer restores it and goes on.
//
//   EVERSTEP_KILLS=1000 capture_kill_test      (100 by default; EVERSTEP_SEED chooses the instants)
//
// Thrice: blocking captures, overlapped ones, whose late tensors change as soon as the library says
// that they may, and placed ones, which something else than the library copies into the slot.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>
#include <vector>

#include "proto/base/random.h"
#include "tests/integration/arena_host.h"
#include "worker/client/everstep.h"

namespace everstep {
namespace {

using std::chrono::steady_clock;

constexpr std::size_t kTensors = 9;
constexpr const char* kJob = "kill";

// What trainer and test share: how far the trainer is.
struct Progress {
  std::atomic<std::int64_t> begun;      // step whose capture has begun
  std::atomic<std::int64_t> published;  // newest whose commit call has returned
  std::atomic<std::int64_t> restored;   // -2: not yet; -1: fresh
  std::atomic<int> failed;              // a library call failed; its code
};

// Tensor `i` of step `n`: sizes from a few bytes to megabytes, every byte depends on the step.
std::size_t TensorSize(std::size_t i) {
  const std::size_t sizes[kTensors] = {4, 1 << 20, 777, 3'000'000, 64, 1, 500'000, 65'536, 12'345};
  return sizes[i];
}
void FillTensor(std::size_t i, std::int64_t step, std::vector<unsigned char>* out) {
  out->resize(TensorSize(i));
  Random random(static_cast<std::uint64_t>(step) * 131 + i);
  std::size_t at = 0;
  for (; at + 8 <= out->size(); at += 8) {
    const std::uint64_t v = random.Next();
    std::memcpy(out->data() + at, &v, 8);
  }
  for (; at < out->size(); ++at) (*out)[at] = static_cast<unsigned char>(random.Next());
}
std::uint64_t PayloadBound() {
  std::uint64_t bytes = 4096;
  for (std::size_t i = 0; i < kTensors; ++i) bytes += TensorSize(i) + 64;
  return bytes;
}

enum class Mode { kBlocking, kOverlapped, kPlaced };

// The trainer. Ends by SIGKILL, or by _exit with a code the test reports.
[[noreturn]] void Train(const std::string& keeper, Generation generation, Mode mode,
                        Progress* progress) {
  everstep_options options{};
  options.size = sizeof options;
  options.world_size = 1;
  options.generation = generation;
  options.job = kJob;
  options.keeper = keeper.c_str();
  options.commit_wait_ms = 10'000;  // a busy machine is no reason to replace a step
  everstep_client* client = nullptr;
  const auto must = [&](int code) {
    if (code >= 0) return code;
    progress->failed = code;
    const char* text = everstep_last_error(client);
    [[maybe_unused]] const ssize_t n = write(2, text, std::strlen(text));
    _exit(3);
  };
  must(everstep_open(&options, &client));
  everstep_slot slot{};
  slot.size = sizeof slot;
  const bool found = must(everstep_restore(client, 20'000, &slot)) == EVERSTEP_OK;
  std::int64_t step = found ? slot.step + 1 : 0;
  progress->restored = found ? slot.step : -1;
  std::vector<unsigned char> tensors[kTensors];
  for (;; ++step) {
    everstep_piece pieces[kTensors];
    for (std::size_t i = 0; i < kTensors; ++i) {
      FillTensor(i, step, &tensors[i]);
      pieces[i] = {tensors[i].data(), tensors[i].size()};
    }
    progress->begun = step;
    if (must(everstep_capture_begin(client, step, PayloadBound(), EVERSTEP_REPLICATED_LAYOUT)) ==
        EVERSTEP_SKIPPED) {
      continue;
    }
    std::string table = "step " + std::to_string(step);
    if (mode == Mode::kPlaced) {
      everstep_piece placed[kTensors];
      for (std::size_t i = 0; i < kTensors; ++i) placed[i] = {nullptr, pieces[i].bytes};
      std::uint64_t offsets[kTensors];
      void* to = nullptr;
      must(everstep_capture_place(client, placed, kTensors, nullptr, offsets, &to));
      for (std::size_t i = kTensors; i-- > 0;) {
        std::memcpy(static_cast<char*>(to) + offsets[i], pieces[i].data, pieces[i].bytes);
      }
      const everstep_piece whole{nullptr, offsets[kTensors - 1] + pieces[kTensors - 1].bytes};
      must(everstep_capture_write(client, &whole, 1, nullptr));
      must(everstep_capture_commit(client, table.data(), table.size()));
    } else if (mode == Mode::kOverlapped) {
      constexpr std::uint32_t kLate = 6;
      must(everstep_capture_start(client, pieces, kLate, pieces + kLate, kTensors - kLate,
                                  table.data(), table.size(), nullptr));
      // The early ones and the table are the trainer's again.
      for (std::size_t i = kLate; i < kTensors; ++i) FillTensor(i, step + 7, &tensors[i]);
      table.assign(table.size(), '?');
      while (everstep_capture_wait(client, 1) == EVERSTEP_ETIMEDOUT) {
      }
      for (std::size_t i = 0; i < kLate; ++i) FillTensor(i, step + 9, &tensors[i]);
      must(everstep_capture_publish(client));
    } else {
      must(everstep_capture_write(client, pieces, kTensors, nullptr));
      must(everstep_capture_commit(client, table.data(), table.size()));
    }
    progress->published = step;
  }
}

// The agent and the controller of a world of one: whatever is captured is committed.
class Commits final : public checkpoint::Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId& job, const HeldShard& shard) override {
    if (auto* s = service.load(); s != nullptr) s->MarkCommitted(job, shard.generation, shard.step);
  }
  void OnTrouble(const JobId&, const std::string& what) override { ADD_FAILURE() << what; }
  std::atomic<checkpoint::TransferService*> service{nullptr};
};

::testing::AssertionResult IsExactly(checkpoint::Arena* arena, const checkpoint::SlotView& view) {
  if (auto ok = arena->Verify(view); !ok.ok())
    return ::testing::AssertionFailure() << ok.error().message;
  const unsigned char* payload = arena->Payload(view);
  std::uint64_t at = 0;
  std::vector<unsigned char> expected;
  for (std::size_t i = 0; i < kTensors; ++i) {
    at = checkpoint::RoundUp(at, checkpoint::kTensorAlignment);
    FillTensor(i, view.step(), &expected);
    if (std::memcmp(payload + at, expected.data(), expected.size()) != 0) {
      return ::testing::AssertionFailure()
             << "tensor " << i << " of step " << view.step() << " has other bits";
    }
    at += expected.size();
  }
  const std::string table(reinterpret_cast<const char*>(payload) + view.fields.table_offset,
                          view.fields.table_bytes);
  if (table != "step " + std::to_string(view.step()))
    return ::testing::AssertionFailure() << "table: " << table;
  return ::testing::AssertionSuccess();
}

class CaptureKill : public ::testing::TestWithParam<Mode> {};

TEST_P(CaptureKill, LeavesTheStepBeforeOrTheStepItselfEveryTime) {
  const char* given =
      std::getenv("EVERSTEP_KILLS");  // NOLINT(concurrency-mt-unsafe): one thread yet
  const int kills = given != nullptr ? std::atoi(given) : 100;
  const char* seed = std::getenv("EVERSTEP_SEED");  // NOLINT(concurrency-mt-unsafe): one thread yet
  Random random(seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1);

  char folder[] = "/tmp/everstep-kill-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  const std::string keeper = std::string(folder) + "/keeper.sock";
  auto* progress = static_cast<Progress*>(
      mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(progress, MAP_FAILED);
  testing::ArenaHost host(keeper);
  ASSERT_TRUE(host.ok()) << keeper;
  Commits commits;
  auto service = checkpoint::TransferService::Start({}, &host, &commits);
  ASSERT_TRUE(service.ok()) << service.error().message;
  commits.service = service.value().get();

  int torn = 0, same = 0, before = 0;
  std::int64_t last = -1;  // what the next trainer must restore
  for (int i = 0; i < kills && !HasFailure(); ++i) {
    const auto generation = static_cast<Generation>(i) + 1;
    service.value()->Begin(kJob, generation, "key");
    checkpoint::Part part{.job = kJob,
                          .generation = generation,
                          .world_size = 1,
                          .data_key = "key",
                          .workers = {{.rank = 0}},
                          .peers = {}};
    for (const HeldShard& s : service.value()->Survey(kJob)) {
      if (s.step != last) continue;
      part.workers[0].restore = {.step = s.step,
                                 .shard_rank = 0,
                                 .shard_generation = s.generation,
                                 .crc_root = s.crc_root,
                                 .bytes = s.bytes};
    }
    ASSERT_EQ(part.workers[0].restore.step, last)
        << "kill " << i << ": the survey lacks the newest whole step";
    std::string error;
    ASSERT_TRUE(service.value()->Activate(part, &error)) << error;

    progress->begun = -1;
    progress->published = last;
    progress->restored = -2;
    progress->failed = 0;
    const pid_t pid = fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) Train(keeper, generation, GetParam(), progress);

    // Some captures, then somewhere inside one: a capture takes a millisecond or two here.
    const std::int64_t target = last + 1 + static_cast<std::int64_t>(random.Below(4));
    const auto deadline = steady_clock::now() + std::chrono::seconds(30);
    while (progress->begun < target && progress->failed == 0 && steady_clock::now() < deadline) {
    }
    const auto until = steady_clock::now() + std::chrono::microseconds(random.Below(1200));
    while (steady_clock::now() < until) {
    }
    ASSERT_EQ(kill(pid, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the trainer ended by itself with " << WEXITSTATUS(status)
                                     << ", error " << progress->failed;
    ASSERT_EQ(progress->restored, last) << "kill " << i;

    auto fds = host.Open(kJob, {0, false}, 0);
    ASSERT_TRUE(fds.ok());
    close(fds.value().eventfd);
    auto arena = checkpoint::Arena::Open(fds.value().memfd);
    ASSERT_TRUE(arena.ok());
    const auto newest = arena.value().Newest();
    ASSERT_TRUE(newest) << "kill " << i << ": no whole slot is left";
    EXPECT_TRUE(IsExactly(&arena.value(), *newest)) << "kill " << i;
    EXPECT_GE(newest->step(), progress->published) << "kill " << i << ": a published step is gone";
    EXPECT_LE(newest->step(), progress->begun) << "kill " << i;
    EXPECT_GE(newest->step(), progress->begun - 1)
        << "kill " << i << ": more than one step is lost";
    for (std::uint32_t s = 0; s < checkpoint::kSlots; ++s) {
      const auto view = arena.value().Look(s);
      if (!view) ++torn;
      if (view && s != newest->slot) {
        EXPECT_TRUE(IsExactly(&arena.value(), *view)) << "kill " << i;
      }
    }
    ++(newest->step() == progress->begun ? same : before);
    last = newest->step();
  }
  std::printf("%d kills: %d left the step itself, %d the step before; %d found a slot torn\n",
              kills, same, before, torn);
  EXPECT_GT(torn, kills / 20) << "the kills missed the captures; nothing was shown";
  commits.service = nullptr;
  service.value()->Stop();
  munmap(progress, 4096);
  std::filesystem::remove_all(folder);
}

std::string NameOf(const ::testing::TestParamInfo<Mode>& mode) {
  switch (mode.param) {
    case Mode::kBlocking: return "blocking";
    case Mode::kOverlapped: return "overlapped";
    case Mode::kPlaced: return "placed";
  }
  return "unknown";
}

INSTANTIATE_TEST_SUITE_P(Modes, CaptureKill,
                         ::testing::Values(Mode::kBlocking, Mode::kOverlapped, Mode::kPlaced),
                         NameOf);

}  // namespace
}  // namespace everstep
