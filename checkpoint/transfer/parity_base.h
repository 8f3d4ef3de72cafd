// What a parity that is to be made has in common with one of an earlier step that this node holds:
// a chunk of it is the same when all the chunks it is the sum of are.
//
//   the older parity's table names each shard under it --> its holder is asked which chunks are the
//   same, byte for byte, in the newer shard --> the chunks of the parity that they alone go into
//   are copied, checked, and their sources never sent
//
// Nothing is remembered for it: the older parity says what it was made of. Owned by one order.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "checkpoint/codec/shard_recipe.h"
#include "checkpoint/store/arena.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

class ParityBase {
 public:
  // The newest whole parity of the same group, shards of the same sizes under it. Nullopt: there is
  // none.
  static std::optional<ParityBase> Find(ArenaHost* host, const JobId& job, const ShardBuild& build,
                                        const ShardRecipe& recipe);

  // The shard of the older step under it, as source `s` of the recipe has it now.
  SlotName Older(const JobId& job, std::size_t s) const;

  // Copies to `writer` what did not change, by `same[s]` of each source (empty: all of it did), and
  // answers its chunks. What fails its checksum here counts as changed.
  std::vector<std::uint64_t> Copy(const ShardRecipe& recipe, const std::vector<Bitmap>& same,
                                  SlotWriter* writer);

 private:
  Arena arena_;
  SlotView view_;
  std::vector<std::uint32_t> crcs_;
  std::vector<ParityMember> members_;
};

}  // namespace everstep::checkpoint
