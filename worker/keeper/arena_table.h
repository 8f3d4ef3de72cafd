// The memory arenas of a node: memfds that live as long as the keeper, or until their job is
// forgotten. The keeper makes them and hands them out; it never maps their slots.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <string>

#include "keeper.pb.h"
#include "worker/keeper/fd.h"

namespace everstep::keeper {

struct ArenaKey {
  std::string job;
  std::int32_t rank = 0;
  bool replica = false;
  friend auto operator<=>(const ArenaKey&, const ArenaKey&) = default;
};

struct ArenaEntry {
  OwnedFd memory;                // memfd; grows by itself (checkpoint/store/arena.h), never shrinks
  OwnedFd bell;                  // eventfd: the trainer rings it after each capture
  std::uint64_t slot_bytes = 0;  // as it was first asked for

  std::uint64_t total_bytes() const;
};

class ArenaTable {
 public:
  static constexpr std::size_t kMaxArenas = 4096;

  // The arena, made when it is not there. Null: *error is an errno and *message says who, what, the
  // limit and what to do next. slot_bytes 0: attach only, ENOENT when there is none. *created may
  // be null.
  ArenaEntry* Get(const ArenaKey& key, std::uint64_t slot_bytes, bool* created, int* error,
                  std::string* message);
  void Drop(const ArenaKey& key) { arenas_.erase(key); }
  void DropJob(const std::string& job);
  void Describe(everstep::v1::KeeperState* state) const;
  std::size_t size() const { return arenas_.size(); }

 private:
  std::map<ArenaKey, ArenaEntry> arenas_;
};

}  // namespace everstep::keeper
