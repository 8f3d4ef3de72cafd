// One rank's state at one step, as a slot of some arena holds it.
#pragma once

#include <cstdint>

#include "proto/base/ids.h"

namespace everstep::checkpoint {

// The same facts as HeldShard in proto/agent.proto; worker/agent converts.
struct Shard {
  Rank rank = 0;                // that captured it
  std::int32_t world_size = 0;  // of the generation that captured it
  Generation generation = 0;    // that captured it
  Step step = kNoStep;
  std::uint32_t crc_root = 0;
  std::uint64_t bytes = 0;
  bool replica = false;            // held for a peer
  bool replicated_layout = false;  // every rank's state is the same: any shard serves any rank
  friend bool operator==(const Shard&, const Shard&) = default;
};

}  // namespace everstep::checkpoint
