// A restore from files against the generation that follows it.
#include "worker/agent/file_plane.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include <gtest/gtest.h>

#include "checkpoint/store/slot_writer.h"
#include "tests/unit/files_memory_disk.h"
#include "tests/unit/files_slot.h"
#include "tests/unit/memory_host.h"

namespace everstep::agent {
namespace {

namespace cp = everstep::checkpoint;
using std::chrono::milliseconds;

constexpr char kDir[] = "/ckpt";
constexpr std::uint64_t kBytes = 5u << 20;

// Holds the first read of a whole MiB, as a network file system that does not answer.
class HeldDisk final : public cp::Disk {
 public:
  explicit HeldDisk(cp::Disk* real) : real_(real) {}
  cp::Outcome MakeDirectory(const std::string& path) override { return real_->MakeDirectory(path); }
  cp::Result<std::unique_ptr<cp::DiskWriter>> Create(const std::string& path) override {
    return real_->Create(path);
  }
  cp::Result<std::unique_ptr<cp::DiskReader>> Open(const std::string& path) override {
    auto reader = real_->Open(path);
    if (!reader.ok()) return reader.error();
    return std::unique_ptr<cp::DiskReader>(
        std::make_unique<Reader>(this, std::move(reader.value())));
  }
  cp::Outcome Rename(const std::string& from, const std::string& to) override {
    return real_->Rename(from, to);
  }
  cp::Outcome Remove(const std::string& path) override { return real_->Remove(path); }
  cp::Outcome SyncDirectory(const std::string& path) override { return real_->SyncDirectory(path); }
  cp::Result<std::vector<std::string>> List(const std::string& path) override {
    return real_->List(path);
  }

  void Hold() {
    std::lock_guard<std::mutex> lock(mutex_);
    hold_ = true;
  }
  void Release() {
    std::lock_guard<std::mutex> lock(mutex_);
    hold_ = false;
    changed_.notify_all();
  }
  bool AwaitHeld() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30), [this] { return held_; });
  }
  int whole_reads() {
    std::lock_guard<std::mutex> lock(mutex_);
    return reads_;
  }

 private:
  class Reader final : public cp::DiskReader {
   public:
    Reader(HeldDisk* disk, std::unique_ptr<cp::DiskReader> real)
        : disk_(disk), real_(std::move(real)) {}
    std::uint64_t bytes() const override { return real_->bytes(); }
    cp::Outcome Read(std::uint64_t offset, void* to, std::uint64_t size) override {
      if (size == cp::kChunkBytes) disk_->Wait();
      return real_->Read(offset, to, size);
    }

   private:
    HeldDisk* const disk_;
    std::unique_ptr<cp::DiskReader> real_;
  };
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++reads_;
    held_ = hold_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !hold_; });
  }

  cp::Disk* const real_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool hold_ = false;
  bool held_ = false;
  int reads_ = 0;
};

class FilePlaneTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const cp::HandSlot slot = cp::MakeSlot("job", 10, 1, 0, 1, 1, kBytes);
    cp::FileTier tier(&memory_, kDir);
    std::uint64_t written = 0;
    ASSERT_TRUE(tier.WriteShard(slot.content, &written).ok());
    ASSERT_TRUE(tier.Seal(10, 1, 5, "test").ok());
    root_ = slot.content.crc_root;
    bytes_ = slot.content.fields.payload_bytes;
  }
  Activate Part(Generation generation) const {
    Activate a;
    a.job = "job";
    a.generation = generation;
    WorkerPlan worker;
    worker.restore = {.step = 10,
                      .shard_rank = 0,
                      .shard_generation = 1,
                      .crc_root = root_,
                      .bytes = bytes_,
                      .source_node = "",
                      .source_address = "",
                      .file = true};
    a.plan.workers.push_back(worker);
    return a;
  }
  bool Restored() {
    auto fds = host_.Open("job", {.rank = 0, .replica = false}, 0);
    if (!fds.ok()) return false;
    close(fds.value().eventfd);
    auto arena = cp::Arena::Open(fds.value().memfd, nullptr);
    if (!arena.ok()) return false;
    for (std::uint32_t i = 0; i < cp::kSlots; ++i) {
      const auto view = arena.value().Look(i);
      if (view && view->step() == 10 && arena.value().Verify(*view).ok()) return true;
    }
    return false;
  }

  cp::MemoryDisk memory_;
  HeldDisk disk_{&memory_};
  cp::MemoryHost host_;
  FilePlane plane_{&disk_, &host_};
  std::uint32_t root_ = 0;
  std::uint64_t bytes_ = 0;
};

TEST_F(FilePlaneTest, BringsAStepIntoTheArena) {
  std::string error;
  plane_.Begin("job", 2);
  EXPECT_TRUE(plane_.Load({kDir, 0}, Part(2), &error)) << error;
  EXPECT_TRUE(Restored());
  EXPECT_GE(disk_.whole_reads(), 4);
}

// Rank 2 was restored in place from rank 1's shard, and this node holds no other copy of it.
TEST_F(FilePlaneTest, CopiesAShardThatLiesInAnotherRanksOwnArena) {
  auto fds = host_.Open("job", {.rank = 2, .replica = false}, kBytes);
  ASSERT_TRUE(fds.ok());
  close(fds.value().eventfd);
  auto arena = cp::Arena::Open(fds.value().memfd);
  ASSERT_TRUE(arena.ok());
  const std::vector<unsigned char> state(kBytes, 7);
  auto writer = cp::SlotWriter::Begin(&arena.value(), 0, state.size());
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer.value().Append(state.data(), state.size()).ok());
  const auto view =
      writer.value().Finish({.generation = 1, .step = 10, .rank = 1, .world_size = 4}, 0);
  ASSERT_TRUE(view.ok());
  std::vector<SlotCopy> copies;
  std::string error;
  ASSERT_TRUE(plane_.Copy("job", 1, 10, {1}, &copies, &error)) << error;
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].content.fields.rank, 1);
  EXPECT_EQ(copies[0].content.crc_root, view.value().crc_root);
  EXPECT_EQ(std::memcmp(copies[0].content.payload, state.data(), state.size()), 0);
  EXPECT_FALSE(plane_.Copy("job", 1, 10, {3}, &copies, &error));
  EXPECT_NE(error.find("step 10 of rank 3 is not in this node's memory"), std::string::npos);
}

TEST_F(FilePlaneTest, EndsWithItsGenerationAndTheNextOneWaitsForItsEnd) {
  disk_.Hold();
  plane_.Begin("job", 2);
  std::string error;
  bool loaded = true;
  std::thread load([&] { loaded = plane_.Load({kDir, 0}, Part(2), &error); });
  ASSERT_TRUE(disk_.AwaitHeld());
  plane_.Begin("job", 3);
  std::string why;
  EXPECT_FALSE(plane_.AwaitEarlier("job", 3, milliseconds(20), &why));
  EXPECT_NE(why.find("20 ms"), std::string::npos) << why;
  EXPECT_TRUE(plane_.AwaitEarlier("other", 3, milliseconds(0), &why)) << "it is not of that job";
  disk_.Release();
  EXPECT_TRUE(plane_.AwaitEarlier("job", 3, milliseconds(30'000), &why)) << why;
  load.join();
  EXPECT_FALSE(loaded);
  EXPECT_NE(error.find("given up"), std::string::npos) << error;
  EXPECT_EQ(disk_.whole_reads(), 1) << "it read on after its generation was over";
  EXPECT_FALSE(Restored());
  EXPECT_TRUE(plane_.Load({kDir, 0}, Part(3), &error)) << error << ": the files are as good";
}

TEST_F(FilePlaneTest, OneThatComesAfterItsGenerationDoesNotBegin) {
  plane_.Begin("job", 3);
  std::string error;
  EXPECT_FALSE(plane_.Load({kDir, 0}, Part(2), &error));
  EXPECT_EQ(disk_.whole_reads(), 0);
  plane_.Forget("job");
  EXPECT_TRUE(plane_.Load({kDir, 0}, Part(2), &error)) << error;
}

}  // namespace
}  // namespace everstep::agent
