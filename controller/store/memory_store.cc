#include "controller/store/memory_store.h"

#include <utility>

namespace everstep::controller {

MemoryStore::MemoryStore(std::string cluster) {
  info_.cluster = std::move(cluster);
  info_.starts = 1;
}

StoreStatus MemoryStore::Load(std::vector<Record>* out) {
  out->clear();
  out->reserve(records_.size());
  for (const auto& [key, record] : records_) out->push_back(record);
  return {};
}

StoreStatus MemoryStore::Write(std::span<const Record> records,
                               std::span<const Deletion> deletions) {
  for (const Record& record : records) records_[KeyOf(record)] = record;
  for (const Deletion& deletion : deletions) records_.erase({deletion.table, deletion.key});
  ++batches_;
  return {};
}

void FaultStore::FailAfter(std::uint64_t writes, StoreStatus status, bool applied) {
  armed_ = true;
  left_ = writes;
  status_ = std::move(status);
  applied_ = applied;
}

StoreStatus FaultStore::Write(std::span<const Record> records,
                              std::span<const Deletion> deletions) {
  if (!armed_ || left_ > 0) {
    if (armed_) --left_;
    return inner_->Write(records, deletions);
  }
  if (applied_) {
    StoreStatus reached = inner_->Write(records, deletions);
    if (!reached.ok()) return reached;
  }
  return status_;
}

}  // namespace everstep::controller
