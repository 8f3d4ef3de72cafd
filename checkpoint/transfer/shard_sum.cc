#include "checkpoint/transfer/shard_sum.h"

#include <algorithm>
#include <cstring>

namespace everstep::checkpoint {

ShardSum::ShardSum(const ShardRecipe& recipe, std::byte* payload)
    : recipe_(recipe), payload_(payload), begun_(ChunkCount(recipe.payload_bytes())) {}

void ShardSum::Add(std::size_t source, std::uint32_t chunk, std::span<const std::byte> from) {
  const std::uint64_t at = recipe_.PayloadChunk(source, chunk);
  std::lock_guard<std::mutex> lock(locks_[at % locks_.size()]);
  if (begun_[at] == 0) Clear(at);
  recipe_.Add(source, chunk, from, payload_);
}

void ShardSum::Finish() {
  for (std::uint64_t i = 0; i < begun_.size(); ++i) {
    if (begun_[i] == 0) Clear(i);
  }
}

void ShardSum::Clear(std::uint64_t chunk) {
  const std::uint64_t at = chunk * kChunkBytes;
  std::memset(payload_ + at, 0, std::min<std::uint64_t>(kChunkBytes, recipe_.payload_bytes() - at));
  begun_[chunk] = 1;
}

}  // namespace everstep::checkpoint
