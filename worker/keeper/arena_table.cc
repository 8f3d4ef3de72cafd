#include "worker/keeper/arena_table.h"

#include <sys/eventfd.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "checkpoint/store/arena.h"
#include "proto/base/errno_text.h"
#include "proto/base/kill_point.h"

namespace everstep::keeper {
namespace {

int ToErrno(checkpoint::ErrorCode code) {
  switch (code) {
    case checkpoint::ErrorCode::kNoMemory: return ENOMEM;
    case checkpoint::ErrorCode::kInvalid: return EINVAL;
    default: return EIO;
  }
}

}  // namespace

std::uint64_t ArenaEntry::total_bytes() const {
  struct stat st {};
  return ::fstat(memory.get(), &st) == 0 ? static_cast<std::uint64_t>(st.st_size) : 0;
}

ArenaEntry* ArenaTable::Get(const ArenaKey& key, std::uint64_t slot_bytes, bool* created,
                            int* error, std::string* message) {
  if (created != nullptr) *created = false;
  const auto it = arenas_.find(key);
  if (it != arenas_.end()) return &it->second;
  if (slot_bytes == 0) {
    *error = ENOENT;
    *message = fmt::format("job {} rank {} has no {} on this node", key.job, key.rank,
                           key.replica ? "replica arena" : "arena");
    return nullptr;
  }
  if (arenas_.size() >= kMaxArenas) {
    *error = ENFILE;
    *message =
        fmt::format("the keeper holds {} arenas, its limit; stop jobs that have ended", kMaxArenas);
    return nullptr;
  }
  auto made = checkpoint::CreateArenaFd(
      {.job = key.job, .rank = key.rank, .replica = key.replica, .slot_bytes = slot_bytes});
  if (!made.ok()) {
    *error = ToErrno(made.error().code);
    *message = made.error().message;
    return nullptr;
  }
  ArenaEntry entry;
  entry.memory = OwnedFd(made.value());
  entry.bell = OwnedFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  entry.slot_bytes = slot_bytes;
  if (!entry.bell) {
    *error = errno;
    *message = fmt::format("cannot make the bell of job {} rank {}'s arena: {}", key.job, key.rank,
                           ErrnoText(*error));
    return nullptr;
  }
  KillPoint("keeper.arena_made");
  if (created != nullptr) *created = true;
  return &arenas_.emplace(key, std::move(entry)).first->second;
}

void ArenaTable::DropJob(const std::string& job) {
  std::erase_if(arenas_, [&](const auto& item) { return item.first.job == job; });
}

void ArenaTable::Describe(everstep::v1::KeeperState* state) const {
  for (const auto& [key, entry] : arenas_) {
    auto* info = state->add_arenas();
    info->set_job(key.job);
    info->set_rank(key.rank);
    info->set_replica(key.replica);
    info->set_slot_bytes(entry.slot_bytes);
    info->set_total_bytes(entry.total_bytes());
  }
}

}  // namespace everstep::keeper
