// A slot's table, as a trainer wrote it: no entry points beyond the data, and a slot with it
// becomes a file whose head is read again.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/files/shard_file.h"
#include "checkpoint/files/table.h"
#include "checkpoint/store/arena.h"
#include "proto/base/crc32c.h"
#include "tests/fuzz/files_fuzz.h"

using namespace everstep::checkpoint;  // NOLINT: a fuzzer of one namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::uint64_t data_bytes = std::uint64_t{data[0]} * 64;
  const std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
  const auto table = ReadTable(text, data_bytes);
  WantsText(table);
  if (!table.ok()) return 0;
  for (const TableEntry& e : table.value().entries) {
    if (e.offset > data_bytes || e.bytes > data_bytes - e.offset) __builtin_trap();
  }
  std::vector<unsigned char> payload(data_bytes, 7);
  payload.insert(payload.end(), text.begin(), text.end());
  SlotFields f;
  f.step = 1;
  f.world_size = 1;
  f.payload_bytes = payload.size();
  f.table_offset = data_bytes;
  f.table_bytes = text.size();
  std::vector<std::uint32_t> chunks;
  for (std::size_t at = 0; at < payload.size(); at += kChunkBytes) {
    chunks.push_back(everstep::Crc32c(payload.data() + at,
                                      std::min<std::size_t>(kChunkBytes, payload.size() - at)));
  }
  std::string head;
  const auto made =
      MakeShardHead({"job", f, CrcRoot(f, chunks.data()), payload.data(), chunks.data()}, &head);
  WantsText(made);
  // A table in other than UTF-8 cannot stand in a JSON header as it is.
  if (made.ok() && made.value().file.metadata.at("everstep.table") == text) {
    const auto again = ParseShardHead(head, made.value().file_bytes());
    if (!again.ok() && again.error().message.find("everstep.table") == std::string::npos) {
      __builtin_trap();
    }
  }
  return 0;
}
