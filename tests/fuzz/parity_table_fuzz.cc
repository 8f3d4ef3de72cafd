// What a node makes a shard out of comes from others: the table of a parity, as a peer sends it,
// and the controller's order, which says who shares parities and what each of them holds. Whatever
// stands there: a table is one of so many members or refused, and a recipe reads no chunk that its
// source has not got and writes none beyond the payload.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "checkpoint/codec/shard_recipe.h"
#include "tests/fuzz/files_fuzz.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

namespace {

constexpr std::uint64_t kMostMade = 4u << 20;  // bytes that are really added up

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  template <typename T>
  T Take() {
    T out{};
    const std::size_t n = std::min(size_, sizeof out);
    std::memcpy(&out, data_, n);
    data_ += n;
    size_ -= n;
    return out;
  }
  bool empty() const { return size_ == 0; }
  std::span<const std::uint8_t> rest() const { return {data_, size_}; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

void Table(std::span<const std::uint8_t> bytes) {
  const auto table = ReadParityTable(bytes);
  WantsText(table);
  if (!table.ok()) return;
  const std::vector<unsigned char> again = PrintParityTable(table.value());
  if (!std::equal(again.begin(), again.end(), bytes.begin(), bytes.end())) __builtin_trap();
}

everstep::ShardBuild Order(Input* in, bool plausible) {
  everstep::ShardBuild build;
  build.shard.world_size = plausible ? in->Take<std::uint8_t>() : in->Take<std::int32_t>();
  build.shard.rank = plausible ? in->Take<std::uint8_t>() : in->Take<std::int32_t>();
  build.shard.bytes = plausible ? in->Take<std::uint32_t>() : in->Take<std::uint64_t>();
  build.parity = plausible ? in->Take<std::uint8_t>() % 4u : in->Take<std::uint32_t>();
  const std::size_t members = in->Take<std::uint8_t>();
  for (std::size_t i = 0; i < members && !in->empty(); ++i) {
    build.group.push_back(plausible ? in->Take<std::uint8_t>() : in->Take<std::int32_t>());
  }
  while (!in->empty()) {
    everstep::CutShard source;
    source.rank = plausible ? in->Take<std::uint16_t>() : in->Take<std::int32_t>();
    source.bytes = plausible ? in->Take<std::uint32_t>() % (3u << 20) : in->Take<std::uint64_t>();
    source.holders.resize(in->Take<std::uint8_t>() % 3u);
    build.sources.push_back(std::move(source));
  }
  return build;
}

void Make(const everstep::ShardBuild& build) {
  const auto recipe = ShardRecipe::Of(build);
  WantsText(recipe);
  if (!recipe.ok()) return;
  const ShardRecipe& r = recipe.value();
  if (r.data_bytes() > r.payload_bytes() || r.payload_bytes() > 2 * kMaxPayloadBytes) {
    __builtin_trap();
  }
  if (!r.makes_parity() && r.table_source() >= r.sources().size()) __builtin_trap();
  const bool make = r.payload_bytes() <= kMostMade;
  std::unique_ptr<std::byte[]> payload(make ? new std::byte[r.payload_bytes()]() : nullptr);
  const std::unique_ptr<std::byte[]> chunk(new std::byte[kChunkBytes]());
  for (std::size_t s = 0; s < r.sources().size(); ++s) {
    const ShardRecipe::Source& source = r.sources()[s];
    for (const std::uint32_t i : source.chunks) {
      if (i >= ChunkCount(source.shard.bytes)) __builtin_trap();
      if (!make) break;
      const std::uint64_t left = source.shard.bytes - std::uint64_t{i} * kChunkBytes;
      r.Add(s, i, {chunk.get(), std::min<std::uint64_t>(left, kChunkBytes)}, payload.get());
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input in(data, size);
  const auto mode = in.Take<std::uint8_t>();
  if ((mode & 1) == 0) {
    Table(in.rest());
  } else {
    Make(Order(&in, (mode & 2) == 0));
  }
  return 0;
}
