// A restore by ranges, the agent's side: brings the tables of all shards of a cut to the trainer,
// and then the bytes it asks for, from the cheapest holder of each shard: an arena of this node, a
// peer's, a file. Every chunk that holds a wanted byte is read whole and verified, then cut; memory
// beside the slot is one chunk for each of a few readers.
//
//   cut --BringCatalog--> slot: catalog     trainer writes its request     --BringRanges--> slot:
//   state
//
// Both block. What cannot be had is refused with its rank and what every holder said.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/store/range_exchange.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

// What both need beside the rank. All must outlive the call.
struct RangeSources {
  const TransferOptions& options;
  ArenaHost* host;
  ShardFiles* files;  // null: there is no file tier
  const JobFacts& facts;
  std::string own_address;  // this node's data plane: never dialled
};

inline constexpr std::uint64_t kMaxCatalogBytes = std::uint64_t{1} << 31;  // all tables of a cut

// The slot's view, with kFlagCatalog. *tiers: by shard, where its table came from.
Result<SlotView> BringCatalog(const RangeSources& sources, const LocalRank& local,
                              std::vector<ShardTier>* tiers);

// `request`: the slot as the trainer left it. The slot's view, a state of this generation, world
// and rank; kInvalid when the request makes no sense. `memory`: becomes the arena that it wrote
// through; to unmap it takes a while, so the caller closes it when the state has been told of.
Result<SlotView> BringRanges(const RangeSources& sources, const LocalRank& local,
                             const SlotView& request, const std::vector<ShardTier>& tiers,
                             Arena* memory);

}  // namespace everstep::checkpoint
