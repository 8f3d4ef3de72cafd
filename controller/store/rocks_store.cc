#include "controller/store/rocks_store.h"

#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <utility>

#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/iterator.h>
#include <rocksdb/write_batch.h>

#include "controller/store/convert.h"

namespace everstep::controller {
namespace {

using Table = Deletion::Table;

constexpr char kHeaderKey[] = "header";
constexpr char kStartsKey[] = "starts";

char Letter(Table table) {
  switch (table) {
    case Table::kNode: return 'n';
    case Table::kJob: return 'j';
    case Table::kGeneration: return 'g';
    case Table::kCommit: return 'c';
    case Table::kJournal: return 'J';
  }
  return '?';
}

std::string DiskKey(Table table, std::string_view key) {
  return fmt::format("{}/{}", Letter(table), key);
}

StoreStatus Translate(const rocksdb::Status& status, const std::string& directory,
                      std::string_view action) {
  if (status.ok()) return {};
  const std::string text = status.ToString();
  if (status.IsNoSpace() || text.find("No space left") != std::string::npos ||
      text.find("Disk quota exceeded") != std::string::npos) {
    return {StoreCode::kNoSpace,
            fmt::format("cannot {} the store in {}: no space left on its disk ({}); free some or "
                        "move the state directory, then start the controller again",
                        action, directory, text)};
  }
  if (text.find("lock") != std::string::npos &&
      (text.find("LOCK") != std::string::npos ||
       text.find("While lock file") != std::string::npos)) {
    return {StoreCode::kLocked,
            fmt::format("cannot {} the store in {}: another process has it open ({}); stop the "
                        "other controller, or give this one another --state-dir",
                        action, directory, text)};
  }
  if (status.IsCorruption()) {
    return {
        StoreCode::kCorrupt,
        fmt::format("cannot {} the store in {}: it is damaged ({}); restore the state "
                    "directory from a copy, or start with an empty one and submit the jobs anew",
                    action, directory, text)};
  }
  return {StoreCode::kUnavailable,
          fmt::format("cannot {} the store in {}: {}; check that the directory exists, is on a "
                      "local disk and belongs to this user",
                      action, directory, text)};
}

// Random bytes for an identity; falls back to the pid only where the kernel has none.
std::string RandomId() {
  unsigned char bytes[8] = {};
  if (getrandom(bytes, sizeof(bytes), 0) != static_cast<ssize_t>(sizeof(bytes))) {
    return fmt::format("{:016x}", static_cast<std::uint64_t>(getpid()));
  }
  std::string id;
  for (const unsigned char b : bytes) id += fmt::format("{:02x}", b);
  return id;
}

rocksdb::Options DbOptions() {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.paranoid_checks = true;
  // A torn last write was never acknowledged; a hole before it means damage.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.max_open_files = 128;
  options.write_buffer_size = 8 << 20;
  options.max_write_buffer_number = 2;
  options.max_background_jobs = 2;
  options.keep_log_file_num = 2;
  options.max_log_file_size = 1 << 20;
  options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  options.compression = rocksdb::kNoCompression;
  options.avoid_flush_during_shutdown = true;  // the log is synced already
  return options;
}

}  // namespace

struct RocksStore::Db {
  std::unique_ptr<rocksdb::DB> db;
  std::atomic<StoreCode> last{StoreCode::kOk};
};

RocksStore::RocksStore() : db_(std::make_unique<Db>()) {}
RocksStore::~RocksStore() = default;

std::unique_ptr<RocksStore> RocksStore::Open(const RocksOptions& options, StoreStatus* status) {
  std::unique_ptr<RocksStore> store(new RocksStore());
  store->directory_ = options.directory;
  rocksdb::DB* raw = nullptr;
  rocksdb::Options db_options = DbOptions();
  if (options.env != nullptr) db_options.env = options.env;
  *status =
      Translate(rocksdb::DB::Open(db_options, options.directory, &raw), options.directory, "open");
  if (!status->ok()) return nullptr;
  store->db_->db.reset(raw);
  *status = store->ReadHeader(options);
  if (!status->ok()) return nullptr;
  return store;
}

StoreStatus RocksStore::ReadHeader(const RocksOptions& options) {
  rocksdb::DB& db = *db_->db;
  std::string value;
  v1::StoreHeader header;
  const rocksdb::Status got = db.Get({}, kHeaderKey, &value);
  if (got.ok()) {
    if (!header.ParseFromString(value)) {
      return {StoreCode::kCorrupt, fmt::format("the header of the store in {} does not parse: "
                                               "restore the state directory from a copy",
                                               directory_)};
    }
    if (header.format() > kRecordFormat) {
      return {StoreCode::kTooNew,
              fmt::format("the store in {} has format {} (written by {}), this version reads up to "
                          "{}: start the newer version",
                          directory_, header.format(), header.product_version(), kRecordFormat)};
    }
    if (!options.cluster.empty() && options.cluster != header.cluster()) {
      return {StoreCode::kUnavailable,
              fmt::format("the store in {} belongs to cluster {}, not {}: leave --cluster away, or "
                          "give another --state-dir",
                          directory_, header.cluster(), options.cluster)};
    }
  } else if (got.IsNotFound()) {
    header.set_cluster(options.cluster.empty() ? RandomId() : options.cluster);
  } else {
    return Translate(got, directory_, "read");
  }
  header.set_format(kRecordFormat);
  header.set_product_version(options.product_version);
  std::uint64_t starts = 0;
  std::string counter;
  const rocksdb::Status counted = db.Get({}, kStartsKey, &counter);
  if (counted.ok()) {
    starts = std::strtoull(counter.c_str(), nullptr, 10);
  } else if (!counted.IsNotFound()) {
    return Translate(counted, directory_, "read");
  }
  ++starts;
  rocksdb::WriteBatch batch;
  batch.Put(kHeaderKey, header.SerializeAsString());
  batch.Put(kStartsKey, std::to_string(starts));
  rocksdb::WriteOptions write;
  write.sync = true;
  info_ = {header.cluster(), starts, options.product_version};
  return Translate(db.Write(write, &batch), directory_, "write");
}

StoreStatus RocksStore::Load(std::vector<Record>* out) {
  out->clear();
  rocksdb::ReadOptions read;
  read.verify_checksums = true;
  const std::unique_ptr<rocksdb::Iterator> it(db_->db->NewIterator(read));
  for (const Table table :
       {Table::kNode, Table::kJob, Table::kGeneration, Table::kCommit, Table::kJournal}) {
    const std::string prefix = DiskKey(table, "");
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      const RecordKey key = {table, it->key().ToString().substr(prefix.size())};
      Record record;
      const StoreStatus status =
          DecodeRecord(key, {it->value().data(), it->value().size()}, &record);
      if (!status.ok()) return {status.code, fmt::format("{} ({})", status.message, directory_)};
      if (KeyOf(record) != key) {
        return {StoreCode::kCorrupt,
                fmt::format("the store in {} keeps a record under a key that is "
                            "not its own; restore it from a copy",
                            directory_)};
      }
      out->push_back(std::move(record));
    }
    if (!it->status().ok()) return Translate(it->status(), directory_, "read");
  }
  return {};
}

StoreStatus RocksStore::Write(std::span<const Record> records,
                              std::span<const Deletion> deletions) {
  if (records.empty() && deletions.empty()) return {};
  rocksdb::WriteBatch batch;
  for (const Record& record : records) {
    const RecordKey key = KeyOf(record);
    batch.Put(DiskKey(key.table, key.key), EncodeRecord(record));
  }
  for (const Deletion& deletion : deletions) batch.Delete(DiskKey(deletion.table, deletion.key));
  rocksdb::WriteOptions write;
  write.sync = true;
  StoreStatus status = Translate(db_->db->Write(write, &batch), directory_, "write");
  db_->last = status.code;
  return status;
}

std::string RocksStore::Describe() const {
  return fmt::format("rocksdb {}", StoreCodeName(db_->last));
}

}  // namespace everstep::controller
