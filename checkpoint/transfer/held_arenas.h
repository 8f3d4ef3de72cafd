// This node's arenas as its agent finds them again: one by its name, or all in which a rank's shard
// may lie. Nothing is made and nothing is kept; each call asks the keeper, and blocks as that does
// (ArenaHost). Thread-safe.
#pragma once

#include <functional>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// kNotFound: it is not there.
Result<Arena> OpenHeld(ArenaHost* host, const JobId& job, const ArenaName& name);

// Hands over the arenas in which a shard of `rank` may lie, likeliest first: the rank's own, the
// copy that is kept for a peer, then the own ones of other ranks, since who was restored in place
// from another rank's shard still has it there. Until `use` answers that this was it (then true),
// or there are no more.
bool SearchShard(ArenaHost* host, const JobId& job, Rank rank,
                 const std::function<bool(const ArenaName& name, Arena* arena)>& use);

}  // namespace everstep::checkpoint
