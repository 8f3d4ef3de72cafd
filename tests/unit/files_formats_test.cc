// The parsers of what lies on disk: what they read, and what they refuse by offset and field.
#include <gtest/gtest.h>

#include "checkpoint/files/json.h"
#include "checkpoint/files/manifest.h"
#include "checkpoint/files/safetensors.h"
#include "checkpoint/files/shard_file.h"
#include "checkpoint/files/table.h"
#include "tests/unit/files_slot.h"

namespace everstep::checkpoint {
namespace {

std::string Head(const std::string& json) {
  std::string head(8, '\0');
  for (unsigned i = 0; i < 8; ++i) head[i] = static_cast<char>((json.size() >> (8 * i)) & 0xff);
  return head + json;
}
std::string WhyNot(const std::string& json, std::uint64_t data_bytes) {
  const std::string head = Head(json);
  auto parsed = ParseSafetensors(head, head.size() + data_bytes);
  return parsed.ok() ? "read" : parsed.error().message;
}

TEST(Safetensors, RefusesByNameWhatDoesNotTile) {
  const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  EXPECT_EQ(WhyNot("{" + a + "}", 8), "read");
  EXPECT_EQ(WhyNot("{" + a + "}", 9), "safetensors: the tensors end at 8, the data at 9");
  EXPECT_EQ(WhyNot("{" + a + "}", 7), "safetensors: tensor a: data_offsets [0, 8] of 7 bytes");
  EXPECT_EQ(WhyNot("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})", 8),
            "safetensors: tensor b begins at 4, within: the one before ends at 8");
  EXPECT_EQ(WhyNot("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[12,16]}})", 16),
            "safetensors: tensor b begins at 12, behind a hole: the one before ends at 8");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8),
            "safetensors: tensor a: 8 bytes for dtype and shape of 12");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1),
            "safetensors: tensor a: a shape that is no whole number of bytes");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"Q9","shape":[3],"data_offsets":[0,3]}})", 3),
            "safetensors: tensor a: unknown dtype Q9");
  EXPECT_EQ(
      WhyNot(R"({"a":{"dtype":"U8","shape":[9223372036854775808,4],"data_offsets":[0,3]}})", 3),
      "safetensors: tensor a: a shape that is no whole number of bytes");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[2,1]}})", 3),
            "safetensors: tensor a: data_offsets [2, 1] of 3 bytes");
}

TEST(Safetensors, RefusesByOffsetWhatIsNoHeader) {
  EXPECT_EQ(WhyNot("[]", 0), "safetensors: header, offset 0: an object was expected");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1),
            "safetensors: header, offset 28: -1 is no whole number of 64 bits without a sign");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"U8","shape":[1]}})", 1),
            "safetensors: header, offset 31: dtype, shape or data_offsets is missing");
  EXPECT_EQ(WhyNot(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1),
            "safetensors: header, offset 56: field x, unknown or a second time");
  EXPECT_EQ(WhyNot(R"({"__metadata__":{"k":1}})", 0),
            "safetensors: header, offset 21: a string was expected");
  EXPECT_EQ(WhyNot(R"({"__metadata__":{},"__metadata__":{}})", 0),
            "safetensors: header, offset 34: tensor __metadata__ stands twice");
  EXPECT_EQ(WhyNot("{\"a\xff\":1}", 0),
            "safetensors: header, offset 3: a string that is not UTF-8");
  EXPECT_EQ(WhyNot("{} x", 0), "safetensors: header, offset 3: something follows the value");
  EXPECT_EQ(WhyNot("{", 0), "safetensors: header, offset 1: a string was expected");
  EXPECT_EQ(ParseSafetensors(Head("{}"), 9).error().message,
            "safetensors: offset 0: a header of 2 bytes in a file of 9; it is truncated");
  std::string large(8, '\xff');
  EXPECT_NE(ParseSafetensors(large, 1u << 30).error().message.find("the limit is 100000000"),
            std::string::npos);
}

TEST(Safetensors, DeepNestingIsRefusedWithoutACrash) {
  std::string deep = R"({"__metadata__":)" + std::string(1'000'000, '[');
  EXPECT_NE(WhyNot(deep, 0), "read");
  JsonReader in(std::string_view(deep).substr(16));
  EXPECT_FALSE(in.Skip());
  EXPECT_NE(in.error().find("nested deeper than 512"), std::string::npos) << in.error();
}

TEST(Safetensors, WhatIsBuiltIsReadAgain) {
  Safetensors file;
  file.metadata = {{"k\n\"", "v \xc3\xa9 \x01"}};
  file.tensors = {{"a", "F32", {2, 1}, 0, 8}, {"e", "I64", {0, 5}, 8, 8}, {"s", "BF16", {}, 8, 10}};
  auto head = BuildSafetensorsHead(file);
  ASSERT_TRUE(head.ok()) << head.error().message;
  EXPECT_EQ(head.value().size() % 64, 0u);
  auto parsed = ParseSafetensors(head.value(), head.value().size() + 10);
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  EXPECT_EQ(parsed.value().metadata, file.metadata);
  ASSERT_EQ(parsed.value().tensors.size(), 3u);
  EXPECT_EQ(parsed.value().tensors[2].name, "s");
}

TEST(Table, NamesEveryTensorByItsPath) {
  const HandSlot slot = MakeSlot("demo", 1, 1, 0, 1);
  const auto& f = slot.content.fields;
  const std::string text(reinterpret_cast<const char*>(slot.payload.data()) + f.table_offset,
                         f.table_bytes);
  auto table = ReadTable(text, f.table_offset);
  ASSERT_TRUE(table.ok()) << table.error().message;
  std::vector<std::string> names;
  for (const TableEntry& e : table.value().entries) names.push_back(e.name);
  EXPECT_EQ(names, (std::vector<std::string>{"model.weight", "model.tied", "model.none", "model.z",
                                             "model.big", "extra.5.0"}));
  EXPECT_EQ(table.value().entries[3].bytes, 48u);
}

TEST(Table, RefusesWhatPointsBeyondTheData) {
  const auto why = [](const std::string& root) {
    auto table = ReadTable("{\"format\":1,\"meta\":{},\"root\":" + root + "}", 64);
    return table.ok() ? "read" : table.error().message;
  };
  EXPECT_EQ(why(R"({"T":["float32",[16],0]})"), "read");
  EXPECT_EQ(why(R"({"T":["float32",[16],4]})"),
            "the state's table: offset 52: state: 64 bytes at 4 end beyond the data's 64");
  EXPECT_EQ(why(R"({"T":["float32",[4294967296,4294967296],0]})"),
            "the state's table: offset 71: state: a shape beyond 64 bits");
  EXPECT_EQ(why(R"({"T":["float32",[1]]})"),
            "the state's table: offset 49: a tensor without an offset");
  EXPECT_EQ(why(R"({"T":["float32",[1],0],"d":[]})"),
            "the state's table: offset 56: a node of two kinds, d");
  EXPECT_EQ(why(R"({"future":[1,2]})"), "read");
  EXPECT_EQ(ReadTable("{\"format\":2,\"root\":1}", 0).error().message,
            "the state's table: offset 21: format 2, a root; this release reads format 1 with one");
}

TEST(ShardFile, TiedTensorsAreWrittenOnceAndNothingIsLost) {
  const HandSlot slot = MakeSlot("demo", 3, 2, 1, 4);
  std::string text;
  auto head = MakeShardHead(slot.content, &text);
  ASSERT_TRUE(head.ok()) << head.error().message;
  const auto& metadata = head.value().file.metadata;
  EXPECT_EQ(metadata.at("everstep.shared"), "{\"model.tied\":\"model.weight\"}");
  std::uint64_t covered = 0;
  for (const auto& e : head.value().file.tensors) covered += e.bytes();
  EXPECT_LE(covered, slot.content.fields.table_offset);
  auto again = ParseShardHead(text, head.value().file_bytes());
  ASSERT_TRUE(again.ok()) << again.error().message;
  EXPECT_EQ(again.value().offsets, head.value().offsets);
  EXPECT_EQ(again.value().file_crc(), head.value().file_crc());
  EXPECT_EQ(again.value().job, "demo");
}

Manifest TwoRanks() {
  Manifest m{.job = "demo \"x\"",
             .generation = 7,
             .step = 1240,
             .world_size = 2,
             .replicated_layout = true,
             .captured_ns = 1,
             .sealed_ns = 2,
             .writer = "everstep"};
  for (Rank r = 0; r < 2; ++r) {
    m.ranks.push_back({.rank = r,
                       .file = "rank-" + std::to_string(r),
                       .bytes = 100,
                       .crc32c = 0xdeadbeef,
                       .head_bytes = 64,
                       .head_crc32c = 1,
                       .crc_root = 2,
                       .payload_bytes = 90});
  }
  return m;
}

TEST(Manifest, GoesBothWaysAndEveryTruncationAndFlipIsKnown) {
  const std::string text = WriteManifest(TwoRanks());
  auto parsed = ParseManifest(text);
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  EXPECT_EQ(parsed.value(), TwoRanks());
  for (std::size_t n = 0; n < text.size(); ++n) {
    auto cut = ParseManifest(text.substr(0, n));
    ASSERT_FALSE(cut.ok());
    EXPECT_EQ(cut.error().code, ErrorCode::kCorrupt);
    std::string flipped = text;
    flipped[n] = static_cast<char>(flipped[n] ^ 1);
    EXPECT_FALSE(ParseManifest(flipped).ok()) << n;
  }
}

TEST(Manifest, SaysThatEachFileIsAShareAndOlderOnesDoNot) {
  Manifest m = TwoRanks();
  EXPECT_EQ(WriteManifest(m).find("shares"), std::string::npos);
  m.replicated_layout = false;
  m.shares = true;
  auto parsed = ParseManifest(WriteManifest(m));
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  EXPECT_EQ(parsed.value(), m);
}

TEST(Manifest, AWholeOneThatSaysWhatCannotBeIsRefusedByField) {
  Manifest m = TwoRanks();
  m.ranks[1].file = "../../etc/passwd";
  EXPECT_NE(ParseManifest(WriteManifest(m)).error().message.find("leaves its folder"),
            std::string::npos);
  m = TwoRanks();
  m.ranks[1].rank = 5;
  EXPECT_NE(ParseManifest(WriteManifest(m)).error().message.find("rank 5 where rank 1"),
            std::string::npos);
  m = TwoRanks();
  m.world_size = 3;
  EXPECT_NE(ParseManifest(WriteManifest(m)).error().message.find("2 files for a world of 3"),
            std::string::npos);
  m = TwoRanks();
  m.step = -4;
  EXPECT_FALSE(ParseManifest(WriteManifest(m)).ok());
}

}  // namespace
}  // namespace everstep::checkpoint
