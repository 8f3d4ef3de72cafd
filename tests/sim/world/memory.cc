#include "tests/sim/world/memory.h"

#include <fmt/format.h>

#include <tuple>

namespace everstep::sim {
namespace {

bool Older(const Memory::Slot& a, const Memory::Slot& b) {
  return std::pair(a.shard.generation, a.shard.step) < std::pair(b.shard.generation, b.shard.step);
}

bool Same(const Memory::Slot& slot, const HeldShard& shard) {
  return slot.whole && slot.shard.step == shard.step && slot.shard.generation == shard.generation &&
         slot.shard.crc_root == shard.crc_root;
}

}  // namespace

// The slot an agent may overwrite: an empty one, else not the newest committed one, else the older.
std::size_t Memory::Choose(const Arena& arena) {
  const Slot& a = arena.slots[0];
  const Slot& b = arena.slots[1];
  if (!a.whole || !b.whole) return a.whole ? 1 : 0;
  if (a.committed != b.committed) return a.committed ? 1 : 0;
  return Older(a, b) ? 0 : 1;
}

checkpoint::CaptureAction Memory::Capture(const HeldShard& shard, const Trainer& trainer) {
  Arena& arena = arenas_[{shard.rank, false}];
  checkpoint::CaptureFacts facts;
  facts.step = shard.step;
  facts.generation = shard.generation;
  facts.base = arena.base;
  facts.replicated_layout = shard.replicated_layout;
  facts.has_peer = trainer.peers > 0 || trainer.kept_by_parity;
  facts.agent_alive = trainer.agent_alive;
  facts.controller_away = trainer.controller_away;
  facts.waited = trainer.waited;
  for (std::size_t i = 0; i < 2; ++i) {
    const Slot& slot = arena.slots[i];
    facts.slots[i] = {slot.whole,
                      slot.shard.step,
                      slot.shard.generation,
                      slot.committed,
                      slot.acknowledged.size() >= trainer.peers,
                      !slot.pushing.empty(),
                      slot.released};
  }
  const checkpoint::CaptureDecision decision = checkpoint::DecideCapture(facts);
  if (decision.action != checkpoint::CaptureAction::kWrite) return decision.action;
  if (arena.base == static_cast<int>(decision.slot)) arena.base = -1;
  arena.slots[decision.slot] = Slot{shard, true};
  arena.slots[decision.slot].released =
      shard.generation == released_.first && shard.step <= released_.second;
  return decision.action;
}

void Memory::NewProcess(Rank rank) {
  arenas_[{rank, false}].base = -1;
}

void Memory::Restore(Rank rank, const HeldShard& shard) {
  Arena& arena = arenas_[{rank, false}];
  for (std::size_t i = 0; i < 2; ++i) {
    if (!Same(arena.slots[i], shard) || arena.slots[i].corrupt ||
        arena.slots[i].shard.rank != shard.rank) {
      continue;
    }
    arena.slots[i].acknowledged.clear();  // the peers may be others now
    arena.slots[i].pushing.clear();
    arena.base = static_cast<int>(i);
    return;
  }
  const std::size_t target = Choose(arena);  // the agent fills it before the trainer starts
  arena.slots[target] = Slot{shard, true, IsCommitted(shard)};
  arena.base = static_cast<int>(target);
}

void Memory::Assemble(Rank rank, const HeldShard& shard, const RestoreCut& cut) {
  Arena& arena = arenas_[{rank, false}];
  std::size_t target = Choose(arena);
  for (std::size_t i = 0; i < 2; ++i) {
    const Slot& slot = arena.slots[i];
    if (slot.whole && slot.shard.step == cut.step && slot.shard.generation == cut.generation) {
      target = 1 - i;
    }
  }
  arena.slots[target] = Slot{shard, true, IsCommitted(shard)};
  // A share is captured anew from what was put together: the process came from no slot.
  arena.base = shard.share ? -1 : static_cast<int>(target);
}

bool Memory::Receive(const HeldShard& shard, Generation generation,
                     const std::optional<HeldShard>& kept) {
  Arena& arena = arenas_[{shard.rank, true}];
  for (Slot& slot : arena.slots) {
    if (kept && Same(slot, *kept)) slot.committed = true;
  }
  for (Slot& slot : arena.slots) {
    if (Same(slot, shard)) {
      slot.corrupt = false;  // the same bytes, verified again
      return true;
    }
    if (slot.whole && (slot.shard.generation > generation ||
                       (slot.shard.generation == generation && slot.shard.step > shard.step))) {
      return false;
    }
  }
  arena.slots[Choose(arena)] = Slot{shard, true, IsCommitted(shard)};
  return true;
}

std::optional<HeldShard> Memory::Committed(Rank rank) const {
  const auto it = arenas_.find({rank, false});
  if (it == arenas_.end()) return std::nullopt;
  const Slot* newest = nullptr;
  for (const Slot& slot : it->second.slots) {
    if (slot.whole && slot.committed && (newest == nullptr || Older(*newest, slot))) newest = &slot;
  }
  if (newest == nullptr) return std::nullopt;
  return newest->shard;
}

Memory::Slot* Memory::FindSlot(const HeldShard& shard) {
  const auto it = arenas_.find({shard.rank, false});
  if (it == arenas_.end()) return nullptr;
  for (Slot& slot : it->second.slots) {
    if (Same(slot, shard)) return &slot;
  }
  return nullptr;
}

bool Memory::IsCommitted(const HeldShard& shard) const {
  return shard.generation == committed_.first && shard.step == committed_.second;
}

void Memory::MarkCommitted(Generation generation, Step step) {
  if (step == kNoStep) return;
  committed_ = {generation, step};
  for (auto& [key, arena] : arenas_) {
    for (Slot& slot : arena.slots) {
      if (slot.whole && slot.shard.step == step && slot.shard.generation == generation) {
        slot.committed = true;
      }
    }
  }
}

void Memory::MarkReleased(Generation generation, Step step) {
  if (step == kNoStep) return;
  released_ = {generation, step};  // a slower rank may come to it after this
  for (auto& [key, arena] : arenas_) {
    for (Slot& slot : arena.slots) {
      if (slot.whole && slot.shard.step <= step && slot.shard.generation == generation) {
        slot.released = true;
      }
    }
  }
}

void Memory::MarkReplicated(const HeldShard& shard, const NodeId& peer) {
  if (Slot* slot = FindSlot(shard)) slot->acknowledged.insert(peer);
}

void Memory::MarkPushing(const HeldShard& shard, const NodeId& peer, bool pushing) {
  Slot* slot = FindSlot(shard);
  if (slot == nullptr) return;
  if (pushing) {
    slot->pushing.insert(peer);
  } else {
    slot->pushing.erase(peer);
  }
}

void Memory::GiveUp(const std::vector<Cut>& cuts) {
  for (auto& [key, arena] : arenas_) {
    for (Slot& slot : arena.slots) {
      for (const Cut& cut : cuts) {
        if (slot.whole && Beyond(cut, slot.shard.generation, slot.shard.step)) slot = Slot{};
      }
    }
  }
}

std::vector<HeldShard> Memory::Verified() const {
  std::vector<HeldShard> all;
  for (const auto& [key, arena] : arenas_) {
    for (const Slot& slot : arena.slots) {
      if (slot.whole && !slot.corrupt) all.push_back(slot.shard);
    }
  }
  return all;
}

std::optional<HeldShard> Memory::Find(Step step, Generation generation, Rank rank,
                                      std::uint32_t crc_root) const {
  for (const auto& [key, arena] : arenas_) {
    for (const Slot& slot : arena.slots) {
      if (slot.whole && !slot.corrupt && slot.shard.step == step &&
          slot.shard.generation == generation && slot.shard.rank == rank &&
          slot.shard.crc_root == crc_root) {
        return slot.shard;
      }
    }
  }
  return std::nullopt;
}

const Memory::Slot* Memory::ToPush(Rank rank, Generation generation) const {
  const auto it = arenas_.find({rank, false});
  if (it == arenas_.end()) return nullptr;
  const Arena& arena = it->second;
  const Slot* newest =
      arena.base < 0 ? nullptr : &arena.slots[static_cast<std::size_t>(arena.base)];
  bool captured = false;
  for (const Slot& slot : arena.slots) {
    if (!slot.whole || slot.shard.generation != generation) continue;
    if (captured && newest->shard.step > slot.shard.step) continue;
    newest = &slot;
    captured = true;
  }
  if (!captured && newest != nullptr && newest->shard.rank != rank)
    return nullptr;  // that rank pushes it
  return newest == nullptr || newest->corrupt ? nullptr : newest;
}

std::string Memory::Describe() const {
  std::string text;
  for (const auto& [key, arena] : arenas_) {
    text += fmt::format("  {}{}:", key.second ? "r" : "", key.first);
    for (std::size_t i = 0; i < 2; ++i) {
      const Slot& s = arena.slots[i];
      if (!s.whole) continue;
      text += fmt::format(" {}/g{}{}{}{}{}{}{}", s.shard.step, s.shard.generation,
                          arena.base == static_cast<int>(i) ? "B" : "", s.committed ? "C" : "",
                          std::string(s.acknowledged.size(), 'R'), s.pushing.empty() ? "" : "P",
                          s.released ? "x" : "", s.corrupt ? "!" : "");
    }
  }
  return text;
}

std::vector<HeldShard> Memory::Damaged() const {
  std::vector<HeldShard> all;
  for (const auto& [key, arena] : arenas_) {
    for (const Slot& slot : arena.slots) {
      if (!slot.whole || !slot.corrupt) continue;
      all.push_back(slot.shard);
      all.back().replica = key.second;
    }
  }
  return all;
}

bool Memory::Mend(const HeldShard& shard) {
  const auto it = arenas_.find({shard.rank, shard.replica});
  if (it == arenas_.end()) return false;
  for (Slot& slot : it->second.slots) {
    if (!Same(slot, shard) || !slot.corrupt) continue;
    slot.corrupt = false;
    return true;
  }
  return false;
}

std::optional<HeldShard> Memory::Corrupt(std::uint64_t n) {
  std::vector<Slot*> all;
  for (auto& [key, arena] : arenas_) {
    for (Slot& slot : arena.slots) {
      if (slot.whole) all.push_back(&slot);
    }
  }
  if (all.empty()) return std::nullopt;
  Slot* slot = all[n % all.size()];
  slot->corrupt = true;
  return slot->shard;
}

}  // namespace everstep::sim
