// The safetensors format (https://github.com/huggingface/safetensors#format): eight bytes of
// length, little-endian, that much JSON, then the tensors' bytes without a hole.
//
// The reader trusts nothing: every number is checked against the file's size before it is used, the
// tensors must tile the data exactly, names are unique, the header has the format's limit of 100
// MB. Pure; no file is touched here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

inline constexpr std::uint64_t kMaxSafetensorsHeader = 100'000'000;

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // "F32"
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // in the data, which begins behind the header
  std::uint64_t end = 0;
  std::uint64_t bytes() const { return end - begin; }
};

struct Safetensors {
  std::vector<SafetensorsEntry> tensors;  // in the order of their bytes
  std::map<std::string, std::string> metadata;
  std::uint64_t head_bytes = 0;  // length and header: where the data begins
  std::uint64_t data_bytes = 0;
};

// The eight bytes at the file's beginning: how many bytes length and header have together.
// kInvalid when there are fewer, or they name more than the limit or the file has.
Result<std::uint64_t> SafetensorsHeadBytes(std::string_view first8, std::uint64_t file_bytes);
// `head`: as many bytes as SafetensorsHeadBytes says (more are not looked at).
Result<Safetensors> ParseSafetensors(std::string_view head, std::uint64_t file_bytes);

// Length and header for `file` (head_bytes and data_bytes are worked out), padded with spaces so
// that the data begins at a multiple of 64. kInvalid: beyond the limit, or the entries do not tile.
Result<std::string> BuildSafetensorsHead(const Safetensors& file);

}  // namespace everstep::checkpoint
