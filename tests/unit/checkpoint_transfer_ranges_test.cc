// A restore by ranges: shards of an older world lie in some nodes' memories, a rank of a newer one
// asks for parts of them.
#include "checkpoint/store/range_exchange.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

constexpr Step kStep = 7;
constexpr std::size_t kTable = 1000;  // ends each shard

std::vector<unsigned char> ShardState(Rank rank) {
  return StateOf(100 + rank, kSize + static_cast<std::size_t>(rank) * 4096);
}

// What the trainer of `rank` wrote into its slot, its last kTable bytes being the table.
// `own`: whose arena, where another rank was restored in place from this shard.
HeldShard CaptureShard(Node* node, Rank rank, std::optional<Rank> own = std::nullopt) {
  auto fds = node->host.Open(kJob, {own.value_or(rank), false}, 4096);
  EXPECT_TRUE(fds.ok());
  close(fds.value().eventfd);
  auto arena = Arena::Open(fds.value().memfd);
  const auto state = ShardState(rank);
  auto writer = SlotWriter::Begin(&arena.value(), 0, state.size());
  EXPECT_TRUE(writer.value().Append(state.data(), state.size()).ok());
  const auto view = writer.value().Finish(
      {.generation = 1, .step = kStep, .rank = rank, .world_size = 3}, kTable);
  EXPECT_TRUE(view.ok());
  return ToShard(view.value(), false);
}

// Three nodes with a shard each, and what the controller says of them.
struct OldWorld {
  OldWorld() {
    auto made = std::make_shared<RestoreCut>();
    made->step = kStep;
    made->generation = 1;
    made->world_size = 3;
    for (Rank rank = 0; rank < 3; ++rank) {
      Node& node = nodes[static_cast<std::size_t>(rank)];
      const HeldShard shard = CaptureShard(&node, rank);
      node.service->Begin(kJob, 2, "key");
      made->shards.push_back({.rank = rank,
                              .crc_root = shard.crc_root,
                              .bytes = shard.bytes,
                              .holders = {{"", node.address()}}});
    }
    cut = made;
  }
  Part PartOf(Node* node, Rank rank) const {
    RestorePart restore{.step = kStep, .source_address = {}, .cut = cut, .world_size = 8};
    return node->PartOf(2, rank, "", restore);
  }
  Node nodes[3];
  std::shared_ptr<const RestoreCut> cut;
};

// The trainer's half.
class Trainer {
 public:
  Trainer(Node* node, Rank rank) : node_(node), rank_(rank), arena_(node->Open(rank, false)) {}

  bool Reaches(RestoreState state) {
    return Becomes([&] {
             const RestoreState now = arena_.Restore().state;
             return now == state || now == RestoreState::kFailed;
           }) &&
           arena_.Restore().state == state;
  }
  std::vector<std::string> Tables() {
    const RestoreView word = arena_.Restore();
    const auto view = arena_.LookExchange(word.slot, kFlagCatalog);
    if (!view || view->seq != word.slot_seq || !arena_.Verify(*view).ok()) return {};
    const unsigned char* data = arena_.Payload(*view);
    CatalogHead head;
    std::memcpy(&head, data, sizeof head);
    std::vector<std::string> tables;
    for (std::uint32_t i = 0; i < head.shards; ++i) {
      CatalogEntry entry;
      std::memcpy(&entry, data + sizeof head + i * sizeof entry, sizeof entry);
      EXPECT_EQ(entry.rank, static_cast<Rank>(i));
      tiers.push_back(entry.tier);
      tables.emplace_back(reinterpret_cast<const char*>(data) + entry.table_at, entry.table_bytes);
    }
    return tables;
  }
  void Request(const std::vector<WantedRange>& ranges, std::uint64_t data_bytes,
               const std::string& table, std::uint32_t flags = 0) {
    const RestoreView word = arena_.Restore();
    const RequestHead head{.ranges = static_cast<std::uint32_t>(ranges.size()),
                           .data_bytes = data_bytes,
                           .table_bytes = table.size(),
                           .catalog_seq = word.slot_seq,
                           .flags = flags};
    auto writer = SlotWriter::Begin(&arena_, word.slot, 1 << 20);
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer.value().Append(&head, sizeof head).ok());
    ASSERT_TRUE(writer.value().Append(ranges.data(), ranges.size() * sizeof(WantedRange)).ok());
    ASSERT_TRUE(writer.value().Append(table.data(), table.size()).ok());
    ASSERT_TRUE(writer.value()
                    .Finish({.generation = 2,
                             .step = kStep,
                             .rank = rank_,
                             .world_size = 8,
                             .flags = kFlagRequest},
                            0)
                    .ok());
  }
  std::vector<unsigned char> State() {
    const RestoreView word = arena_.Restore();
    const auto view = arena_.LookRestored(word.slot);
    if (!view || view->seq != word.slot_seq || !arena_.Verify(*view).ok()) return {};
    EXPECT_EQ(view->fields.generation, 2u);
    EXPECT_EQ(view->fields.step, kStep);
    EXPECT_EQ(view->fields.rank, rank_);
    EXPECT_EQ(view->fields.world_size, 8);
    const unsigned char* data = arena_.Payload(*view);
    return {data, data + view->fields.payload_bytes};
  }
  std::string Message() { return arena_.Restore().message; }
  Arena& arena() { return arena_; }
  std::vector<ShardTier> tiers;

 private:
  Node* node_;
  Rank rank_;
  Arena arena_;
};

// A part of each shard, across chunks, and rows of the last one.
const std::vector<WantedRange> kWants = {
    {.rank = 0, .source = 1'000'000, .dest = 0, .bytes = 3'000'000},
    {.rank = 1, .source = 0, .dest = 3'000'000, .bytes = 64},
    {.rank = 2,
     .count = 1000,
     .source = 4096,
     .source_stride = 512,
     .dest = 3'000'064,
     .dest_stride = 100,
     .bytes = 100}};
constexpr std::uint64_t kData = 3'000'064 + 100'032;  // a multiple of 64, 32 bytes of it padding

std::vector<unsigned char> Expected(const std::string& table) {
  std::vector<unsigned char> out(kData + table.size());
  for (const WantedRange& w : kWants) {
    const auto state = ShardState(w.rank);
    for (std::uint64_t i = 0; i < w.count; ++i) {
      std::memcpy(out.data() + w.dest + i * w.dest_stride,
                  state.data() + w.source + i * w.source_stride, w.bytes);
    }
  }
  std::memcpy(out.data() + kData, table.data(), table.size());
  return out;
}

TEST(RangeRestore, PutsAStateTogetherFromOwnAndPeersShards) {
  OldWorld old;
  Node& node = old.nodes[1];  // has shard 1 itself
  node.Activate(old.PartOf(&node, 5));
  Trainer trainer(&node, 5);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  const auto tables = trainer.Tables();
  ASSERT_EQ(tables.size(), 3u);
  for (Rank rank = 0; rank < 3; ++rank) {
    const auto state = ShardState(rank);
    EXPECT_EQ(tables[static_cast<std::size_t>(rank)],
              std::string(state.end() - kTable, state.end()));
  }
  EXPECT_EQ(trainer.tiers, (std::vector{ShardTier::kPeer, ShardTier::kLocal, ShardTier::kPeer}));
  trainer.Request(kWants, kData, "the table");
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_EQ(trainer.State(), Expected("the table"));
  EXPECT_TRUE(node.heard.Copied(kStep, false)) << "it counts as captured by the new generation";
  const auto kept = node.Open(1, false).Look(0);
  ASSERT_TRUE(kept.has_value());
  EXPECT_EQ(kept->crc_root, old.cut->shards[1].crc_root);
}

TEST(RangeRestore, TheSlotThatHoldsThisRanksPartOfTheCutIsLeftAlone) {
  OldWorld old;
  Node& node = old.nodes[2];
  node.Activate(old.PartOf(&node, 2));  // the arena that holds shard 2
  Trainer trainer(&node, 2);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  trainer.Request(kWants, kData, "t");
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_EQ(trainer.State(), Expected("t"));
  const auto kept = trainer.arena().Look(0);
  ASSERT_TRUE(kept.has_value());
  EXPECT_EQ(kept->crc_root, old.cut->shards[2].crc_root);
}

// Of a state in shares each rank wants all, and then captures its own share over it.
TEST(RangeRestore, WhatIsPutTogetherForARankAloneIsNoShardAndGivesWayToItsShare) {
  OldWorld old;
  Node& node = old.nodes[2];
  node.Activate(old.PartOf(&node, 2));
  Trainer trainer(&node, 2);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  trainer.Request(kWants, kData, "t", kFlagAssembled);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_EQ(trainer.State(), Expected("t"));
  const std::uint32_t slot = trainer.arena().Restore().slot;
  EXPECT_FALSE(trainer.arena().Look(slot));
  ASSERT_TRUE(trainer.arena().Newest());
  EXPECT_EQ(trainer.arena().Newest()->crc_root, old.cut->shards[2].crc_root);
  for (const HeldShard& held : node.service->Survey(kJob)) EXPECT_EQ(held.generation, 1u);
  auto writer = SlotWriter::Begin(&trainer.arena(), slot, 100);
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer.value().Append("share", 5).ok());
  const SlotFields fields{
      .generation = 2, .step = kStep, .rank = 2, .world_size = 8, .flags = kFlagShare};
  ASSERT_TRUE(writer.value().Finish(fields, 0).ok());
  EXPECT_TRUE(node.heard.Copied(kStep, false));
  std::size_t told = 0;
  for (const HeldShard& held : node.service->Survey(kJob)) {
    if (held.generation != 2) continue;
    EXPECT_TRUE(held.share);
    EXPECT_EQ(held.bytes, 5u) << "the whole state was told of";
    ++told;
  }
  EXPECT_EQ(told, 1u);
}

TEST(RangeRestore, ABrokenConnectionIsResumedAndAFlippedByteIsFoundAndReadElsewhere) {
  OldWorld old;
  Node copy, reader;  // a second holder of shard 0, and a node that holds nothing
  CaptureShard(&copy, 0);
  copy.service->Begin(kJob, 2, "key");
  // The first holder's bytes rot: every chunk it sends fails.
  Arena rotten = old.nodes[0].Open(0, false);
  const auto view = rotten.Look(0);
  ASSERT_TRUE(view.has_value());
  const_cast<unsigned char*>(rotten.Payload(*view))[2'000'000] ^= 1;
  std::atomic<int> broken{0};
  Proxy proxy(old.nodes[2].service->port(), [&](int number, std::uint64_t, char*, std::size_t) {
    if (number > 2) return true;
    ++broken;
    return false;
  });
  auto cut = std::make_shared<RestoreCut>(*old.cut);
  cut->shards[0].holders.push_back({"", copy.address()});
  cut->shards[2].holders[0].address = proxy.address();
  old.cut = cut;
  reader.Activate(old.PartOf(&reader, 0));
  Trainer trainer(&reader, 0);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  trainer.Request(kWants, kData, "t");
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_EQ(trainer.State(), Expected("t"));
  EXPECT_EQ(broken, 3);
}

TEST(RangeRestore, AShardInAnotherRanksOwnArenaIsReadWhereItLies) {
  OldWorld old;
  Node reader;
  CaptureShard(&reader, 1, 6);
  auto cut = std::make_shared<RestoreCut>(*old.cut);
  cut->shards[1].holders = {{"", reader.address()}};
  old.cut = cut;
  reader.Activate(old.PartOf(&reader, 0));
  Trainer trainer(&reader, 0);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  ASSERT_EQ(trainer.Tables().size(), 3u);
  EXPECT_EQ(trainer.tiers, (std::vector{ShardTier::kPeer, ShardTier::kLocal, ShardTier::kPeer}));
  trainer.Request(kWants, kData, "t");
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_EQ(trainer.State(), Expected("t"));
}

TEST(RangeRestore, WhatCannotBeHadIsNamed) {
  OldWorld old;
  Node reader;
  old.nodes[1].Open(1, false).header()->slot[0].seq = 1;  // torn
  reader.Activate(old.PartOf(&reader, 0));
  Trainer trainer(&reader, 0);
  EXPECT_FALSE(trainer.Reaches(RestoreState::kAsk));
  EXPECT_NE(trainer.Message().find("step 7 of rank 1 (generation 1)"), std::string::npos)
      << trainer.Message();
}

TEST(RangeRestore, ARequestThatMakesNoSenseIsRefused) {
  OldWorld old;
  Node reader;
  reader.Activate(old.PartOf(&reader, 0));
  Trainer trainer(&reader, 0);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  trainer.Request({{.rank = 1, .dest = 0, .bytes = 64}, {.rank = 2, .dest = 63, .bytes = 64}}, 128,
                  "t");
  EXPECT_FALSE(trainer.Reaches(RestoreState::kReady));
  EXPECT_NE(trainer.Message().find("byte 63 of the new state is wanted from two places"),
            std::string::npos)
      << trainer.Message();
}

// Its agent restarts while the trainer is about to answer: the same question stands.
TEST(RangeRestore, AnAgentThatComesBackFindsTheQuestionAndTheAnswer) {
  OldWorld old;
  Node reader;
  reader.Activate(old.PartOf(&reader, 0));
  Trainer trainer(&reader, 0);
  ASSERT_TRUE(trainer.Reaches(RestoreState::kAsk)) << trainer.Message();
  const std::uint64_t asked = trainer.arena().Restore().slot_seq;
  reader.service->Stop();
  trainer.Request(kWants, kData, "t");
  reader.Boot();
  reader.Activate(old.PartOf(&reader, 0));
  ASSERT_TRUE(trainer.Reaches(RestoreState::kReady)) << trainer.Message();
  EXPECT_GT(trainer.arena().Restore().slot_seq, asked);
  EXPECT_EQ(trainer.State(), Expected("t"));
}

}  // namespace
}  // namespace everstep::checkpoint
