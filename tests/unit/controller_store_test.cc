// The stores: what was written is read back, in order; a deletion deletes; a fault is told, not
// hidden.
#include <gtest/gtest.h>

#include "controller/store/memory_store.h"

namespace everstep::controller {
namespace {

JournalRecord Line(std::uint64_t sequence) {
  return {.sequence = sequence, .type = "node_lost", .message = "n" + std::to_string(sequence)};
}

std::vector<Record> LoadAll(RecordStore* store) {
  std::vector<Record> records;
  const StoreStatus status = store->Load(&records);
  EXPECT_TRUE(status.ok()) << status.message;
  return records;
}

TEST(RecordKey, JournalKeysSortByHistory) {
  EXPECT_LT(JournalKey(9), JournalKey(10));
  EXPECT_LT(JournalKey(255), JournalKey(256));
  EXPECT_EQ(JournalKey(1).size(), 8u);
  EXPECT_EQ(KeyOf(GenerationRecord{.plan = {.job = "a", .generation = 12}}).key, "a/12");
}

TEST(MemoryStore, LastWriteOfAKeyCountsAndDeletionsDelete) {
  MemoryStore store;
  const std::vector<Record> first = {NodeRecord{.node = "n1", .incarnation = 1}, Line(2), Line(1)};
  ASSERT_TRUE(store.Write(first, {}).ok());
  const std::vector<Record> second = {NodeRecord{.node = "n1", .incarnation = 2}};
  const std::vector<Deletion> gone = {{Deletion::Table::kJournal, JournalKey(1)}};
  ASSERT_TRUE(store.Write(second, gone).ok());
  const std::vector<Record> records = LoadAll(&store);
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(std::get<NodeRecord>(records[0]).incarnation, 2u);
  EXPECT_EQ(std::get<JournalRecord>(records[1]).sequence, 2u);
}

TEST(FaultStore, FailsWhenToldAndMayHaveAppliedTheBatch) {
  MemoryStore memory;
  FaultStore store(&memory);
  const std::vector<Record> one = {Line(1)};
  const std::vector<Record> two = {Line(2)};
  store.FailAfter(1, {StoreCode::kNoSpace, "disk full"});
  EXPECT_TRUE(store.Write(one, {}).ok());
  EXPECT_EQ(store.Write(two, {}).code, StoreCode::kNoSpace);
  EXPECT_EQ(store.Write(two, {}).code, StoreCode::kNoSpace);
  EXPECT_EQ(memory.size(), 1u);
  store.FailAfter(0, {StoreCode::kUnavailable, "lost"}, /*applied=*/true);
  EXPECT_FALSE(store.Write(two, {}).ok());
  EXPECT_EQ(memory.size(), 2u);
  store.Heal();
  EXPECT_TRUE(store.Write(one, {}).ok());
}

}  // namespace
}  // namespace everstep::controller
