// Where a controller keeps its durable state: whole records, one per key, written in synced
// batches.
//
// The brain (controller/server) is the only caller. Implementations: MemoryStore (tests,
// simulator), RocksStore (production), FaultStore (wraps either and fails on demand).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "controller/core/decision.h"

namespace everstep::controller {

// What an environment did to us, as a value; nothing is thrown.
enum class StoreCode : std::uint8_t {
  kOk,
  kNoSpace,      // ENOSPC or EDQUOT
  kLocked,       // another process has the store open
  kCorrupt,      // a record or file fails its checksum; nothing of it is used
  kTooNew,       // written by a newer major format
  kUnavailable,  // any other I/O error
};
const char* StoreCodeName(StoreCode code);  // "no_space"

struct [[nodiscard]] StoreStatus {
  StoreCode code = StoreCode::kOk;
  std::string message;  // who, what, the limit, what to do next; empty when ok
  bool ok() const { return code == StoreCode::kOk; }
};

// Said once, when a store is opened.
struct StoreInfo {
  std::string cluster;       // random id, made when the store was
  std::uint64_t starts = 0;  // times this store was opened for writing, this one included
  std::string product_version;
};

// Table and key of a record, as in proto/record.proto.
struct RecordKey {
  Deletion::Table table;
  std::string key;
  friend auto operator<=>(const RecordKey&, const RecordKey&) = default;
};
RecordKey KeyOf(const Record& record);
// The journal's key: eight bytes, most significant first, so that key order is history's order.
std::string JournalKey(std::uint64_t sequence);

// Not thread-safe: one owner thread (the brain), except Describe(). Writes block until the bytes
// are durable.
class RecordStore {
 public:
  virtual ~RecordStore() = default;

  // Every record, ordered by table and key. REQUIRES: called before the first Write.
  virtual StoreStatus Load(std::vector<Record>* out) = 0;

  // All records, then all deletions, as one atomic batch; durable when it returns ok. After an
  // error the batch is either whole or absent and the caller must not go on as if it knew which:
  // the process ends and recovery reads the store again.
  virtual StoreStatus Write(std::span<const Record> records,
                            std::span<const Deletion> deletions) = 0;

  virtual const StoreInfo& info() const = 0;

  // "rocksdb ok", for `everstep status`. Thread-safe.
  virtual std::string Describe() const = 0;
};

}  // namespace everstep::controller
