#include "controller/store/record_store.h"

#include <fmt/format.h>

namespace everstep::controller {

const char* StoreCodeName(StoreCode code) {
  switch (code) {
    case StoreCode::kOk: return "ok";
    case StoreCode::kNoSpace: return "no_space";
    case StoreCode::kLocked: return "locked";
    case StoreCode::kCorrupt: return "corrupt";
    case StoreCode::kTooNew: return "too_new";
    case StoreCode::kUnavailable: return "unavailable";
  }
  return "unknown";
}

std::string JournalKey(std::uint64_t sequence) {
  std::string key(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    key[i] = static_cast<char>((sequence >> (8 * (7 - i))) & 0xFF);
  }
  return key;
}

RecordKey KeyOf(const Record& record) {
  using Table = Deletion::Table;
  struct {
    RecordKey operator()(const NodeRecord& r) const { return {Table::kNode, r.node}; }
    RecordKey operator()(const JobRecord& r) const { return {Table::kJob, r.spec.job}; }
    RecordKey operator()(const GenerationRecord& r) const {
      return {Table::kGeneration, fmt::format("{}/{}", r.plan.job, r.plan.generation)};
    }
    RecordKey operator()(const CommitRecord& r) const { return {Table::kCommit, r.job}; }
    RecordKey operator()(const JournalRecord& r) const {
      return {Table::kJournal, JournalKey(r.sequence)};
    }
    RecordKey operator()(const LedgerRecord& r) const { return {Table::kLedger, r.job}; }
    RecordKey operator()(const LayoutRecord& r) const {
      return {Table::kLayout, fmt::format("{}/{}", r.job, r.generation)};
    }
    RecordKey operator()(const ToldRecord& r) const {
      return {Table::kTold, fmt::format("{}/{}", r.job, r.kind)};
    }
  } key;
  return std::visit(key, record);
}

}  // namespace everstep::controller
