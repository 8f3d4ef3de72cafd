// One arena, two slots: what is whole stays whole, what is torn is never chosen.
#include "checkpoint/store/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "checkpoint/store/memory_limit.h"
#include "checkpoint/store/mend.h"
#include "checkpoint/store/slot_writer.h"
#include "proto/base/crc32c.h"
#include "proto/base/random.h"

namespace everstep::checkpoint {
namespace {

Arena MakeArena(std::uint64_t slot_bytes) {
  auto fd = CreateArenaFd({.job = "demo", .rank = 2, .replica = false, .slot_bytes = slot_bytes});
  EXPECT_TRUE(fd.ok()) << fd.error().message;
  auto arena = Arena::Open(fd.value());
  EXPECT_TRUE(arena.ok()) << arena.error().message;
  return std::move(arena.value());
}
Arena Again(const Arena& arena) {  // as another process maps it
  auto other = Arena::Open(fcntl(arena.fd(), F_DUPFD_CLOEXEC, 0));
  EXPECT_TRUE(other.ok());
  return std::move(other.value());
}

std::vector<unsigned char> BytesOf(Step step, std::size_t size) {
  Random random(static_cast<std::uint64_t>(step) + 1);
  std::vector<unsigned char> out(size);
  for (auto& b : out) b = static_cast<unsigned char>(random.Next() >> 24);
  return out;
}
SlotFields Fields(Step step, Generation generation = 1) {
  return {.generation = generation, .step = step, .rank = 2, .world_size = 4};
}

// Writes the bytes in pieces of odd sizes; the last 10 are the "table".
SlotView Write(Arena* arena, std::uint32_t slot, Step step, std::size_t size) {
  auto writer = SlotWriter::Begin(arena, slot, size);
  EXPECT_TRUE(writer.ok()) << writer.error().message;
  const auto bytes = BytesOf(step, size);
  std::size_t at = 0, piece = 1;
  while (at < size) {
    const std::size_t n = std::min(piece, size - at);
    EXPECT_TRUE(writer.value().Append(bytes.data() + at, n).ok());
    at += n;
    piece = piece * 3 + 1;
  }
  auto view = writer.value().Finish(Fields(step), std::min<std::size_t>(10, size));
  EXPECT_TRUE(view.ok()) << view.error().message;
  return view.value();
}

TEST(Arena, HoldsWhatWasWrittenBitForBit) {
  for (std::size_t size : {std::size_t{1}, std::size_t{4096}, std::size_t{1} << 20,
                           (std::size_t{1} << 20) + 1, std::size_t{3'333'333}}) {
    Arena arena = MakeArena(size);
    Write(&arena, 0, 7, size);
    Arena reader = Again(arena);
    const auto view = reader.Newest();
    ASSERT_TRUE(view);
    EXPECT_EQ(view->step(), 7);
    EXPECT_EQ(view->fields.payload_bytes, size);
    const auto ok = reader.Verify(*view);
    EXPECT_TRUE(ok.ok()) << ok.error().message;
    const auto expected = BytesOf(7, size);
    EXPECT_EQ(std::memcmp(reader.Payload(*view), expected.data(), size), 0);
  }
}

TEST(Arena, FillsUpToItsLastByteAndRefusesOneMore) {
  const std::uint64_t capacity = ExtentCapacity(ExtentBytes(5000));
  Arena arena = MakeArena(5000);
  Write(&arena, 1, 3, capacity);
  EXPECT_TRUE(arena.Verify(*arena.Newest()).ok());
  auto writer = SlotWriter::Begin(&arena, 0, 5000);
  ASSERT_TRUE(writer.ok());
  const auto bytes = BytesOf(0, capacity + 1);
  const auto refused = writer.value().Append(bytes.data(), bytes.size());
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalid);
  EXPECT_NE(refused.error().message.find("do not fit"), std::string::npos);
}

TEST(Arena, ATornSlotIsNeverChosen) {
  Arena arena = MakeArena(1 << 16);
  Write(&arena, 0, 10, 1 << 16);
  Write(&arena, 1, 11, 1 << 16);
  EXPECT_EQ(arena.Newest()->step(), 11);
  {
    auto writer = SlotWriter::Begin(&arena, 1, 1 << 16);
    ASSERT_TRUE(writer.ok());
    EXPECT_FALSE(arena.Look(1));
    EXPECT_EQ(arena.Newest()->step(), 10);
  }  // its writer is gone: still torn
  EXPECT_FALSE(Again(arena).Look(1));
  Write(&arena, 1, 12, 1 << 16);
  EXPECT_EQ(arena.Newest()->step(), 12);
  EXPECT_EQ(arena.Newest(11)->step(), 10);
  EXPECT_FALSE(arena.Newest(9));
}

TEST(Arena, AnOldViewIsNotCurrentAfterTheSlotWasWrittenAgain) {
  Arena arena = MakeArena(1 << 12);
  const SlotView old = Write(&arena, 0, 1, 1 << 12);
  EXPECT_TRUE(arena.Current(old));
  Write(&arena, 0, 2, 1 << 12);
  EXPECT_FALSE(arena.Current(old));
  const auto stale = arena.Verify(old);
  ASSERT_FALSE(stale.ok());
  EXPECT_EQ(stale.error().code, ErrorCode::kStale);
}

TEST(Arena, AFlippedBitAnywhereIsFoundAndNamed) {
  const std::size_t size = (2u << 20) + 777;
  Arena arena = MakeArena(size);
  Write(&arena, 0, 5, size);
  const SlotView view = *arena.Newest();
  auto* payload = const_cast<unsigned char*>(arena.Payload(view));
  for (std::size_t at : {std::size_t{0}, std::size_t{1} << 20, size - 1}) {
    payload[at] ^= 0x10;
    const auto bad = arena.Verify(view);
    ASSERT_FALSE(bad.ok());
    EXPECT_EQ(bad.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(bad.error().message.find("chunk " + std::to_string(at >> 20)), std::string::npos)
        << bad.error().message;
    payload[at] ^= 0x10;
  }
  EXPECT_TRUE(arena.Verify(view).ok());
  const_cast<std::uint32_t*>(arena.ChunkCrcs(view))[1] ^= 1;
  EXPECT_FALSE(arena.Verify(view).ok());
  const_cast<std::uint32_t*>(arena.ChunkCrcs(view))[1] ^= 1;
  arena.header()->slot[0].fields.step = 6;
  EXPECT_FALSE(arena.Verify(*arena.Newest()).ok()) << "a changed header passed";
}

TEST(Arena, LoadsRangesAcrossChunksWhileItChecksThem) {
  const std::size_t size = (3u << 20) + 777;
  Arena arena = MakeArena(size);
  const SlotView view = Write(&arena, 0, 5, size);
  const auto bytes = BytesOf(5, size);
  std::vector<unsigned char> loaded(size, 0), expected(size, 0);
  // The first byte, nothing, one inside a chunk, one over two borders, one that follows at once.
  const std::pair<std::size_t, std::size_t> ranges[] = {
      {0, 1}, {5, 0}, {100, 70'001}, {1'000'000, 2'100'000}, {3'100'000, size - 3'100'000}};
  std::vector<LoadTarget> targets;
  for (const auto& [at, n] : ranges) {
    targets.push_back({at, n, loaded.data() + at});
    std::memcpy(expected.data() + at, bytes.data() + at, n);
  }
  for (unsigned threads : {1u, 3u}) {
    std::fill(loaded.begin(), loaded.end(), 0);
    const auto ok = arena.Load(view, targets, threads);
    ASSERT_TRUE(ok.ok()) << ok.error().message;
    EXPECT_TRUE(loaded == expected);
  }
  auto* payload = const_cast<unsigned char*>(arena.Payload(view));
  for (std::size_t at : {std::size_t{50}, std::size_t{2'000'000}}) {  // between targets, inside one
    payload[at] ^= 1;
    const auto bad = arena.Load(view, targets, 2);
    ASSERT_FALSE(bad.ok());
    EXPECT_EQ(bad.error().code, ErrorCode::kCorrupt);
    EXPECT_TRUE(arena.VerifyRange(view, 3 << 20, 777).ok()) << "it is in another chunk";
    EXPECT_FALSE(arena.VerifyRange(view, at - at % 100, 100).ok());
    payload[at] ^= 1;
  }
  const LoadTarget wrong[][2] = {{{10, 10, loaded.data()}, {19, 10, loaded.data()}},
                                 {{0, 1, loaded.data()}, {size, 1, loaded.data()}},
                                 {{0, 1, loaded.data()}, {5, ~std::uint64_t{0}, loaded.data()}}};
  for (const auto& pair : wrong) {
    const auto refused = arena.Load(view, pair, 1);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, ErrorCode::kInvalid);
  }
  EXPECT_EQ(arena.VerifyRange(view, size, 1).error().code, ErrorCode::kInvalid);
  EXPECT_TRUE(arena.VerifyRange(view, size, 0).ok());
}

TEST(Arena, GrowsInPlaceAndKeepsTheOtherSlot) {
  Arena arena = MakeArena(0);
  EXPECT_FALSE(arena.Newest());
  Write(&arena, 0, 1, 1000);
  Arena reader = Again(arena);
  EXPECT_TRUE(reader.Verify(*reader.Newest()).ok());
  Write(&arena, 1, 2, 3 << 20);  // larger: a new extent
  EXPECT_TRUE(reader.Verify(*reader.Look(0)).ok()) << "the smaller slot was lost";
  EXPECT_TRUE(reader.Verify(*reader.Look(1)).ok());
  Write(&arena, 0, 3, 5 << 20);
  EXPECT_EQ(reader.Newest()->step(), 3);
  EXPECT_TRUE(reader.Verify(*reader.Look(0)).ok()) << "a mapping of the old extent was used";
  EXPECT_TRUE(reader.Verify(*reader.Look(1)).ok());
}

TEST(Arena, GrowingGivesTheOldMemoryBack) {
  Arena arena = MakeArena(8 << 20);
  for (std::uint32_t slot : {0u, 1u}) ASSERT_TRUE(SlotWriter::Reserve(&arena, slot, 8 << 20).ok());
  for (std::uint32_t slot : {0u, 1u}) ASSERT_TRUE(SlotWriter::Reserve(&arena, slot, 12 << 20).ok());
  struct stat st {};
  ASSERT_EQ(fstat(arena.fd(), &st), 0);
  EXPECT_LT(st.st_blocks * 512, (25 << 20)) << "old extents still hold memory";
}

TEST(Arena, ReserveTakesTheMemoryOnceAndKeepsContent) {
  Arena arena = MakeArena(4 << 20);
  struct stat st {};
  ASSERT_EQ(fstat(arena.fd(), &st), 0);
  EXPECT_LT(st.st_blocks * 512, 1 << 20) << "memory was taken before anyone asked";
  Write(&arena, 0, 1, 4 << 20);
  ASSERT_TRUE(SlotWriter::Reserve(&arena, 0, 4 << 20).ok());
  ASSERT_TRUE(SlotWriter::Reserve(&arena, 1, 4 << 20).ok());
  ASSERT_EQ(fstat(arena.fd(), &st), 0);
  EXPECT_GE(st.st_blocks * 512, 8 << 20);
  EXPECT_LT(st.st_blocks * 512, (8 << 20) * 103 / 100) << "more than slots times bytes plus 3 %";
  EXPECT_TRUE(arena.Verify(*arena.Newest()).ok());
}

TEST(Arena, TouchByChunkTakesAllMemoryAtOnceAndMapsItChunkByChunk) {
  const std::size_t size = (3u << 20) + 50;
  Arena source = MakeArena(size);
  const SlotView sent = Write(&source, 0, 9, size);
  Arena sink = MakeArena(size);
  ASSERT_TRUE(SlotWriter::Reserve(&sink, 0, size, Touch::kByChunk).ok());
  struct stat st {};
  ASSERT_EQ(fstat(sink.fd(), &st), 0);
  EXPECT_GE(st.st_blocks * 512, static_cast<off_t>(size)) << "a chunk may find no memory";
  auto writer = SlotWriter::Begin(&sink, 0, size, Touch::kByChunk);
  ASSERT_TRUE(writer.ok()) << writer.error().message;
  for (std::uint64_t i = 0; i < sent.chunks(); ++i) {
    unsigned char here[(kChunkBytes + kPageBytes) / kPageBytes] = {};
    writer.value().TouchChunk(i);
    const std::uint64_t pages = (sent.chunk_size(i) + kPageBytes - 1) / kPageBytes;
    ASSERT_EQ(mincore(writer.value().Chunk(i), pages * kPageBytes, here), 0);
    EXPECT_EQ(std::count(here, here + pages, 0), 0) << "chunk " << i;
    std::memcpy(writer.value().Chunk(i), source.Payload(sent) + i * kChunkBytes,
                sent.chunk_size(i));
    writer.value().SetChunkCrc(i, source.ChunkCrcs(sent)[i]);
  }
  ASSERT_TRUE(writer.value().Publish(sent.fields, sent.crc_root).ok());
  EXPECT_TRUE(sink.Verify(*sink.Newest()).ok());
  struct stat after {};
  ASSERT_EQ(fstat(sink.fd(), &after), 0);
  EXPECT_EQ(after.st_blocks, st.st_blocks) << "filling it took more memory than was reserved";
}

// Bytes come by Write where pages lack, by Chunk where TakeChunk was asked; a slot that has its
// memory needs neither.
TEST(Arena, TouchByWriteTakesMemoryAsItIsFilled) {
  const std::size_t size = (3u << 20) + 50;
  Arena source = MakeArena(size);
  const SlotView sent = Write(&source, 0, 9, size);
  const unsigned char* bytes = source.Payload(sent);
  const auto blocks = [](const Arena& arena) {
    struct stat st {};
    EXPECT_EQ(fstat(arena.fd(), &st), 0);
    return st.st_blocks * 512;
  };
  Arena sink = MakeArena(size);
  for (const bool fresh : {true, false}) {
    Arena here = Again(sink);
    auto begun = SlotWriter::Begin(&here, 0, size, Touch::kByWrite);
    ASSERT_TRUE(begun.ok()) << begun.error().message;
    SlotWriter& writer = begun.value();
    EXPECT_EQ(writer.fresh(), fresh);
    if (fresh) {
      EXPECT_LT(blocks(sink), 1 << 20) << "nothing was written yet";
    }
    ASSERT_TRUE(writer.Write(0, bytes, (1 << 20) + 77).ok());  // ends within a page
    ASSERT_TRUE(writer.TakeChunk(1).ok());
    std::memcpy(writer.Chunk(1) + 77, bytes + (1 << 20) + 77, (1 << 20) - 77);
    ASSERT_TRUE(writer.Write(2 << 20, bytes + (2 << 20), size - (2 << 20)).ok());
    for (std::uint64_t i = 0; i < sent.chunks(); ++i) {
      writer.SetChunkCrc(i, source.ChunkCrcs(sent)[i]);
    }
    ASSERT_TRUE(writer.Publish(sent.fields, sent.crc_root).ok());
    EXPECT_TRUE(here.Verify(*here.Look(0)).ok());
    EXPECT_GE(blocks(sink), static_cast<off_t>(size)) << "bytes without memory";
  }
}

TEST(Arena, AHoleInASlotIsFilledEvenWhenTheOtherSlotIsWhole) {
  Arena arena = MakeArena(4 << 20);
  for (std::uint32_t slot : {0u, 1u}) ASSERT_TRUE(SlotWriter::Reserve(&arena, slot, 4 << 20).ok());
  struct stat full {};
  ASSERT_EQ(fstat(arena.fd(), &full), 0);
  const SlotHeader& h = arena.header()->slot[1];
  const auto hole = static_cast<off_t>(h.extent_offset + (1 << 20));
  ASSERT_EQ(fallocate(arena.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, hole, kPageBytes), 0);
  for (const Touch touch : {Touch::kByChunk, Touch::kNow}) {
    Arena other = Again(arena);
    ASSERT_TRUE(SlotWriter::Reserve(&other, 1, 4 << 20, touch).ok());
    struct stat st {};
    ASSERT_EQ(fstat(arena.fd(), &st), 0);
    EXPECT_EQ(st.st_blocks, full.st_blocks);
    ASSERT_EQ(fallocate(arena.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, hole, kPageBytes),
              0);
  }
}

TEST(Arena, AShareGivesBackTheMemoryThatTheWholeStateHad) {
  Arena arena = MakeArena(1 << 16);
  constexpr std::size_t kWhole = 8u << 20, kPart = 3u << 20;
  Write(&arena, 1, 6, 1 << 16);
  const std::uint64_t other = arena.Look(1)->extent_bytes;
  Write(&arena, 0, 7, kWhole);
  Arena reader = Again(arena);
  ASSERT_TRUE(reader.Verify(*reader.Look(0)).ok());
  SlotWriter::Trim(&arena, 0, kWhole / 4 * 3);  // not worth it
  EXPECT_TRUE(arena.Look(0));
  struct stat before {};
  struct stat after {};
  ASSERT_EQ(fstat(arena.fd(), &before), 0);
  SlotWriter::Trim(&arena, 0, kPart);
  EXPECT_FALSE(arena.Look(0)) << "what lies in memory that was given back is no content";
  ASSERT_EQ(fstat(arena.fd(), &after), 0);
  EXPECT_GE((before.st_blocks - after.st_blocks) * 512, static_cast<long>(kWhole - kPart) * 9 / 10);
  Write(&arena, 0, 8, kPart);
  EXPECT_TRUE(reader.Verify(*reader.Look(0)).ok());
  EXPECT_LT(reader.Look(0)->extent_bytes, kWhole / 2);
  EXPECT_EQ(arena.Look(1)->extent_bytes, other);
  EXPECT_TRUE(arena.Verify(*arena.Look(1)).ok());
  Write(&arena, 0, 9, kWhole);  // and back, for the next restore
  EXPECT_TRUE(reader.Verify(*reader.Look(0)).ok());
}

TEST(Arena, ChunksFromAPeerArePublishedOnlyWhenTheRootAgrees) {
  const std::size_t size = (1u << 20) + 50;
  Arena source = MakeArena(size);
  const SlotView sent = Write(&source, 0, 9, size);
  Arena sink = MakeArena(0);
  const auto fill = [&](std::uint32_t spoil) {
    auto writer = SlotWriter::Begin(&sink, 1, size);
    EXPECT_TRUE(writer.ok());
    for (std::uint64_t i = 0; i < sent.chunks(); ++i) {
      std::memcpy(writer.value().Chunk(i), source.Payload(sent) + i * kChunkBytes,
                  sent.chunk_size(i));
      writer.value().SetChunkCrc(i, source.ChunkCrcs(sent)[i] ^ spoil);
    }
    return writer.value().Publish(sent.fields, sent.crc_root);
  };
  const auto bad = fill(1);
  ASSERT_FALSE(bad.ok());
  EXPECT_EQ(bad.error().code, ErrorCode::kCorrupt);
  EXPECT_FALSE(sink.Newest());
  const auto good = fill(0);
  ASSERT_TRUE(good.ok()) << good.error().message;
  EXPECT_TRUE(sink.Verify(*sink.Newest()).ok());
  EXPECT_EQ(sink.Newest()->crc_root, sent.crc_root);
}

TEST(Arena, HostileHeadersAreRefused) {
  Arena arena = MakeArena(1 << 16);
  Write(&arena, 0, 5, 1 << 16);
  SlotHeader& h = arena.header()->slot[0];
  const SlotFields good = h.fields;
  const std::uint64_t offset = h.extent_offset, bytes = h.extent_bytes;
  const auto refuses = [&] { return !arena.Look(0).has_value(); };
  h.extent_offset = std::uint64_t{1} << 40;
  EXPECT_TRUE(refuses());
  h.extent_offset = offset;
  h.extent_offset = UINT64_MAX & ~(kPageBytes - 1);
  EXPECT_TRUE(refuses());
  h.extent_offset = offset;
  h.extent_bytes = UINT64_MAX & ~(kPageBytes - 1);
  EXPECT_TRUE(refuses());
  h.extent_bytes = bytes;
  h.extent_offset = 0;
  EXPECT_TRUE(refuses());
  h.extent_offset = offset;
  h.fields.payload_bytes = 1 << 20;
  EXPECT_TRUE(refuses());
  h.fields = good;
  h.fields.table_bytes = UINT64_MAX;
  EXPECT_TRUE(refuses());
  h.fields = good;
  h.fields.chunk_bytes = 1;
  EXPECT_TRUE(refuses());
  h.fields = good;
  h.fields.step = -1;
  EXPECT_TRUE(refuses());
  h.fields = good;
  h.fields.world_size = 2;
  EXPECT_TRUE(refuses());
  h.fields = good;
  EXPECT_FALSE(refuses());
}

TEST(Arena, WhatIsNotAnArenaIsNotOpened) {
  const int empty = memfd_create("x", MFD_CLOEXEC);
  EXPECT_FALSE(Arena::Open(empty).ok());
  const int other = memfd_create("x", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(other, 1 << 20), 0);
  EXPECT_FALSE(Arena::Open(other).ok());
  Arena arena = MakeArena(100);
  arena.header()->version = 99;
  const auto newer = Arena::Open(fcntl(arena.fd(), F_DUPFD_CLOEXEC, 0));
  ASSERT_FALSE(newer.ok());
  EXPECT_NE(newer.error().message.find("format version 99"), std::string::npos);
}

TEST(Arena, ABlankFileIsFormattedOnRequest) {
  const int fd = memfd_create("x", MFD_CLOEXEC);
  const ArenaSpec spec{.job = "j", .rank = 1, .replica = false, .slot_bytes = 0};
  auto arena = Arena::Open(fd, &spec);
  ASSERT_TRUE(arena.ok()) << arena.error().message;
  EXPECT_STREQ(arena.value().header()->job, "j");
  Write(&arena.value(), 0, 1, 100);
  EXPECT_TRUE(arena.value().Verify(*arena.value().Newest()).ok());
}

TEST(Arena, LargerThanMemoryIsRefusedWithTheLimit) {
  const auto fd = CreateArenaFd(
      {.job = "big", .rank = 0, .replica = false, .slot_bytes = std::uint64_t{1} << 43});
  ASSERT_FALSE(fd.ok());
  EXPECT_EQ(fd.error().code, ErrorCode::kNoMemory);
  EXPECT_NE(fd.error().message.find("job big rank 0"), std::string::npos) << fd.error().message;
  EXPECT_NE(fd.error().message.find("16.0 TiB"), std::string::npos) << fd.error().message;
  Arena arena = MakeArena(0);
  const auto begun = SlotWriter::Begin(&arena, 0, std::uint64_t{1} << 43);
  ASSERT_FALSE(begun.ok());
  EXPECT_EQ(begun.error().code, ErrorCode::kNoMemory);
}

TEST(Arena, TheRestoreWordSpeaksOfOneGeneration) {
  Arena agent = MakeArena(0);
  Arena trainer = Again(agent);
  EXPECT_EQ(trainer.Restore().state, RestoreState::kNone);
  agent.SetRestore({.generation = 4, .state = RestoreState::kPending});
  EXPECT_EQ(trainer.Restore().generation, 4u);
  agent.SetRestore({4, RestoreState::kFailed, 0, 0, 17, std::string(1000, 'x')});
  const RestoreView view = trainer.Restore();
  EXPECT_EQ(view.state, RestoreState::kFailed);
  EXPECT_EQ(view.step, 17);
  EXPECT_EQ(view.message, std::string(215, 'x'));
}

TEST(Arena, CannotBeMadeSmallerUnderItsReaders) {
  Arena arena = MakeArena(1 << 20);
  EXPECT_NE(ftruncate(arena.fd(), 4096), 0);
}

TEST(Mend, OneChunkIsPutRightInPlaceAndNothingElseIsTouched) {
  Arena arena = MakeArena(4 << 20);
  const SlotView view = Write(&arena, 0, 5, (3 << 20) + 77);
  EXPECT_FALSE(FirstDamage(&arena, view));
  auto* bytes = const_cast<unsigned char*>(arena.Payload(view));
  const std::vector<unsigned char> right(bytes + kChunkBytes, bytes + std::size_t{2} * kChunkBytes);
  bytes[kChunkBytes + 9] ^= 1;
  EXPECT_EQ(FirstDamage(&arena, view), 1);
  EXPECT_TRUE(MendChunk(&arena, view, 1, right.data()));
  EXPECT_FALSE(FirstDamage(&arena, view));
  EXPECT_TRUE(arena.Verify(view).ok());
  const std::vector<std::uint32_t> crcs(arena.ChunkCrcs(view), arena.ChunkCrcs(view) + 4);
  const_cast<std::uint32_t*>(arena.ChunkCrcs(view))[2] ^= 1;
  EXPECT_EQ(FirstDamage(&arena, view), kTableDamaged);
  EXPECT_TRUE(MendTable(&arena, view, crcs));
  EXPECT_TRUE(arena.Verify(view).ok());
}

TEST(Mend, ASlotThatIsBeingOverwrittenIsLeftAlone) {
  Arena arena = MakeArena(4 << 20);
  const SlotView view = Write(&arena, 0, 5, 2 << 20);
  const std::vector<unsigned char> other(kChunkBytes, 7);
  auto writer = SlotWriter::Begin(&arena, 0, 2 << 20);
  ASSERT_TRUE(writer.ok());
  const unsigned char before = arena.Payload(view)[3];
  EXPECT_FALSE(MendChunk(&arena, view, 0, other.data()));
  EXPECT_EQ(arena.Payload(view)[3], before);
}

TEST(Mend, AMenderThatDiedHoldsAWriterUpForAMomentOnly) {
  Arena arena = MakeArena(4 << 20);
  const SlotView view = Write(&arena, 0, 5, 2 << 20);
  arena.header()->slot[0].mending_seq = view.seq;
  const auto began = std::chrono::steady_clock::now();
  ASSERT_TRUE(SlotWriter::Begin(&arena, 0, 2 << 20).ok());
  EXPECT_GE(std::chrono::steady_clock::now() - began, kMendPatience);
  EXPECT_EQ(arena.header()->slot[0].mending_seq, 0u);
}

// A trainer captures over and over while an agent mends the very slots: no capture is spoiled.
TEST(Mend, CapturesAndMendsInEachOthersWayLeaveWholeSlots) {
  Arena arena = MakeArena(3 << 20);
  Arena other = Again(arena);
  std::atomic<bool> done{false};
  std::atomic<int> mends{0};
  std::thread mender([&] {
    const std::vector<unsigned char> junk(kChunkBytes, 0xAB);
    while (!done) {
      for (std::uint32_t i = 0; i < kSlots; ++i) {
        const auto view = other.Look(i);
        if (!view) continue;
        // Its own bytes back, as far as the slot is still the one that was read.
        std::vector<unsigned char> bytes(other.Payload(*view), other.Payload(*view) + kChunkBytes);
        if (other.Current(*view) && MendChunk(&other, *view, 0, bytes.data())) ++mends;
      }
    }
  });
  for (Step step = 1; step <= 200; ++step) {
    const SlotView view = Write(&arena, static_cast<std::uint32_t>(step % 2), step, 2 << 20);
    ASSERT_TRUE(arena.Verify(view).ok()) << "step " << step;
  }
  done = true;
  mender.join();
  EXPECT_GT(mends, 0);
}

}  // namespace
}  // namespace everstep::checkpoint
