// One rank's state as a safetensors file, and back to the very bytes of its slot.
//
//   data       the payload's tensors in order, without the padding between them
//   metadata   "everstep"          JSON: version, job, the slot's facts for people
//              "everstep.fields"   the slot's SlotFields, hex of the bytes
//              "everstep.root"     crc_root, hex
//              "everstep.offsets"  where in the payload each tensor lies, in the file's order, JSON
//              "everstep.crc32c"   CRC32C of each tensor, 8 hex digits each, one after the other
//              "everstep.chunks"   CRC32C of each MiB of payload, likewise
//              "everstep.table"    the slot's table: scalars, strings, structure (no pickle)
//              "everstep.shared"   JSON: name -> name of the tensor whose bytes it shares
//              "format"            "pt", as other readers of safetensors expect
//
// The checksums lie in the header, the header's own in the manifest: a flipped byte anywhere is
// found and named. docs/internals/checkpoint-files.md has every field. Pure but for memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/files/safetensors.h"
#include "checkpoint/store/arena_layout.h"
#include "checkpoint/store/result.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

inline constexpr std::uint32_t kShardFileVersion = 1;

struct ShardHead {
  Safetensors file;
  JobId job;
  SlotFields fields;
  std::uint32_t crc_root = 0;
  std::vector<std::uint64_t> offsets;      // of file.tensors, in the payload
  std::vector<std::uint32_t> tensor_crcs;  // likewise
  std::vector<std::uint32_t> chunk_crcs;
  std::string table;
  std::uint32_t head_crc = 0;  // CRC32C of the file's head_bytes

  std::uint64_t file_bytes() const { return file.head_bytes + file.data_bytes; }
  std::uint32_t file_crc() const;  // CRC32C of the whole file, from the parts'
};

// A slot's content as it lies in memory; nothing of it is owned.
struct SlotContent {
  JobId job;
  SlotFields fields;
  std::uint32_t crc_root = 0;
  const unsigned char* payload = nullptr;     // fields.payload_bytes
  const std::uint32_t* chunk_crcs = nullptr;  // ChunkCount(fields.payload_bytes)
};

// Reads every byte twice (chunks, tensors). kCorrupt: a chunk or the root disagrees, and nothing
// may be written of it. kInvalid: the table cannot be read.
Result<ShardHead> MakeShardHead(const SlotContent& slot, std::string* head);

// `head`: the file's first bytes, as many as SafetensorsHeadBytes says.
Result<ShardHead> ParseShardHead(std::string_view head, std::uint64_t file_bytes);

// The same content for a job of another name: fields and root as that job's slots have them.
void Restamp(const JobId& job, ShardHead* head);

// "tensor model.weight, at 1234 of the file": what the payload's byte belongs to.
std::string NameOfByte(const ShardHead& head, std::uint64_t payload_offset);

}  // namespace everstep::checkpoint
