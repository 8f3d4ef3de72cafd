// A slot's content made by hand, for tests of the file tier.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "checkpoint/files/shard_file.h"
#include "checkpoint/store/arena.h"
#include "proto/base/crc32c.h"

namespace everstep::checkpoint {

struct HandSlot {
  std::vector<unsigned char> payload;
  std::vector<std::uint32_t> chunks;
  SlotContent content;
};

// Data of `data_bytes` (a multiple of 64, filled from `seed`, its last 4 bytes of each 64 zero) and
// a table that names: model.weight (float32), a tied name, an empty tensor, a complex one, a numpy
// array, nested lists and scalars.
inline HandSlot MakeSlot(const std::string& job, Step step, Generation generation, Rank rank,
                         std::int32_t world, unsigned seed = 1, std::uint64_t data_bytes = 4096) {
  HandSlot s;
  s.payload.resize(data_bytes);
  for (std::uint64_t i = 0; i < data_bytes; ++i) {
    s.payload[i] =
        i % 64 < 60 ? static_cast<unsigned char>(i * 31 + std::uint64_t{seed} * 7 + i / 256) : 0;
  }
  const std::uint64_t rest = data_bytes - 512;  // float32 elements of 60 bytes' rows end before
  const std::string table =
      "{\"format\":1,\"meta\":{\"step\":" + std::to_string(step) +
      "},\"root\":{\"d\":[[\"model\",{\"o\":[[\"weight\",{\"T\":[\"float32\",[15],0]}],"
      "[\"tied\",{\"T\":[\"float32\",[15],0]}],[\"none\",{\"T\":[\"bfloat16\",[0,3],0]}],"
      "[\"z\",{\"T\":[\"complex64\",[2,3],64]}],[\"big\",{\"T\":[\"uint8\",[" +
      std::to_string(rest) +
      "],128]}]]}],[\"extra\",{\"l\":[1,2.5,null,true,\"text \\u00e9\",{\"t\":[{\"N\":[\"<f8\",[4],"
      "64]}]},{\"c\":\"00\"},{\"b\":\"AAEC\"}]}],[7,{\"C\":[]}]]}}";
  const std::uint64_t offset = s.payload.size();
  s.payload.insert(s.payload.end(), table.begin(), table.end());
  SlotFields f;
  f.generation = generation;
  f.step = step;
  f.rank = rank;
  f.world_size = world;
  f.payload_bytes = s.payload.size();
  f.table_offset = offset;
  f.table_bytes = table.size();
  f.captured_ns = 1'700'000'000'000'000'000u;
  f.job_crc = Crc32c(job);
  for (std::uint64_t at = 0; at < s.payload.size(); at += kChunkBytes) {
    s.chunks.push_back(
        Crc32c(s.payload.data() + at, std::min<std::uint64_t>(kChunkBytes, s.payload.size() - at)));
  }
  s.content = {job, f, CrcRoot(f, s.chunks.data()), s.payload.data(), s.chunks.data()};
  return s;
}

}  // namespace everstep::checkpoint
