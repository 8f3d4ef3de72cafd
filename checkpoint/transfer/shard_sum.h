// The payload of a shard that is made out of others (codec/shard_recipe.h) while its sources come,
// several at a time: which of its chunks have begun, and one source at a time in each.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "checkpoint/codec/shard_recipe.h"

namespace everstep::checkpoint {

class ShardSum {
 public:
  // `payload`: recipe.payload_bytes() of any content. Both must outlive it.
  ShardSum(const ShardRecipe& recipe, std::byte* payload);

  // ShardRecipe::Add. Thread-safe; a chunk is cleared when the first source comes to it, in the
  // cache that it is then added up in.
  void Add(std::size_t source, std::uint32_t chunk, std::span<const std::byte> from);
  // The chunk has its content already, and nothing is added to it. REQUIRES: not begun.
  void Keep(std::uint64_t chunk) { begun_[chunk] = 1; }
  // Clears what nothing was added to. REQUIRES: nobody adds any more.
  void Finish();

 private:
  void Clear(std::uint64_t chunk);

  const ShardRecipe& recipe_;
  std::byte* const payload_;
  std::array<std::mutex, 16> locks_;  // chunk i's: i mod 16
  std::vector<std::uint8_t> begun_;   // by chunk of the payload
};

}  // namespace everstep::checkpoint
