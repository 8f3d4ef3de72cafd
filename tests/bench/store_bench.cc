// What the store costs: synced batches a second beside the disk's own rate, and the time of a
// recovery.
//
//   store_bench [--runs 5] [--seconds 2] [--dir DIR] [--json FILE]
//
// One batch is what one decision writes: a job, a generation, a line of history, one deletion. The
// limit beside it is as many bytes appended to a file in the same directory and fdatasync'ed, the
// least that durability costs. Runs of both are interleaved.
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include <fmt/format.h>

#include "controller/store/convert.h"
#include "controller/store/rocks_store.h"
#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "tests/bench/results.h"

namespace everstep::bench {
namespace {

using namespace everstep::controller;  // NOLINT: every line below is about its records

struct Batch {
  std::vector<Record> records;
  std::vector<Deletion> deletions;
};

Batch DecisionOf(std::uint64_t i) {
  JobRecord job;
  job.spec.job = "train";
  job.generation = i;
  GenerationPlan plan{.job = "train", .generation = i, .phase = Phase::kPrepare};
  for (int n = 0; n < 4; ++n) {
    plan.nodes.push_back({.node = fmt::format("n{}", n), .group_rank = n, .address = "10.0.0.1"});
  }
  JournalRecord line{.sequence = i,
                     .type = "generation_prepare",
                     .reason = Reason::kWorkerKilled,
                     .job = "train",
                     .message = "job train: the next generation on 4 nodes",
                     .evidence = "signal=9 pid=4711 ran_ms=5312"};
  Batch batch{{job, GenerationRecord{plan}, line}, {}};
  if (i > 1) {
    batch.deletions.push_back({Deletion::Table::kGeneration, fmt::format("train/{}", i - 1)});
  }
  return batch;
}

double Since(std::int64_t began) {
  return static_cast<double>(MonotonicNanos() - began) / 1e9;
}

// Appends and fdatasyncs `bytes` for `seconds`. Negative: the file cannot be written.
double DiskRate(const std::string& directory, std::size_t bytes, double seconds) {
  const std::string path = directory + "/limit";
  const int fd = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return -1;
  const std::string data(bytes, 'x');
  std::uint64_t done = 0;
  const std::int64_t began = MonotonicNanos();
  while (Since(began) < seconds) {
    if (write(fd, data.data(), data.size()) != static_cast<ssize_t>(data.size()) ||
        fdatasync(fd) != 0) {
      close(fd);
      return -1;
    }
    ++done;
  }
  const double rate = static_cast<double>(done) / Since(began);
  close(fd);
  unlink(path.c_str());
  return rate;
}

bool Fail(const StoreStatus& status) {
  fmt::print(stderr, "store_bench: {}\n", status.message);
  return false;
}

bool StoreRate(RocksStore* store, std::uint64_t* next, double seconds, double* rate) {
  std::uint64_t done = 0;
  const std::int64_t began = MonotonicNanos();
  while (Since(began) < seconds) {
    const Batch batch = DecisionOf((*next)++);
    const StoreStatus status = store->Write(batch.records, batch.deletions);
    if (!status.ok()) return Fail(status);
    ++done;
  }
  *rate = static_cast<double>(done) / Since(began);
  return true;
}

// A controller of 1,000 nodes with a full history: open, read, decode.
bool Recovery(const std::string& directory, Results* results) {
  StoreStatus status;
  {
    const auto store = RocksStore::Open({.directory = directory}, &status);
    if (store == nullptr) return Fail(status);
    std::vector<Record> records;
    for (std::uint64_t i = 1; i <= 10'000; ++i) records.push_back(DecisionOf(i).records[2]);
    for (int n = 0; n < 1000; ++n) {
      NodeRecord node;
      node.node = fmt::format("n{:04}", n);
      node.facts.address = "10.0.0.1";
      records.push_back(node);
    }
    status = store->Write(records, {});
    if (!status.ok()) return Fail(status);
  }
  const std::int64_t began = MonotonicNanos();
  const auto store = RocksStore::Open({.directory = directory}, &status);
  if (store == nullptr) return Fail(status);
  std::vector<Record> records;
  status = store->Load(&records);
  if (!status.ok()) return Fail(status);
  results->Add("recovery_11000_records", "everstep", "open_and_load", "s", Since(began));
  return records.size() == 11'000;
}

int Main(int argc, char** argv) {
  int runs = 5;
  double seconds = 2;
  std::string json, parent = std::filesystem::temp_directory_path();
  for (int i = 1; i < argc; i += 2) {
    const std::string flag = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    if (flag == "--runs") runs = std::atoi(value.c_str());
    if (flag == "--seconds") seconds = std::atof(value.c_str());
    if (flag == "--dir") parent = value;
    if (flag == "--json") json = value;
    const bool known =
        flag == "--runs" || flag == "--seconds" || flag == "--dir" || flag == "--json";
    if (!known || value.empty() || runs < 1 || seconds <= 0) {
      fmt::print(stderr, "usage: store_bench [--runs N] [--seconds S] [--dir DIR] [--json FILE]\n");
      return 2;
    }
  }
  std::string directory = parent + "/everstep-store-bench-XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) {
    fmt::print(stderr, "store_bench: cannot make a directory in {}: {}\n", parent,
               ErrnoText(errno));
    return 1;
  }
  std::size_t bytes = 0;
  for (const Record& record : DecisionOf(1).records) bytes += EncodeRecord(record).size();
  Results results("store");
  bool good = true;
  {
    StoreStatus status;
    const auto store = RocksStore::Open({.directory = directory + "/db"}, &status);
    good = store != nullptr || Fail(status);
    std::uint64_t next = 1;
    for (int run = 0; good && run < runs; ++run) {
      double rate = 0;
      const double limit = DiskRate(directory, bytes, seconds);
      good = limit > 0 && StoreRate(store.get(), &next, seconds, &rate);
      if (!good) break;
      results.Add("one_decision", "everstep", "synced_batches_per_second", "1/s", rate);
      results.Add("one_decision", "append+fdatasync", "synced_batches_per_second", "1/s", limit);
      results.Add("one_decision", "everstep", "share_of_limit", "", rate / limit);
    }
  }
  for (int run = 0; good && run < runs; ++run) {
    good = Recovery(fmt::format("{}/recovery{}", directory, run), &results);
  }
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
  if (!good) return 1;
  results.Print();
  if (!json.empty() && !results.Write(json)) {
    fmt::print(stderr, "store_bench: cannot write {}: {}\n", json, ErrnoText(errno));
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
