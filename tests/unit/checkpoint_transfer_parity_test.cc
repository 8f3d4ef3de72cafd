// Nodes' data planes over loopback make parities of each other's shards, and lost shards out of
// them, bit for bit.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>

#include "checkpoint/core/parity_ranks.h"
#include "tests/unit/transfer_harness.h"

namespace everstep::checkpoint {
namespace {

constexpr std::int32_t kWorld = 8;  // as the harness captures
constexpr Step kStep = 7;

// One rank a node, all of one group; a state for each, of lengths that share nothing.
class Group {
 public:
  Group(std::vector<std::size_t> sizes, std::uint32_t parity) : parity_(parity) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      group_.push_back(static_cast<Rank>(i));
      states_.push_back(StateOf(static_cast<Step>(100 + i), sizes[i]));
      nodes_.push_back(std::make_unique<Node>());
      nodes_.back()->service->Begin(kJob, 1, "key");
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      Part part = nodes_[i]->PartOf(1, static_cast<Rank>(i), "");
      part.kept_by_parity = true;
      nodes_[i]->Activate(part);
      EXPECT_EQ(nodes_[i]->Open(static_cast<Rank>(i), false).header()->agent.has_peer, 1U)
          << "a trainer waits for the commit";
    }
    Capture(kStep, 0);
  }
  // One byte of a rank's state becomes another.
  void Change(std::size_t i, std::size_t at) { states_[i][at] ^= 0x40; }
  void Capture(Step step, std::uint32_t slot) {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const SlotView view =
          nodes_[i]->CaptureBytes(1, static_cast<Rank>(i), slot, step, states_[i]);
      shards_[static_cast<Rank>(i)] = ToShard(view, false);
    }
  }

  Node& node(std::size_t i) { return *nodes_[i]; }
  const std::vector<unsigned char>& state(std::size_t i) const { return states_[i]; }
  const HeldShard& shard(Rank rank) const { return shards_.at(rank); }
  std::vector<Codeword> words() const { return CodewordsOf(group_, parity_, kWorld); }
  CutShard Source(Rank rank, const std::string& address) const {
    const HeldShard& s = shards_.at(rank);
    return {.rank = rank, .crc_root = s.crc_root, .bytes = s.bytes, .holders = {{"node", address}}};
  }
  ShardBuild OrderOf(Rank rank) const {
    ShardBuild build{.shard = {.rank = rank,
                               .world_size = kWorld,
                               .generation = 1,
                               .step = shards_.at(0).step,
                               .replica = true},
                     .parity = parity_,
                     .group = group_,
                     .sources = {}};
    if (IsParity(rank, kWorld)) {
      build.shard.built = 1;
    } else {
      build.shard = shards_.at(rank);
      build.shard.replica = true;
    }
    return build;
  }
  ShardBuild ParityOrder(const Codeword& word, std::size_t p) const {
    ShardBuild build = OrderOf(word.parities[p]);
    for (const Rank rank : word.members) {
      build.sources.push_back(Source(rank, nodes_[static_cast<std::size_t>(rank)]->address()));
    }
    return build;
  }
  // Of everything that those nodes which are still there hold.
  ShardBuild LostOrder(Rank rank) const {
    ShardBuild build = OrderOf(rank);
    for (const auto& [held, shard] : shards_) {
      const auto at = static_cast<std::size_t>(held % kWorld);
      if (held != rank && nodes_[at] != nullptr) {
        build.sources.push_back(Source(held, nodes_[at]->address()));
      }
    }
    return build;
  }
  void MakeParities() {
    for (const Codeword& word : words()) {
      for (std::size_t p = 0; p < word.parities.size(); ++p) {
        const Rank rank = word.parities[p];
        Node& holder = *nodes_[static_cast<std::size_t>(HolderOf(rank, kWorld))];
        holder.service->Make(kJob, 1, ParityOrder(word, p));
        shards_[rank] = Made(&holder, rank);
      }
    }
  }
  static HeldShard Made(Node* node, Rank rank, std::size_t times = 1) {
    std::optional<HeldShard> found;
    EXPECT_TRUE(node->heard.Until([&] {
      std::size_t seen = 0;
      for (const HeldShard& s : node->heard.copied) {
        if (s.rank == rank && s.replica) found = s, ++seen;
      }
      return seen >= times;
    })) << rank
        << ": " << node->heard.Troubles();
    return found.value_or(HeldShard{});
  }
  void Lose(std::size_t i) { nodes_[i].reset(); }

 private:
  const std::uint32_t parity_;
  std::vector<Rank> group_;
  std::vector<std::vector<unsigned char>> states_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::map<Rank, HeldShard> shards_;
};

std::vector<std::size_t> SomeSizes() {
  return {kSize, 3u << 20, 100, (7u << 20) + 1, (2u << 20) - 5};
}

TEST(TransferParity, LostShardsComeBackBitForBitFromAnyThatAreLeft) {
  for (const auto& [first, second] : {std::pair<std::size_t, std::size_t>{0, 1}, {2, 3}, {4, 0}}) {
    Group group(SomeSizes(), 2);
    group.MakeParities();
    group.Lose(first);
    group.Lose(second);
    Node spare;  // and one that is left
    spare.service->Begin(kJob, 1, "key");
    for (const std::size_t lost : {first, second}) {
      Node& maker = lost == first ? spare : group.node(first == 2 ? 1 : 2);
      const auto rank = static_cast<Rank>(lost);
      maker.service->Make(kJob, 1, group.LostOrder(rank));
      const HeldShard made = Group::Made(&maker, rank);
      EXPECT_EQ(made.crc_root, group.shard(rank).crc_root);
      EXPECT_EQ(made.built, 0U);
      EXPECT_TRUE(maker.HoldsBytes(rank, true, kStep, group.state(lost)));
    }
  }
}

TEST(TransferParity, OneParityIsPlainXor) {
  Group group({kSize, kSize, (1u << 20) + 3}, 1);
  group.MakeParities();
  group.Lose(0);
  Node spare;
  spare.service->Begin(kJob, 1, "key");
  spare.service->Make(kJob, 1, group.LostOrder(0));
  EXPECT_EQ(Group::Made(&spare, 0).crc_root, group.shard(0).crc_root);
  EXPECT_TRUE(spare.HoldsBytes(0, true, kStep, group.state(0)));
  // Who restores takes it from there as if it had always been there.
  Node other;
  RestorePart from{.step = kStep,
                   .shard_rank = 0,
                   .shard_generation = 1,
                   .crc_root = group.shard(0).crc_root,
                   .bytes = group.shard(0).bytes,
                   .source_address = spare.address()};
  spare.service->Begin(kJob, 2, "key");
  other.Activate(other.PartOf(2, 0, "", from));
  EXPECT_TRUE(other.heard.Copied(kStep, false)) << other.heard.Troubles();
  EXPECT_TRUE(other.HoldsBytes(0, false, kStep, group.state(0)));
}

TEST(TransferParity, TooFewSourcesAreSaidAndNothingIsPublished) {
  Group group(SomeSizes(), 1);
  group.MakeParities();
  group.Lose(1);
  group.Lose(3);
  Node spare;
  spare.service->Begin(kJob, 1, "key");
  spare.service->Make(kJob, 1, group.LostOrder(1));
  EXPECT_TRUE(spare.heard.Complains("cannot be made anew: 2 shards of its row are lost"))
      << spare.heard.Troubles();
  EXPECT_FALSE(spare.Open(1, true).open());
}

// A parity told twice is the same parity; one of another step lies beside it.
TEST(TransferParity, WhatIsHereAlreadyIsSaidAgain) {
  Group group(SomeSizes(), 1);
  group.MakeParities();
  const Codeword word = group.words()[0];
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  const std::uint64_t content = holder.Open(parity, true).Newest()->content();
  holder.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&holder, parity, 2).crc_root, group.shard(parity).crc_root);
  EXPECT_EQ(holder.Open(parity, true).Newest()->content(), content) << "it was made anew";
  holder.service->MarkCommitted(kJob, 1, kStep);
  group.Capture(kStep + 1, 1);
  holder.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&holder, parity, 3).step, kStep + 1);
  group.Capture(kStep + 2, 0);  // the uncommitted one gives way, not the committed one
  holder.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&holder, parity, 4).step, kStep + 2);
  Arena arena = holder.Open(parity, true);
  EXPECT_EQ(arena.Look(0)->step() + arena.Look(1)->step(), kStep + kStep + 2);
}

// A chunk of a parity whose sources did not change is copied from the older parity here; none of
// what it is the sum of is sent.
TEST(TransferParity, UnchangedChunksAreNeitherSentNorAddedUpAgain) {
  Group group({8u << 20, 8u << 20, (7u << 20) + 1, 100}, 2);
  group.MakeParities();
  for (const Codeword& word : group.words()) {
    for (const Rank parity : word.parities) {
      group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)))
          .service->MarkCommitted(kJob, 1, kStep);
    }
  }
  const Codeword word = group.words()[0];
  const auto changed = static_cast<std::size_t>(word.members[0]);
  group.Change(changed, 100);  // of its first chunk, which is in the first row's piece
  group.Capture(kStep + 1, 1);
  for (std::size_t p = 0; p < word.parities.size(); ++p) {
    const Rank parity = word.parities[p];
    Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
    const TrafficReport before = holder.service->traffic()->Report();
    holder.service->Make(kJob, 1, group.ParityOrder(word, p));
    const HeldShard made = Group::Made(&holder, parity, 2);
    const TrafficReport after = holder.service->traffic()->Report();
    Node fresh;  // has no older one, and makes all of it
    fresh.service->Begin(kJob, 1, "key");
    fresh.service->Make(kJob, 1, group.ParityOrder(word, p));
    EXPECT_EQ(Group::Made(&fresh, parity).crc_root, made.crc_root);
    const TrafficReport whole = fresh.service->traffic()->Report();
    const auto commit = static_cast<std::size_t>(TrafficClass::kCommit);
    const std::uint64_t sent = after.sent_bytes[commit] - before.sent_bytes[commit];
    EXPECT_GT(sent, 0U);
    EXPECT_LE(sent, word.members.size() << 20) << "a chunk of each source at most";
    EXPECT_EQ(after.unchanged_bytes - before.unchanged_bytes + sent, whole.sent_bytes[commit]);
    EXPECT_EQ(whole.unchanged_bytes, 0U);
  }
}

// The older parity rotted where the new one would take from it: that chunk is added up anew.
TEST(TransferParity, ARottenChunkOfTheOlderParityIsNotTaken) {
  Group group({4u << 20, 4u << 20, 4u << 20}, 1);
  group.MakeParities();
  const Codeword word = group.words()[0];
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  holder.service->MarkCommitted(kJob, 1, kStep);
  holder.Flip(parity, true, kStep, 17);
  group.Capture(kStep + 1, 1);  // nothing changed
  holder.service->Make(kJob, 1, group.ParityOrder(word, 0));
  const HeldShard made = Group::Made(&holder, parity, 2);
  Node fresh;
  fresh.service->Begin(kJob, 1, "key");
  fresh.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&fresh, parity).crc_root, made.crc_root);
  Arena arena = holder.Open(parity, true);
  EXPECT_TRUE(arena.Verify(*arena.Newest()).ok());
}

// A source that has the older step no more brings all of it, and the parity is the same.
TEST(TransferParity, ASourceWithoutTheOlderStepBringsAll) {
  Group group({4u << 20, 4u << 20, 4u << 20}, 1);
  group.MakeParities();
  const Codeword word = group.words()[0];
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  holder.service->MarkCommitted(kJob, 1, kStep);
  group.Capture(kStep + 1, 0);  // over the step that the older parity is of
  const std::uint64_t before = holder.service->traffic()->Report().unchanged_bytes;
  holder.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&holder, parity, 2).step, kStep + 1);
  EXPECT_EQ(holder.service->traffic()->Report().unchanged_bytes, before);
}

// Each wire lets nothing back until both have been asked: one source after the other would wait for
// ever, that is until the first is given up.
TEST(TransferParity, SourcesAreReadSeveralAtATime) {
  Group group({kSize, 3u << 20, (7u << 20) + 1}, 1);
  const Codeword word = group.words()[0];
  ASSERT_EQ(word.members.size(), 2U);
  ShardBuild build = group.ParityOrder(word, 0);
  std::atomic<int> asked{0};
  std::atomic<bool> together{true};
  const auto wait_for_both = [&](int, std::uint64_t offset, char*, std::size_t) {
    if (offset > 0) return true;
    ++asked;
    if (!Becomes([&] { return asked >= 2; })) together = false;
    return true;
  };
  const auto pass = [](int, std::uint64_t, char*, std::size_t) { return true; };
  std::vector<std::unique_ptr<Proxy>> wires;
  for (std::size_t i = 0; i < build.sources.size(); ++i) {
    const auto at = static_cast<std::size_t>(word.members[i]);
    wires.push_back(std::make_unique<Proxy>(group.node(at).service->port(), pass, wait_for_both));
    build.sources[i].holders[0].address = wires.back()->address();
  }
  Node maker;
  maker.service->Begin(kJob, 1, "key");
  maker.service->Make(kJob, 1, build);
  Group::Made(&maker, word.parities[0]);
  EXPECT_TRUE(together);
  EXPECT_EQ(wires[0]->connections + wires[1]->connections, 2);
}

// The wire changes a byte of every third connection's answer, and another breaks off.
TEST(TransferParity, BadWiresCostAttemptsNotBits) {
  Group group({kSize, 3u << 20, (7u << 20) + 1}, 1);
  const Codeword word = group.words()[0];
  ShardBuild build = group.ParityOrder(word, 0);
  Proxy wire(
      group.node(static_cast<std::size_t>(word.members[0])).service->port(),
      [](int, std::uint64_t, char*, std::size_t) { return true; },
      [](int number, std::uint64_t offset, char* bytes, std::size_t n) {
        const bool there = offset <= (1u << 20) + 500'000 && offset + n > (1u << 20) + 500'000;
        if (number == 0 && there) bytes[n / 2] ^= 1;
        return number != 1 || offset < (1u << 20) / 2;
      });
  build.sources[0].holders[0].address = wire.address();
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  holder.service->Make(kJob, 1, build);
  const HeldShard through = Group::Made(&holder, parity);
  EXPECT_GE(wire.connections, 2);
  // The same bytes as over a good wire, on a node of its own.
  Node fresh;
  fresh.service->Begin(kJob, 1, "key");
  fresh.service->Make(kJob, 1, group.ParityOrder(word, 0));
  EXPECT_EQ(Group::Made(&fresh, parity).crc_root, through.crc_root);
}

TEST(TransferParity, ASourceThatHasItNoMoreIsLeftOutWhereOthersSuffice) {
  Group group(SomeSizes(), 2);
  group.MakeParities();
  group.Lose(0);
  ShardBuild build = group.LostOrder(0);
  // Rank 1's shard is not what it was: of two parities, one makes up for it.
  group.node(1).Flip(1, false, kStep, 100);
  Node spare;
  spare.service->Begin(kJob, 1, "key");
  spare.service->Make(kJob, 1, build);
  EXPECT_EQ(Group::Made(&spare, 0).crc_root, group.shard(0).crc_root);
  EXPECT_TRUE(spare.HoldsBytes(0, true, kStep, group.state(0)));
}

// A node whose own capture went bad makes it anew beside that, and mends itself from there.
TEST(TransferParity, ADamagedStateIsPutRightFromTheCopyMadeBesideIt) {
  Group group(SomeSizes(), 1);
  group.MakeParities();
  Node& node = group.node(0);
  node.Flip(0, false, kStep, (2u << 20) + 17);
  Arena arena = node.Open(0, false);
  ASSERT_FALSE(arena.Verify(*arena.Newest()).ok());
  node.service->Make(kJob, 1, group.LostOrder(0));
  EXPECT_EQ(Group::Made(&node, 0).crc_root, group.shard(0).crc_root);
  EXPECT_TRUE(node.HoldsBytes(0, true, kStep, group.state(0)));
  EXPECT_FALSE(node.HoldsBytes(0, false, kStep, group.state(0)));
  node.service->Mend(kJob, group.shard(0), node.address());
  EXPECT_TRUE(Becomes([&] { return bool(node.HoldsBytes(0, false, kStep, group.state(0))); }))
      << node.heard.Troubles();
}

// A damaged parity gives way to the same one, made anew.
TEST(TransferParity, ADamagedParityIsMadeAnewWhereItLies) {
  Group group(SomeSizes(), 1);
  group.MakeParities();
  const Codeword word = group.words()[0];
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  holder.service->MarkCommitted(kJob, 1, kStep);
  holder.Flip(parity, true, kStep, 17);
  Arena arena = holder.Open(parity, true);
  ASSERT_FALSE(arena.Verify(*arena.Newest()).ok());
  ShardBuild build = group.ParityOrder(word, 0);
  build.shard.crc_root = group.shard(parity).crc_root;
  holder.service->Make(kJob, 1, build);
  EXPECT_EQ(Group::Made(&holder, parity, 2).crc_root, group.shard(parity).crc_root);
  Arena again = holder.Open(parity, true);
  EXPECT_TRUE(again.Verify(*again.Newest()).ok());
}

TEST(TransferParity, AnOrderEndsWithItsGeneration) {
  Group group(SomeSizes(), 1);
  const Codeword word = group.words()[0];
  ShardBuild build = group.ParityOrder(word, 0);
  build.sources[0].holders[0].address = "127.0.0.1:1";  // nobody
  const Rank parity = word.parities[0];
  Node& holder = group.node(static_cast<std::size_t>(HolderOf(parity, kWorld)));
  holder.service->Make(kJob, 1, build);
  holder.service->Begin(kJob, 2, "key");
  build = group.ParityOrder(word, 0);
  build.shard.built = 2;
  holder.service->Make(kJob, 2, build);
  EXPECT_EQ(Group::Made(&holder, parity).built, 2U);
}

}  // namespace
}  // namespace everstep::checkpoint
