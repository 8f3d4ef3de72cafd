// The simulated disk of one process: a key-value table with a write cache. Write goes to the cache,
// Sync makes the cache durable, Crash loses what was not synced: as one batch, or torn (each
// unsynced write survives by chance), as a real disk without a write-ahead log would.
//
// Single-threaded, no time of its own.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/random.h"

namespace everstep::sim {

template <typename Value>
class Disk {
 public:
  void Write(const std::string& key, Value value) { cache_.push_back({key, std::move(value)}); }
  void Delete(const std::string& key) { cache_.push_back({key, std::nullopt}); }

  // What a reader of the running process sees: cache over durable.
  std::optional<Value> Read(const std::string& key) const {
    for (auto it = cache_.rbegin(); it != cache_.rend(); ++it) {
      if (it->key == key) return it->value;
    }
    const auto it = durable_.find(key);
    if (it == durable_.end()) return std::nullopt;
    return it->second;
  }

  void Sync() {
    for (Pending& p : cache_) Apply(std::move(p));
    cache_.clear();
    ++syncs_;
  }

  // The process died. Atomic: the unsynced batch is gone whole.
  void Crash() { cache_.clear(); }
  // Each unsynced write survives with probability keep_per_mille / 1000, in order.
  void CrashTorn(Random* random, std::uint32_t keep_per_mille) {
    for (Pending& p : cache_) {
      if (random->Chance(keep_per_mille)) Apply(std::move(p));
    }
    cache_.clear();
  }

  const std::map<std::string, Value>& durable() const { return durable_; }
  // The durable table, which is empty afterwards: for a log that was folded into something else.
  std::map<std::string, Value> TakeDurable() { return std::exchange(durable_, {}); }
  std::size_t unsynced() const { return cache_.size(); }
  std::uint64_t syncs() const { return syncs_; }

 private:
  struct Pending {
    std::string key;
    std::optional<Value> value;  // none: delete
  };
  void Apply(Pending p) {
    if (p.value) {
      durable_.insert_or_assign(p.key, std::move(*p.value));
    } else {
      durable_.erase(p.key);
    }
  }
  std::vector<Pending> cache_;
  std::map<std::string, Value> durable_;
  std::uint64_t syncs_ = 0;
};

}  // namespace everstep::sim
