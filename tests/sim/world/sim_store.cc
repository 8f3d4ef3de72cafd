#include "tests/sim/world/sim_store.h"

#include <cstdio>
#include <string>

namespace everstep::sim {

void SimStore::Append(std::span<const controller::Record> records,
                      std::span<const controller::Deletion> deletions) {
  ++batches_;
  const std::size_t of = records.size() + deletions.size();
  char key[40];
  std::size_t n = 0;
  const auto write = [&](Frame frame) {
    std::snprintf(key, sizeof key, "%012llu/%06zu", static_cast<unsigned long long>(batches_), n++);
    disk_.Write(key, std::move(frame));
  };
  for (const controller::Record& record : records) {
    write({batches_, of, std::make_shared<const controller::Record>(record), {}});
  }
  for (const controller::Deletion& deletion : deletions) write({batches_, of, nullptr, deletion});
}

void SimStore::Sync() {
  disk_.Sync();
  Fold();
}

void SimStore::Crash(Random* random, std::uint32_t keep_per_mille) {
  disk_.CrashTorn(random, keep_per_mille);
  Fold();
  folded_ = batches_;
}

// Moves whole batches from the log into the table, in order, and drops the torn tail.
void SimStore::Fold() {
  const std::map<std::string, Frame> log = disk_.TakeDurable();
  for (auto it = log.begin(); it != log.end();) {
    auto end = it;
    std::size_t frames = 0;
    while (end != log.end() && end->second.batch == it->second.batch) {
      ++end;
      ++frames;
    }
    if (it->second.batch != folded_ + 1 || frames != it->second.of) {
      ++torn_;
      return;
    }
    ++folded_;
    for (; it != end; ++it) {
      const Frame& frame = it->second;
      if (frame.record) {
        table_[controller::KeyOf(*frame.record)] = frame.record;
      } else {
        table_.erase({frame.deletion.table, frame.deletion.key});
      }
    }
  }
}

std::vector<controller::Record> SimStore::Load() const {
  std::vector<controller::Record> all;
  all.reserve(table_.size());
  for (const auto& [key, record] : table_) all.push_back(*record);
  return all;
}

}  // namespace everstep::sim
