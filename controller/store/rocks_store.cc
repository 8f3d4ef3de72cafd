#include "controller/store/rocks_store.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <utility>

#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/iterator.h>
#include <rocksdb/write_batch.h>

#include "controller/store/convert.h"
#include "proto/base/check.h"

namespace everstep::controller {
namespace {

using Table = Deletion::Table;

constexpr char kHeaderKey[] = "header";
constexpr char kStartsKey[] = "starts";

// The column families, in the order in which Load gives their records.
constexpr std::array<Table, 8> kTables = {Table::kNode,   Table::kJob,     Table::kGeneration,
                                          Table::kCommit, Table::kJournal, Table::kLedger,
                                          Table::kLayout, Table::kTold};
constexpr std::array<const char*, kTables.size()> kFamilies = {
    "node", "job", "generation", "commit", "journal", "ledger", "layout", "told"};

std::size_t Place(Table table) {
  const auto found = std::find(kTables.begin(), kTables.end(), table);
  EVERSTEP_CHECK(found != kTables.end());
  return static_cast<std::size_t>(found - kTables.begin());
}

// "pid 4711 (everstep-control)" of the process that holds DIR/LOCK; "another process" when the
// kernel does not tell.
std::string LockHolder(const std::string& directory) {
  const int fd = open((directory + "/LOCK").c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return "another process";
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  const bool asked = fcntl(fd, F_GETLK, &lock) == 0;
  // Closing drops this process's own locks on the file: REQUIRES that the holder is another one.
  close(fd);
  if (!asked || lock.l_type == F_UNLCK || lock.l_pid <= 0) return "another process";
  std::string name;
  std::ifstream("/proc/" + std::to_string(lock.l_pid) + "/comm") >> name;
  return name.empty() ? fmt::format("pid {}", lock.l_pid)
                      : fmt::format("pid {} ({})", lock.l_pid, name);
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
  const bool read_only = text.find("Read-only file system") != std::string::npos;
  const bool forbidden = text.find("Permission denied") != std::string::npos;
  if (!read_only && !forbidden && text.find("lock ") != std::string::npos &&
      text.find("LOCK") != std::string::npos) {
    const bool ours = text.find("current process") != std::string::npos;
    return {StoreCode::kLocked,
            fmt::format("cannot {} the store in {}: {} has it open; stop that controller, or give "
                        "this one another --state-dir",
                        action, directory, ours ? "this process" : LockHolder(directory))};
  }
  if (status.IsCorruption()) {
    return {
        StoreCode::kCorrupt,
        fmt::format("cannot {} the store in {}: it is damaged ({}); restore the state "
                    "directory from a copy, or start with an empty one and submit the jobs anew",
                    action, directory, text)};
  }
  return {StoreCode::kUnavailable,
          fmt::format("cannot {} the store in {}: {} ({})", action, directory,
                      read_only ? "its file system is read-only; mount it writable, or give "
                                  "another --state-dir"
                      : forbidden
                          ? "this user may not write there; run as the directory's owner, or give "
                            "another --state-dir"
                          : "the disk does not answer as it should; check that the directory's "
                            "parent exists and is on a local disk",
                      text)};
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
  options.create_missing_column_families = true;
  options.atomic_flush = true;  // a batch spans families: they come back from disk together
  options.paranoid_checks = true;
  // A torn last write was never acknowledged; a hole before it means damage.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.max_open_files = 128;
  options.write_buffer_size =
      2 << 20;  // memory; a flush writes 2 MiB once in some thousand decisions
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
  ~Db() {
    for (rocksdb::ColumnFamilyHandle* family : handles) db->DestroyColumnFamilyHandle(family);
  }
  rocksdb::ColumnFamilyHandle* Family(Table table) const { return families[Place(table)]; }

  std::unique_ptr<rocksdb::DB> db;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;  // all that were opened
  std::array<rocksdb::ColumnFamilyHandle*, kTables.size()> families{};
  std::atomic<StoreCode> last{StoreCode::kOk};
};

RocksStore::RocksStore() : db_(std::make_unique<Db>()) {}
RocksStore::~RocksStore() = default;

std::unique_ptr<RocksStore> RocksStore::Open(const RocksOptions& options, StoreStatus* status) {
  std::unique_ptr<RocksStore> store(new RocksStore());
  store->directory_ = options.directory;
  rocksdb::Options db_options = DbOptions();
  if (options.env != nullptr) db_options.env = options.env;
  // A newer version may have families that this one does not know: they are opened, too, so that
  // the header can be read and the refusal can name the version.
  std::vector<std::string> names = {rocksdb::kDefaultColumnFamilyName};
  names.insert(names.end(), kFamilies.begin(), kFamilies.end());
  std::vector<std::string> present;  // none when the store is new
  (void)rocksdb::DB::ListColumnFamilies(db_options, options.directory, &present).ok();
  for (const std::string& name : present) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
  descriptors.reserve(names.size());
  for (const std::string& name : names) descriptors.emplace_back(name, db_options);
  rocksdb::DB* raw = nullptr;
  *status = Translate(
      rocksdb::DB::Open(db_options, options.directory, descriptors, &store->db_->handles, &raw),
      options.directory, "open");
  if (!status->ok()) return nullptr;
  store->db_->db.reset(raw);
  for (std::size_t i = 0; i < kTables.size(); ++i) {
    store->db_->families[i] = store->db_->handles[i + 1];
  }
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
  for (const Table table : kTables) {
    const std::unique_ptr<rocksdb::Iterator> it(db_->db->NewIterator(read, db_->Family(table)));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      const RecordKey key = {table, it->key().ToString()};
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
    batch.Put(db_->Family(key.table), key.key, EncodeRecord(record));
  }
  for (const Deletion& deletion : deletions) {
    batch.Delete(db_->Family(deletion.table), deletion.key);
  }
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
