#include "checkpoint/transfer/held_arenas.h"

#include <unistd.h>

#include <vector>

namespace everstep::checkpoint {

Result<Arena> OpenHeld(ArenaHost* host, const JobId& job, const ArenaName& name) {
  auto fds = host->Open(job, name, 0);
  if (!fds.ok()) return fds.error();
  if (fds.value().eventfd >= 0) close(fds.value().eventfd);
  return Arena::Open(fds.value().memfd);
}

bool SearchShard(ArenaHost* host, const JobId& job, Rank rank,
                 const std::function<bool(const ArenaName& name, Arena* arena)>& use) {
  const auto is_it = [&](const ArenaName& name) {
    auto arena = OpenHeld(host, job, name);
    return arena.ok() && use(name, &arena.value());
  };
  if (is_it({rank, false}) || is_it({rank, true})) return true;
  const auto names = host->List(job);
  for (const ArenaName& name : names.ok() ? names.value() : std::vector<ArenaName>()) {
    if (!name.replica && name.rank != rank && is_it(name)) return true;
  }
  return false;
}

}  // namespace everstep::checkpoint
