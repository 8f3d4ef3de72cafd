#include "tests/sim/world/memory.h"

#include <algorithm>

namespace everstep::sim {
namespace {

bool Older(const Memory::Slot& a, const Memory::Slot& b) {
  return std::pair(a.shard.generation, a.shard.step) < std::pair(b.shard.generation, b.shard.step);
}

}  // namespace

bool Memory::Put(const controller::HeldShard& shard, bool away) {
  std::vector<Slot>& slots = arenas_[{shard.rank, shard.replica}];
  for (Slot& slot : slots) {
    if (slot.shard.step == shard.step && slot.shard.generation == shard.generation) {
      if (slot.corrupt) slot = Slot{shard, slot.committed, false, false};
      return true;
    }
  }
  if (slots.size() < 2) {
    slots.push_back(Slot{shard, false, false, false});
    return true;
  }
  const Slot* newest_committed = nullptr;
  for (const Slot& slot : slots) {
    if (slot.committed && (newest_committed == nullptr || Older(*newest_committed, slot))) {
      newest_committed = &slot;
    }
  }
  Slot* older = Older(slots[0], slots[1]) ? slots.data() : slots.data() + 1;
  Slot* newer = older == slots.data() ? slots.data() + 1 : slots.data();
  Slot* victim = nullptr;
  if (newest_committed == newer) {
    victim = older;
  } else if (newest_committed == older) {
    // The newer one may be committed any moment, unless its generation is over.
    if (newer->shard.generation < shard.generation) victim = newer;
    if (away && newer->replicated) victim = older;
  } else if (older->shard.generation < shard.generation) {
    victim = older;
  } else if (away && newer->replicated) {
    victim = older;
  }
  if (victim == nullptr) return false;
  *victim = Slot{shard, false, false, false};
  return true;
}

void Memory::MarkCommitted(Generation generation, Step step) {
  for (auto& [key, slots] : arenas_) {
    for (Slot& slot : slots) {
      if (slot.shard.step == step && (generation == 0 || slot.shard.generation == generation)) {
        slot.committed = true;
      }
    }
  }
}

void Memory::MarkReplicated(const controller::HeldShard& shard) {
  const auto it = arenas_.find({shard.rank, false});
  if (it == arenas_.end()) return;
  for (Slot& slot : it->second) {
    if (slot.shard.step == shard.step && slot.shard.generation == shard.generation) {
      slot.replicated = true;
    }
  }
}

std::vector<controller::HeldShard> Memory::Verified() const {
  std::vector<controller::HeldShard> all;
  for (const auto& [key, slots] : arenas_) {
    for (const Slot& slot : slots) {
      if (!slot.corrupt) all.push_back(slot.shard);
    }
  }
  return all;
}

std::optional<controller::HeldShard> Memory::Find(Step step, Generation generation, Rank rank,
                                                  std::uint32_t crc_root) const {
  for (const auto& [key, slots] : arenas_) {
    for (const Slot& slot : slots) {
      if (!slot.corrupt && slot.shard.step == step && slot.shard.generation == generation &&
          slot.shard.rank == rank && slot.shard.crc_root == crc_root) {
        return slot.shard;
      }
    }
  }
  return std::nullopt;
}

const Memory::Slot* Memory::Newest(Rank rank, Generation generation) const {
  const auto it = arenas_.find({rank, false});
  if (it == arenas_.end()) return nullptr;
  const Slot* newest = nullptr;
  for (const Slot& slot : it->second) {
    if (slot.shard.generation != generation || slot.corrupt) continue;
    if (newest == nullptr || newest->shard.step < slot.shard.step) newest = &slot;
  }
  return newest;
}

std::optional<controller::HeldShard> Memory::Corrupt(std::uint64_t n) {
  std::vector<Slot*> all;
  for (auto& [key, slots] : arenas_) {
    for (Slot& slot : slots) all.push_back(&slot);
  }
  if (all.empty()) return std::nullopt;
  Slot* slot = all[n % all.size()];
  slot->corrupt = true;
  return slot->shard;
}

}  // namespace everstep::sim
