// What makes a folder of shard files a checkpoint: manifest.json, written last. JSON for people and
// tools; its last field is the CRC32C of all text before it, so that a truncated or changed one is
// known. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/store/result.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

inline constexpr std::uint32_t kManifestVersion = 1;
inline constexpr std::uint64_t kMaxManifestBytes = 64u << 20;
inline constexpr std::uint64_t kMaxWorldSize = 1u << 20;
inline constexpr std::uint64_t kMaxGeneration = std::uint64_t{1} << 48;

struct ManifestFile {
  Rank rank = 0;
  std::string file;  // in the manifest's own folder
  std::uint64_t bytes = 0;
  std::uint32_t crc32c = 0;      // of the whole file
  std::uint64_t head_bytes = 0;  // of the safetensors length and header
  std::uint32_t head_crc32c = 0;
  std::uint32_t crc_root = 0;  // of the slot it was written from
  std::uint64_t payload_bytes = 0;
  friend bool operator==(const ManifestFile&, const ManifestFile&) = default;
};

struct Manifest {
  JobId job;
  Generation generation = 0;  // that captured it
  Step step = kNoStep;
  std::int32_t world_size = 0;
  bool replicated_layout = false;
  bool shares = false;              // each rank's file is a share of one state (SlotFields)
  std::uint64_t captured_ns = 0;    // wall clock, of rank 0's capture
  std::uint64_t sealed_ns = 0;      // wall clock, when the manifest was written
  std::string writer;               // "everstep 0.1.0"
  std::vector<ManifestFile> ranks;  // by rank, one for each of 0 .. world_size-1
  friend bool operator==(const Manifest&, const Manifest&) = default;

  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (const ManifestFile& f : ranks) sum += f.bytes;
    return sum;
  }
};

std::string WriteManifest(const Manifest& manifest);
// kCorrupt: its own checksum disagrees (or is not there: truncated). kInvalid: it is whole and says
// what cannot be; the text names offset and field.
Result<Manifest> ParseManifest(std::string_view text);

}  // namespace everstep::checkpoint
