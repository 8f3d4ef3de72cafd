// The store on disk against what disks and machines do: a process killed between two batches, power
// lost, a log cut short, a byte turned, a full disk, two controllers on one directory.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>

#include <gtest/gtest.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>

#include "controller/store/convert.h"
#include "controller/store/rocks_store.h"
#include "proto/base/errno_text.h"

namespace everstep::controller {
namespace {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    const char* root = std::getenv("TMPDIR");  // NOLINT(concurrency-mt-unsafe): nobody sets it
    std::string name = std::string(root != nullptr ? root : "/tmp") + "/everstep-store-XXXXXX";
    path_ = mkdtemp(name.data()) != nullptr ? name : "";
  }
  ~TemporaryDirectory() {
    if (!path_.empty()) std::filesystem::remove_all(path_);
  }
  std::string db() const { return path_ + "/db"; }

 private:
  std::string path_;
};

// Turns what was not synced into nothing, as a power cut does; or has no space left.
class CrashEnv final : public rocksdb::EnvWrapper {
 public:
  CrashEnv() : EnvWrapper(rocksdb::Env::Default()) {}

  rocksdb::Status NewWritableFile(const std::string& name,
                                  std::unique_ptr<rocksdb::WritableFile>* out,
                                  const rocksdb::EnvOptions& options) override {
    if (read_only_) return rocksdb::Status::IOError("While open " + name, ErrnoText(EROFS));
    std::unique_ptr<rocksdb::WritableFile> real;
    rocksdb::Status status = EnvWrapper::NewWritableFile(name, &real, options);
    if (status.ok()) *out = std::make_unique<File>(this, name, std::move(real));
    return status;
  }
  void set_full(bool full) { full_ = full; }
  void set_read_only(bool read_only) { read_only_ = read_only; }

  void CutPower() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [name, synced] : synced_) {
      if (name.ends_with(".log")) {
        EXPECT_EQ(truncate(name.c_str(), static_cast<off_t>(synced)), 0) << name;
      }
    }
  }

 private:
  class File final : public rocksdb::WritableFileWrapper {
   public:
    File(CrashEnv* env, std::string name, std::unique_ptr<rocksdb::WritableFile> real)
        : WritableFileWrapper(real.get()),
          env_(env),
          name_(std::move(name)),
          real_(std::move(real)) {
      Synced(0);
    }
    rocksdb::Status Append(const rocksdb::Slice& data) override {
      if (env_->full_) return rocksdb::Status::NoSpace("No space left on device", name_);
      written_ += data.size();
      return WritableFileWrapper::Append(data);
    }
    rocksdb::Status Append(const rocksdb::Slice& data,
                           const rocksdb::DataVerificationInfo&) override {
      return Append(data);
    }
    rocksdb::Status Sync() override { return Done(WritableFileWrapper::Sync()); }
    rocksdb::Status Fsync() override { return Done(WritableFileWrapper::Fsync()); }

   private:
    rocksdb::Status Done(rocksdb::Status status) {
      if (status.ok()) Synced(written_);
      return status;
    }
    void Synced(std::uint64_t bytes) {
      std::lock_guard<std::mutex> lock(env_->mutex_);
      env_->synced_[name_] = bytes;
    }
    CrashEnv* env_;
    std::string name_;
    std::unique_ptr<rocksdb::WritableFile> real_;
    std::uint64_t written_ = 0;
  };

  std::atomic<bool> full_{false};
  std::atomic<bool> read_only_{false};
  std::mutex mutex_;
  std::map<std::string, std::uint64_t> synced_;
};

JournalRecord Line(std::uint64_t sequence) {
  return {.sequence = sequence, .type = "node_lost", .message = "line " + std::to_string(sequence)};
}

std::unique_ptr<RocksStore> Open(const std::string& directory, rocksdb::Env* env = nullptr) {
  StoreStatus status;
  auto store = RocksStore::Open({.directory = directory, .env = env}, &status);
  EXPECT_TRUE(status.ok()) << status.message;
  return store;
}

StoreStatus WriteOne(RecordStore* store, Record record) {
  const std::vector<Record> records = {std::move(record)};
  return store->Write(records, {});
}

std::vector<Record> LoadAll(RecordStore* store) {
  std::vector<Record> records;
  const StoreStatus status = store->Load(&records);
  EXPECT_TRUE(status.ok()) << status.message;
  return records;
}

// The newest write-ahead log: highest number.
std::string LogFile(const std::string& directory) {
  std::string newest;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(directory, none)) {
    const std::string name = entry.path().filename();
    if (name.ends_with(".log") && name > newest) newest = name;
  }
  return directory + "/" + newest;
}

off_t SizeOf(const std::string& path) {
  std::ifstream in(path, std::ios::ate | std::ios::binary);
  return static_cast<off_t>(in.tellg());
}

// Every field different from its default, so that a forgotten one shows.
std::vector<Record> OneOfEach() {
  NodeRecord node{.node = "n1",
                  .incarnation = 7,
                  .keeper_id = 0xDEADBEEFCAFEULL,
                  .health = NodeHealth::kSuspect,
                  .draining = true,
                  .drain_reason = "disk",
                  .facts = {"10.0.0.1", 4711, 8, {{"rack", "r1"}}},
                  .leave_by = {77}};
  JobSpec spec{.job = "a.b-1",
               .min_nodes = 2,
               .max_nodes = 4,
               .nproc_per_node = 3,
               .spares = 1,
               .max_restarts = 5,
               .strict_restarts = true,
               .join_timeout = Seconds(9),
               .last_call = Milliseconds(30),
               .max_no_progress = 6,
               .max_start_failures = 7,
               .master_port = 29500,
               .only_nodes = {"n1", "n2"},
               .submitted = {123},
               .command = {}};
  v1::Command command;
  command.set_target("train.py");
  command.SerializeToString(&spec.command.opaque);
  const ExitInfo exit{-9, true, true, {5}, "{\"message\":1}", "/e.json", {6}, Milliseconds(7)};
  JobRecord job{
      .spec = spec,
      .state = JobState::kFailed,
      .generation = 3,
      .restarts = 2,
      .lost_capacity = 1,
      .start_failures = 4,
      .no_progress = 5,
      .best_step = 99,
      .end_reason = Reason::kRestartsExhausted,
      .end_message = "three times",
      .exit_code = 1,
      .started = {10},
      .ended = {20},
      .data_key = std::string("k\0y", 3),
      .memory_freed = true,
      .forgotten = true,
      .faults = {{1, Reason::kNodeLost, "node n1", "silent", "shrink", {1}, {2}, {3}, 4, 5, 6, 7}},
      .failures = {{.rank = 1, .local_rank = 2, .pid = 3, .running = false, .exit = exit}}};
  const HeldShard shard{1, 6, 3, 40, 0xABCD, 1 << 20, true, true};
  GenerationPlan plan{.job = "a.b-1",
                      .generation = 3,
                      .phase = Phase::kActivate,
                      .nodes = {},
                      .master_addr = "10.0.0.1",
                      .master_port = 5,
                      .restart_count = 2,
                      .restore_step = 40,
                      .reason = Reason::kNodeLost,
                      .evidence = "silent"};
  plan.nodes.push_back({"n1",
                        1,
                        "10.0.0.1",
                        4711,
                        {{3, 0, {40, 3, 2, 0xABCD, 1 << 20, "n2", "10.0.0.2:4711"}}},
                        {{"n2", "10.0.0.2:4711"}, {"n3", "10.0.0.3:4711"}}});
  CommitRecord commit{"a.b-1", {{3, 40, 6, 2, true, {shard}}}};
  JournalRecord line{.sequence = 300,
                     .time = {1},
                     .type = "node_lost",
                     .severity = Severity::kError,
                     .reason = Reason::kNodeLost,
                     .job = "a.b-1",
                     .node = "n1",
                     .rank = 4,
                     .generation = 3,
                     .message = "m",
                     .evidence = "e"};
  LedgerRecord ledger{.job = "a.b-1", .generation = 3, .first = 5, .next = 40};
  ledger.runs = {{7, 20, 2, {}}, {20, 40, 3, {{0, 5, 2, 1}, {5, 8, 3, 0}}}};
  ledger.folded_end = 7;
  ledger.folded_runs = 2;
  ledger.roll_backs = {{3, 21, 20, Reason::kNodeLost, "silent", {9}}};
  ledger.findings = {{"gap", 7, 2, "step 7 was never told"}};
  ledger.roll_back_count = ledger.finding_count = 1;
  ledger.lines = 36;
  ledger.retold = 3;
  ledger.stale = 4;
  ledger.taken_back = 5;
  ledger.missing = 6;
  ledger.digest = 0xD16E57;
  ledger.samples = 0x5A;
  ledger.loss_bits = 0x4002666666666666;
  ledger.time = {11};
  const LayoutRecord layout{"a.b-1", 3, 20, 8, {{0, 5, {0, 1}, {"n1", "n2"}}, {5, 8, {2}, {}}},
                            {12}};
  const ToldRecord told{"a.b-1", "plan", 3, 1, std::string("p\0q", 3), {13}, {"n1", "", "n2"}};
  return {node, job, GenerationRecord{plan}, commit, line, ledger, layout, told};
}

TEST(RecordFormat, EveryFieldOfEveryRecordSurvives) {
  for (const Record& record : OneOfEach()) {
    Record back;
    const StoreStatus status = DecodeRecord(KeyOf(record), EncodeRecord(record), &back);
    ASSERT_TRUE(status.ok()) << status.message;
    EXPECT_EQ(EncodeRecord(back), EncodeRecord(record)) << KeyOf(record).key;
  }
  const std::vector<Record> all = OneOfEach();
  Record back;
  ASSERT_TRUE(DecodeRecord(KeyOf(all[0]), EncodeRecord(all[0]), &back).ok());
  EXPECT_EQ(std::get<NodeRecord>(back).facts, std::get<NodeRecord>(all[0]).facts);
  EXPECT_EQ(std::get<NodeRecord>(back).keeper_id, 0xDEADBEEFCAFEULL);
  EXPECT_EQ(std::get<NodeRecord>(back).leave_by, Timestamp{77});
  ASSERT_TRUE(DecodeRecord(KeyOf(all[1]), EncodeRecord(all[1]), &back).ok());
  EXPECT_EQ(std::get<JobRecord>(back).spec, std::get<JobRecord>(all[1]).spec);
  EXPECT_EQ(std::get<JobRecord>(back).faults, std::get<JobRecord>(all[1]).faults);
  EXPECT_EQ(std::get<JobRecord>(back).failures, std::get<JobRecord>(all[1]).failures);
  ASSERT_TRUE(DecodeRecord(KeyOf(all[2]), EncodeRecord(all[2]), &back).ok());
  EXPECT_EQ(std::get<GenerationRecord>(back).plan, std::get<GenerationRecord>(all[2]).plan);
  ASSERT_TRUE(DecodeRecord(KeyOf(all[3]), EncodeRecord(all[3]), &back).ok());
  EXPECT_EQ(std::get<CommitRecord>(back).commits, std::get<CommitRecord>(all[3]).commits);
  ASSERT_TRUE(DecodeRecord(KeyOf(all[5]), EncodeRecord(all[5]), &back).ok());
  EXPECT_EQ(std::get<LedgerRecord>(back), std::get<LedgerRecord>(all[5]));
  ASSERT_TRUE(DecodeRecord(KeyOf(all[6]), EncodeRecord(all[6]), &back).ok());
  EXPECT_EQ(std::get<LayoutRecord>(back), std::get<LayoutRecord>(all[6]));
  ASSERT_TRUE(DecodeRecord(KeyOf(all[7]), EncodeRecord(all[7]), &back).ok());
  EXPECT_EQ(std::get<ToldRecord>(back), std::get<ToldRecord>(all[7]));
}

TEST(RecordFormat, AnyTurnedBitOrForeignKeyIsCorrupt) {
  const Record record = OneOfEach()[0];
  const std::string good = EncodeRecord(record);
  Record back;
  for (std::size_t bit = 8; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_EQ(DecodeRecord(KeyOf(record), bad, &back).code, StoreCode::kCorrupt) << bit;
  }
  EXPECT_EQ(DecodeRecord({Deletion::Table::kNode, "n2"}, good, &back).code, StoreCode::kCorrupt);
  EXPECT_EQ(DecodeRecord(KeyOf(record), good.substr(0, 3), &back).code, StoreCode::kCorrupt);
  std::string newer = good;
  newer[0] = kRecordFormat + 1;
  EXPECT_EQ(DecodeRecord(KeyOf(record), newer, &back).code, StoreCode::kTooNew);
}

TEST(Snapshot, HoldsAllButTheJournal) {
  v1::StoreSnapshot snapshot;
  ToSnapshot(OneOfEach(), &snapshot);
  std::vector<Record> back;
  ASSERT_TRUE(FromSnapshot(snapshot, &back));
  std::vector<Record> all = OneOfEach();
  std::erase_if(all, [](const Record& r) { return std::holds_alternative<JournalRecord>(r); });
  ASSERT_EQ(back.size(), all.size());
  for (std::size_t i = 0; i < back.size(); ++i) {
    EXPECT_EQ(EncodeRecord(back[i]), EncodeRecord(all[i]));
  }
  snapshot.mutable_jobs(0)->set_state(77);
  EXPECT_FALSE(FromSnapshot(snapshot, &back));
}

TEST(RocksStore, ReopensWithWhatWasWrittenAndDeleted) {
  TemporaryDirectory dir;
  std::string cluster;
  {
    auto store = Open(dir.db());
    ASSERT_NE(store, nullptr);
    ASSERT_TRUE(store->Write(OneOfEach(), {}).ok());
    ASSERT_TRUE(WriteOne(store.get(), Line(2)).ok());
    const std::vector<Deletion> gone = {{Deletion::Table::kJournal, JournalKey(300)},
                                        {Deletion::Table::kGeneration, "a.b-1/3"}};
    ASSERT_TRUE(store->Write({}, gone).ok());
    cluster = store->info().cluster;
    EXPECT_EQ(store->info().starts, 1u);
    EXPECT_EQ(store->Describe(), "rocksdb ok");
  }
  auto store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(store->info().cluster, cluster);
  EXPECT_EQ(cluster.size(), 16u);
  EXPECT_EQ(store->info().starts, 2u);
  const std::vector<Record> records = LoadAll(store.get());
  ASSERT_EQ(records.size(), 7u);
  EXPECT_EQ(EncodeRecord(records[1]), EncodeRecord(OneOfEach()[1]));
  EXPECT_EQ(std::get<JournalRecord>(records[3]).sequence, 2u);
}

// Batch i of the child below: three tables and a deletion at once.
StoreStatus WriteBatch(RecordStore* store, std::uint64_t i) {
  JobRecord job;
  job.spec.job = "j";
  job.generation = i;
  GenerationPlan plan{.job = "j", .generation = i};
  const std::vector<Record> records = {Line(i), job, GenerationRecord{plan}};
  std::vector<Deletion> gone;
  if (i > 1) gone.push_back({Deletion::Table::kGeneration, "j/" + std::to_string(i - 1)});
  return store->Write(records, gone);
}

// A child writes batches and acknowledges each on a pipe; it is killed after `batches` of them.
void KillAfter(const std::string& directory, std::uint64_t batches) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    StoreStatus status;
    auto store = RocksStore::Open({.directory = directory}, &status);
    if (store == nullptr) _exit(1);
    for (std::uint64_t i = 1; i < 100000; ++i) {
      if (!WriteBatch(store.get(), i).ok()) _exit(2);
      if (write(fds[1], &i, sizeof(i)) != sizeof(i)) _exit(3);
    }
    _exit(4);
  }
  close(fds[1]);
  std::uint64_t acknowledged = 0;
  while (acknowledged < batches && read(fds[0], &acknowledged, sizeof(acknowledged)) > 0) {
  }
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status)) << status;
  std::uint64_t last = 0;
  while (read(fds[0], &last, sizeof(last)) == sizeof(last)) acknowledged = last;
  close(fds[0]);
  auto store = Open(directory);
  ASSERT_NE(store, nullptr);
  std::uint64_t lines = 0, job = 0, generation = 0, generations = 0;
  for (const Record& record : LoadAll(store.get())) {
    if (const auto* line = std::get_if<JournalRecord>(&record)) {
      EXPECT_EQ(line->sequence, ++lines);
    } else if (const auto* j = std::get_if<JobRecord>(&record)) {
      job = j->generation;
    } else if (const auto* g = std::get_if<GenerationRecord>(&record)) {
      generation = g->plan.generation;
      ++generations;
    }
  }
  EXPECT_GE(lines, acknowledged);
  EXPECT_LE(lines, acknowledged + 1);  // the one in flight may be there, whole
  EXPECT_EQ(job, lines);
  EXPECT_EQ(generation, lines);
  EXPECT_EQ(generations, lines == 0 ? 0u : 1u);
}

TEST(RocksStore, KilledProcessLosesNoAcknowledgedBatchAndTearsNone) {
  for (const std::uint64_t batches : {1u, 2u, 17u, 60u}) {
    TemporaryDirectory dir;
    KillAfter(dir.db(), batches);
  }
}

TEST(RocksStore, PowerCutLosesNoAcknowledgedBatch) {
  TemporaryDirectory dir;
  CrashEnv env;
  auto store = Open(dir.db(), &env);
  ASSERT_NE(store, nullptr);
  for (std::uint64_t i = 1; i <= 20; ++i) ASSERT_TRUE(WriteOne(store.get(), Line(i)).ok());
  store.reset();
  env.CutPower();
  store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(LoadAll(store.get()).size(), 20u);
}

TEST(RocksStore, TornTailIsDroppedWholeBatchAtATime) {
  TemporaryDirectory dir;
  auto store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  ASSERT_TRUE(WriteOne(store.get(), Line(1)).ok());
  const std::vector<Record> last = {Line(2), Line(3)};
  ASSERT_TRUE(store->Write(last, {}).ok());
  store.reset();
  const std::string log = LogFile(dir.db());
  ASSERT_EQ(truncate(log.c_str(), SizeOf(log) - 3), 0) << log;
  store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  const std::vector<Record> records = LoadAll(store.get());
  ASSERT_EQ(records.size(), 1u);
  EXPECT_EQ(std::get<JournalRecord>(records[0]).sequence, 1u);
}

TEST(RocksStore, DamageBeforeTheTailIsNamedNotSkipped) {
  TemporaryDirectory dir;
  auto store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  for (std::uint64_t i = 1; i <= 20; ++i) ASSERT_TRUE(WriteOne(store.get(), Line(i)).ok());
  store.reset();
  const std::string log = LogFile(dir.db());
  {
    std::fstream file(log, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(SizeOf(log) / 2);
    const char byte = static_cast<char>(file.get());
    file.seekp(SizeOf(log) / 2);
    file.put(static_cast<char>(byte ^ 0x40));
  }
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = dir.db()}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kCorrupt) << status.message;
  EXPECT_NE(status.message.find(dir.db()), std::string::npos) << status.message;
}

TEST(RocksStore, SecondControllerIsToldWhoHoldsTheStore) {
  TemporaryDirectory dir;
  auto store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = dir.db()}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kLocked) << status.message;
  EXPECT_NE(status.message.find("--state-dir"), std::string::npos) << status.message;
}

TEST(RocksStore, SecondControllerIsToldThePidOfTheFirst) {
  TemporaryDirectory dir;
  int ready[2], done[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(done), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    close(done[1]);
    StoreStatus status;
    const auto store = RocksStore::Open({.directory = dir.db()}, &status);
    char byte = store != nullptr ? 'y' : 'n';
    if (write(ready[1], &byte, 1) != 1) _exit(1);
    (void)!read(done[0], &byte, 1);
    _exit(0);
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_EQ(byte, 'y');
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = dir.db()}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kLocked) << status.message;
  EXPECT_NE(status.message.find("pid " + std::to_string(child)), std::string::npos)
      << status.message;
  for (const int fd : {ready[0], ready[1], done[0], done[1]}) close(fd);
  waitpid(child, nullptr, 0);
}

// A newer version's store: a header of format 2, and a family that this version has never heard of.
TEST(RocksStore, NewerFormatIsRefusedWithTheVersionThatWroteIt) {
  TemporaryDirectory dir;
  Open(dir.db()).reset();
  {
    std::vector<rocksdb::ColumnFamilyDescriptor> families;
    for (const char* name : {"default", "node", "job", "generation", "commit", "journal", "ledger",
                             "layout", "told"}) {
      families.emplace_back(name, rocksdb::ColumnFamilyOptions());
    }
    std::vector<rocksdb::ColumnFamilyHandle*> handles;
    rocksdb::DB* raw = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open({}, dir.db(), families, &handles, &raw).ok());
    const std::unique_ptr<rocksdb::DB> db(raw);
    handles.emplace_back();
    ASSERT_TRUE(db->CreateColumnFamily({}, "tenant", &handles.back()).ok());
    v1::StoreHeader header;
    header.set_format(kRecordFormat + 1);
    header.set_product_version("9.9");
    ASSERT_TRUE(db->Put({}, "header", header.SerializeAsString()).ok());
    for (auto* handle : handles) db->DestroyColumnFamilyHandle(handle);
  }
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = dir.db()}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kTooNew) << status.message;
  for (const std::string& part : {dir.db(), std::string("format 2"), std::string("9.9")}) {
    EXPECT_NE(status.message.find(part), std::string::npos) << status.message;
  }
  // The refusal changed nothing: the counter of starts stands for the version that may write.
  EXPECT_EQ(RocksStore::Open({.directory = dir.db()}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kTooNew);
}

TEST(RocksStore, ReadOnlyFileSystemIsNamed) {
  TemporaryDirectory dir;
  CrashEnv env;
  env.set_read_only(true);
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = dir.db(), .env = &env}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kUnavailable) << status.message;
  EXPECT_NE(status.message.find("read-only"), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("--state-dir"), std::string::npos) << status.message;
}

TEST(RocksStore, FullDiskIsNamedAndTheEarlierBatchesStay) {
  TemporaryDirectory dir;
  CrashEnv env;
  auto store = Open(dir.db(), &env);
  ASSERT_NE(store, nullptr);
  ASSERT_TRUE(WriteOne(store.get(), Line(1)).ok());
  env.set_full(true);
  const StoreStatus status = WriteOne(store.get(), Line(2));
  EXPECT_EQ(status.code, StoreCode::kNoSpace) << status.message;
  EXPECT_NE(status.message.find("no space left"), std::string::npos) << status.message;
  EXPECT_EQ(store->Describe(), "rocksdb no_space");
  store.reset();
  env.set_full(false);
  store = Open(dir.db());
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(LoadAll(store.get()).size(), 1u);
}

TEST(RocksStore, UnusableDirectoryAndWrongClusterAreNamed) {
  StoreStatus status;
  EXPECT_EQ(RocksStore::Open({.directory = "/proc/nowhere/db"}, &status), nullptr);
  EXPECT_EQ(status.code, StoreCode::kUnavailable) << status.message;
  TemporaryDirectory dir;
  auto store = RocksStore::Open({.directory = dir.db(), .cluster = "blue"}, &status);
  ASSERT_NE(store, nullptr) << status.message;
  EXPECT_EQ(store->info().cluster, "blue");
  store.reset();
  EXPECT_EQ(RocksStore::Open({.directory = dir.db(), .cluster = "red"}, &status), nullptr);
  EXPECT_NE(status.message.find("blue"), std::string::npos) << status.message;
}

}  // namespace
}  // namespace everstep::controller
