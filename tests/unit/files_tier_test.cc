// The file tier over a disk that is full, broken, or loses its power at any operation.
#include "checkpoint/files/file_tier.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/unit/files_memory_disk.h"
#include "tests/unit/files_slot.h"

namespace everstep::checkpoint {
namespace {

constexpr char kDir[] = "/ckpt";
using State = FileCheckpoint::State;

void Save(FileTier* tier, Step step, Generation generation, std::int32_t world, unsigned seed = 1) {
  for (Rank rank = 0; rank < world; ++rank) {
    const HandSlot slot = MakeSlot("demo", step, generation, rank, world, seed);
    std::uint64_t written = 0;
    auto ok = tier->WriteShard(slot.content, &written);
    ASSERT_TRUE(ok.ok()) << ok.error().message;
    auto sealed = tier->Seal(step, generation, 5, "test");
    ASSERT_TRUE(sealed.ok()) << sealed.error().message;
    EXPECT_EQ(sealed.value(), rank == world - 1);
  }
}

// Every rank's payload, as it was captured; false: some is missing or damaged.
::testing::AssertionResult LoadsAs(FileTier* tier, const FileCheckpoint& c, unsigned seed) {
  if (c.state != State::kComplete) return ::testing::AssertionFailure() << c.why;
  for (const ManifestFile& f : c.manifest.ranks) {
    auto head = tier->ReadHead(c, f.rank);
    if (!head.ok()) return ::testing::AssertionFailure() << head.error().message;
    std::vector<unsigned char> payload(f.payload_bytes, 0xEE);
    auto ok = tier->ReadPayload(c, f.rank, head.value(), payload.data());
    if (!ok.ok()) return ::testing::AssertionFailure() << ok.error().message;
    const HandSlot slot =
        MakeSlot("demo", c.step, c.generation, f.rank, c.manifest.world_size, seed);
    if (payload != slot.payload) return ::testing::AssertionFailure() << "other bytes";
    if (head.value().crc_root != slot.content.crc_root) {
      return ::testing::AssertionFailure() << "another root";
    }
  }
  return ::testing::AssertionSuccess();
}

TEST(FileTier, WhatWasSavedIsListedVerifiedAndLoadedByteForByte) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  Save(&tier, 10, 1, 3);
  Save(&tier, 20, 2, 2, 9);
  auto list = tier.List();
  ASSERT_TRUE(list.ok());
  ASSERT_EQ(list.value().size(), 2u);
  EXPECT_EQ(list.value()[0].step, 20);
  EXPECT_EQ(list.value()[1].manifest.world_size, 3);
  EXPECT_TRUE(LoadsAs(&tier, list.value()[0], 9));
  EXPECT_TRUE(LoadsAs(&tier, list.value()[1], 1));
  EXPECT_TRUE(tier.Verify(list.value()[0]).empty());
}

TEST(FileTier, TheSameShardAgainWritesNothing) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  Save(&tier, 10, 1, 1);
  const HandSlot slot = MakeSlot("demo", 10, 1, 0, 1);
  std::uint64_t written = 1;
  ASSERT_TRUE(tier.WriteShard(slot.content, &written).ok());
  EXPECT_EQ(written, 0u);
}

TEST(FileTier, ASlotThatChangedUnderItIsNotWritten) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  HandSlot slot = MakeSlot("demo", 10, 1, 0, 1);
  slot.payload[100] ^= 1;
  std::uint64_t written = 0;
  auto ok = tier.WriteShard(slot.content, &written);
  ASSERT_FALSE(ok.ok());
  EXPECT_EQ(ok.error().code, ErrorCode::kCorrupt);
  EXPECT_FALSE(tier.List().ok());  // not even a directory
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kEachByte = 17;  // instrumented, all of them take minutes
#else
constexpr std::size_t kEachByte = 1;
#endif

TEST(FileTier, EachFlippedByteOfEachFileIsFoundAndNoneIsLoaded) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  Save(&tier, 10, 1, 1);
  const std::string folder = std::string(kDir) + "/" + CheckpointName(10, 1) + "/";
  for (const std::string& file : {folder + ShardFileName(0, 1), folder + "manifest.json"}) {
    std::string& data = disk.Data(file);
    for (std::size_t i = 0; i < data.size(); i += kEachByte) {
      data[i] = static_cast<char>(data[i] ^ 0x20);
      auto c = tier.Look(CheckpointName(10, 1));
      ASSERT_TRUE(c.ok());
      const auto found = tier.Verify(c.value());
      EXPECT_FALSE(found.empty()) << file << " byte " << i;
      EXPECT_FALSE(LoadsAs(&tier, c.value(), 1)) << file << " byte " << i;
      data[i] = static_cast<char>(data[i] ^ 0x20);
    }
  }
  EXPECT_TRUE(tier.Verify(tier.Look(CheckpointName(10, 1)).value()).empty());
}

TEST(FileTier, AFlippedByteIsNamedByItsTensor) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  Save(&tier, 10, 1, 1);
  const std::string path =
      std::string(kDir) + "/" + CheckpointName(10, 1) + "/" + ShardFileName(0, 1);
  disk.Data(path).back() = static_cast<char>(disk.Data(path).back() ^ 4);
  const auto c = tier.Look(CheckpointName(10, 1)).value();
  const auto found = tier.Verify(c);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].file, ShardFileName(0, 1));
  EXPECT_NE(found[0].what.find("tensor __everstep__.bytes."), std::string::npos) << found[0].what;
  std::vector<unsigned char> payload(c.manifest.ranks[0].payload_bytes);
  auto ok = tier.ReadPayload(c, 0, tier.ReadHead(c, 0).value(), payload.data());
  ASSERT_FALSE(ok.ok());
  EXPECT_EQ(ok.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(ok.error().message.find(path), std::string::npos);
}

// Given one good checkpoint, saving a second is cut off at each operation in turn. Then the first
// is there, the second is there whole or not at all, and saving again succeeds.
TEST(FileTier, APowerCutAtAnyOperationLeavesOldOrNewNeverATornOne) {
  int operations = 1;
  for (int at = 0; at < operations; ++at) {
    MemoryDisk disk;
    FileTier tier(&disk, kDir);
    Save(&tier, 10, 1, 2);
    disk.FailAt(at, MemoryDisk::Fault::kPowerCut, "Input/output error");
    for (Rank rank = 0; rank < 2; ++rank) {
      const HandSlot slot = MakeSlot("demo", 20, 1, rank, 2, 5);
      std::uint64_t written = 0;
      if (!tier.WriteShard(slot.content, &written).ok()) break;
      if (!tier.Seal(20, 1, 6, "test").ok()) break;
    }
    std::vector<std::string> removed;
    [[maybe_unused]] const auto pruned = tier.Prune(1, &removed);
    if (at == 0) {  // how many there are when nothing fails
      MemoryDisk whole;
      FileTier other(&whole, kDir);
      Save(&other, 10, 1, 2);
      whole.FailAt(-1, MemoryDisk::Fault::kPowerCut);
      Save(&other, 20, 1, 2, 5);
      ASSERT_TRUE(other.Prune(1, &removed).ok());
      operations = whole.operations();
      ASSERT_GT(operations, 20);
    }
    disk.PowerOn();
    auto list = tier.List();
    ASSERT_TRUE(list.ok()) << list.error().message;
    int good = 0;
    for (const FileCheckpoint& c : list.value()) {
      if (c.state != State::kComplete) continue;
      EXPECT_TRUE(LoadsAs(&tier, c, c.step == 10 ? 1 : 5)) << "operation " << at;
      ++good;
    }
    EXPECT_GE(good, 1) << "operation " << at;
    Save(&tier, 30, 2, 2, 5);
    ASSERT_TRUE(tier.Prune(1, &removed).ok());
    ASSERT_EQ(tier.List().value().size(), 1u) << "operation " << at;
    EXPECT_TRUE(LoadsAs(&tier, tier.List().value()[0], 5));
  }
}

// The same with one operation refused, as by a full disk: the error names it, the next try works.
TEST(FileTier, ARefusalAtAnyOperationIsNamedAndTheNextTrySucceeds) {
  for (int at = 0; at < 40; ++at) {
    MemoryDisk disk;
    FileTier tier(&disk, kDir);
    disk.FailAt(at, MemoryDisk::Fault::kRefuse);
    const HandSlot slot = MakeSlot("demo", 20, 1, 0, 1);
    std::uint64_t written = 0;
    auto ok = tier.WriteShard(slot.content, &written);
    auto sealed = ok.ok() ? tier.Seal(20, 1, 6, "test") : Result<bool>(ok.error());
    if (!sealed.ok()) {
      EXPECT_NE(sealed.error().message.find("No space left on device"), std::string::npos);
      EXPECT_NE(sealed.error().message.find(kDir), std::string::npos) << sealed.error().message;
    }
    Save(&tier, 20, 1, 1);
    EXPECT_TRUE(LoadsAs(&tier, tier.List().value().at(0), 1)) << "operation " << at;
  }
}

TEST(FileTier, PruneKeepsTheNewestAndNeverTheDamagedInstead) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  for (Step step = 1; step <= 4; ++step) Save(&tier, step, 1, 1);
  ASSERT_TRUE(tier.MarkDamaged(CheckpointName(4, 1), "a tensor fails its checksum").ok());
  std::vector<std::string> removed;
  ASSERT_TRUE(tier.Prune(2, &removed, /*dry_run=*/true).ok());
  EXPECT_EQ(removed, std::vector<std::string>{CheckpointName(1, 1)});
  ASSERT_TRUE(tier.Prune(1, &removed).ok());
  // 3 is the newest good one; 4 is newer than it and stays to be looked at.
  EXPECT_EQ(removed, (std::vector<std::string>{CheckpointName(2, 1), CheckpointName(1, 1)}));
  auto list = tier.List().value();
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0].state, State::kDamaged);
  EXPECT_EQ(list[0].why, "a tensor fails its checksum\n");
  EXPECT_TRUE(LoadsAs(&tier, list[1], 1));
}

TEST(FileTier, TheNewestVerifiedStaysAndWhatWasGivenUpDoesNotCount) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  for (Step step = 1; step <= 5; ++step) Save(&tier, step, 1, 1);
  ASSERT_TRUE(tier.MarkVerified(CheckpointName(1, 1)).ok());
  ASSERT_TRUE(tier.MarkVerified(CheckpointName(2, 1)).ok());
  ASSERT_TRUE(tier.MarkVerified(CheckpointName(2, 1)).ok()) << "twice is once";
  EXPECT_EQ(tier.MarkVerified(CheckpointName(9, 1)).error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(tier.MarkGivenUp(CheckpointName(5, 1), "rolled back to step 4").ok());
  const auto list = tier.List().value();
  EXPECT_EQ(list[0].state, State::kGivenUp);
  EXPECT_EQ(list[0].why, "rolled back to step 4\n");
  EXPECT_EQ(list[1].state, State::kComplete);
  EXPECT_TRUE(list[3].verified);
  std::vector<std::string> removed;
  ASSERT_TRUE(tier.Prune(1, &removed).ok());
  // 4 is the newest good one, 2 the newest verified; 5 is newer than 4 and goes with the next.
  EXPECT_EQ(removed, (std::vector<std::string>{CheckpointName(3, 1), CheckpointName(1, 1)}));
  Save(&tier, 6, 2, 1);
  ASSERT_TRUE(tier.Prune(1, &removed).ok());
  EXPECT_EQ(removed, (std::vector<std::string>{CheckpointName(5, 1), CheckpointName(4, 1)}));
}

TEST(FileTier, PruneRemovesNothingWhenNoneIsGood) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  for (Step step = 1; step <= 3; ++step) {
    Save(&tier, step, 1, 1);
    ASSERT_TRUE(tier.MarkDamaged(CheckpointName(step, 1), "bad").ok());
  }
  std::vector<std::string> removed;
  ASSERT_TRUE(tier.Prune(1, &removed).ok());
  EXPECT_TRUE(removed.empty());
}

TEST(FileTier, FilesOfTwoJobsInOneFolderAreRefusedByName) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  std::uint64_t written = 0;
  const HandSlot a = MakeSlot("one", 5, 1, 0, 2), b = MakeSlot("two", 5, 1, 1, 2);
  ASSERT_TRUE(tier.WriteShard(a.content, &written).ok());
  ASSERT_TRUE(tier.WriteShard(b.content, &written).ok());
  auto sealed = tier.Seal(5, 1, 6, "test");
  ASSERT_FALSE(sealed.ok());
  EXPECT_NE(sealed.error().message.find("two jobs"), std::string::npos) << sealed.error().message;
}

TEST(FileTier, AShardForAJobOfAnotherNameHasThatJobsRoot) {
  MemoryDisk disk;
  FileTier tier(&disk, kDir);
  Save(&tier, 10, 1, 1);
  const auto c = tier.List().value().at(0);
  auto head = tier.ReadHead(c, 0).value();
  Restamp("other", &head);
  EXPECT_EQ(head.fields.job_crc, Crc32c(std::string("other")));
  EXPECT_EQ(head.crc_root, MakeSlot("other", 10, 1, 0, 1).content.crc_root);
}

TEST(FileTier, OnARealDirectoryTooAndAReadOnlyOneIsNamed) {
  std::string dir = ::testing::TempDir() + "everstep_tier_XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);
  FileTier tier(PosixDisk(), dir + "/deep/ckpt");
  Save(&tier, 10, 1, 2);
  auto list = tier.List();
  ASSERT_TRUE(list.ok());
  EXPECT_TRUE(LoadsAs(&tier, list.value().at(0), 1));
  std::ofstream(dir + "/file") << "x";
  FileTier blocked(PosixDisk(), dir + "/file/ckpt");
  const HandSlot slot = MakeSlot("demo", 1, 1, 0, 1);
  std::uint64_t written = 0;
  auto ok = blocked.WriteShard(slot.content, &written);
  ASSERT_FALSE(ok.ok());
  EXPECT_NE(ok.error().message.find(dir + "/file/ckpt"), std::string::npos) << ok.error().message;
  std::filesystem::remove_all(dir);
}

TEST(CheckpointName, GoesBothWaysAndRefusesOthers) {
  Step step;
  Generation generation;
  EXPECT_TRUE(ParseCheckpointName(CheckpointName(1240, 7), &step, &generation));
  EXPECT_EQ(step, 1240);
  EXPECT_EQ(generation, 7u);
  for (const char* name :
       {"step-1.gen-1", "step-000000000001.gen-01", "step-000000000001", "step-00000000000a.gen-1",
        "step-000000000001.gen-", "x", "step-99999999999999999999.gen-1"}) {
    EXPECT_FALSE(ParseCheckpointName(name, &step, &generation)) << name;
  }
}

}  // namespace
}  // namespace everstep::checkpoint
