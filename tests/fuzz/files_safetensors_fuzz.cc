// The head of a safetensors file, and of a shard file of ours. The length in front is made right
// for half of the inputs. What is read tiles the data and can be written again.
#include <cstddef>
#include <cstdint>
#include <string>

#include "checkpoint/files/shard_file.h"
#include "tests/fuzz/files_fuzz.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const std::uint8_t mode = data[0];
  const std::uint64_t body = data[1] + 256u * data[2];
  std::string head(reinterpret_cast<const char*>(data + 3), size - 3);
  if ((mode & 1) != 0) {
    std::string length(8, '\0');
    for (unsigned i = 0; i < 8; ++i) length[i] = static_cast<char>((head.size() >> (8 * i)) & 0xff);
    head = length + head;
  }
  const std::uint64_t file_bytes = head.size() + body;
  const auto file = ParseSafetensors(head, file_bytes);
  WantsText(file);
  if (file.ok()) {
    std::uint64_t at = 0;
    for (const SafetensorsEntry& e : file.value().tensors) {
      if (e.begin != at || e.end < e.begin) __builtin_trap();
      at = e.end;
    }
    if (at != file.value().data_bytes) __builtin_trap();
    if (!BuildSafetensorsHead(file.value()).ok()) __builtin_trap();
  }
  const auto shard = ParseShardHead(head, file_bytes);
  WantsText(shard);
  if (!shard.ok()) return 0;
  for (std::size_t i = 0; i < shard.value().offsets.size(); ++i) {
    const std::uint64_t bytes = shard.value().file.tensors[i].bytes();
    if (bytes > 0 && shard.value().offsets[i] + bytes > shard.value().fields.table_offset) {
      __builtin_trap();
    }
  }
  (void)shard.value().file_crc();
  (void)NameOfByte(shard.value(), body);
  return 0;
}
