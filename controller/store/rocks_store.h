// The RecordStore on disk: RocksDB, one write-ahead log, synced (fdatasync) once for each batch.
//
// Files: DIR/ is RocksDB's own. One column family for each table of proto/record.proto (node, job,
// generation, commit, journal), keys as KeyOf gives them; in the default family "header" holds the
// StoreHeader, "starts" a counter. Values are framed by EncodeRecord. What a crash cuts off the
// log's end was never acknowledged, and is dropped at the next open; damage anywhere before it is
// an error.
#pragma once

#include <memory>
#include <string>

#include "controller/store/record_store.h"

namespace rocksdb {
class Env;
}

namespace everstep::controller {

struct RocksOptions {
  std::string directory;  // made when absent, its parent must exist
  std::string cluster;  // wanted cluster id; empty: the store's own, or a random one when it is new
  std::string product_version;
  rocksdb::Env* env =
      nullptr;  // tests inject disk faults here; null: the real one. Must outlive the store.
};

class RocksStore final : public RecordStore {
 public:
  // Null and *status not ok: the text names the directory, what is wrong with it and what to do.
  static std::unique_ptr<RocksStore> Open(const RocksOptions& options, StoreStatus* status);
  ~RocksStore() override;

  StoreStatus Load(std::vector<Record>* out) override;
  StoreStatus Write(std::span<const Record> records, std::span<const Deletion> deletions) override;
  const StoreInfo& info() const override { return info_; }
  std::string Describe() const override;

 private:
  struct Db;
  RocksStore();
  StoreStatus ReadHeader(const RocksOptions& options);

  std::unique_ptr<Db> db_;
  std::string directory_;
  StoreInfo info_;
};

}  // namespace everstep::controller
