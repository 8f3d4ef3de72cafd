#include "checkpoint/files/dtype.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace everstep::checkpoint {
namespace {

struct Bits {
  std::string_view name;
  std::uint32_t bits;
};
// https://github.com/huggingface/safetensors, safetensors/src/tensor.rs, Dtype
constexpr Bits kSafetensors[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

struct Torch {
  std::string_view name;
  ElementType type;
};
constexpr Torch kTorch[] = {
    {"float32", {4, "F32"}},
    {"bfloat16", {2, "BF16"}},
    {"float16", {2, "F16"}},
    {"float64", {8, "F64"}},
    {"int64", {8, "I64"}},
    {"int32", {4, "I32"}},
    {"int16", {2, "I16"}},
    {"int8", {1, "I8"}},
    {"uint8", {1, "U8"}},
    {"bool", {1, "BOOL"}},
    {"uint16", {2, "U16"}},
    {"uint32", {4, "U32"}},
    {"uint64", {8, "U64"}},
    {"float8_e4m3fn", {1, "F8_E4M3"}},
    {"float8_e5m2", {1, "F8_E5M2"}},
    // Younger than most readers of safetensors, or unknown to it: their bytes.
    {"float8_e8m0fnu", {1, "U8"}},
    {"float8_e4m3fnuz", {1, "U8"}},
    {"float8_e5m2fnuz", {1, "U8"}},
    {"float4_e2m1fn_x2", {1, "U8"}},
    {"complex32", {4, "F16", 2}},
    {"complex64", {8, "F32", 2}},
    {"complex128", {16, "F64", 2}},
};

}  // namespace

std::optional<std::uint32_t> SafetensorsBits(std::string_view dtype) {
  const auto* found = std::find_if(std::begin(kSafetensors), std::end(kSafetensors),
                                   [dtype](const Bits& b) { return b.name == dtype; });
  if (found == std::end(kSafetensors)) return std::nullopt;
  return found->bits;
}

std::optional<ElementType> TorchType(std::string_view name) {
  const auto* found = std::find_if(std::begin(kTorch), std::end(kTorch),
                                   [name](const Torch& t) { return t.name == name; });
  if (found == std::end(kTorch)) return std::nullopt;
  return found->type;
}

std::optional<ElementType> NumpyType(std::string_view name) {
  if (name.size() < 3 || (name[0] != '<' && name[0] != '|' && name[0] != '>')) return std::nullopt;
  std::uint32_t size = 0;
  const char* const end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(name.data() + 2, end, size);
  if (error != std::errc() || size == 0 || size > (1u << 20)) return std::nullopt;
  const char kind = name[1];
  const bool unit = kind == 'M' || kind == 'm';  // "<M8[ns]"
  if (rest != end && !(unit && *rest == '[')) return std::nullopt;
  if (kind == 'U') return ElementType{4 * size, "U8", 4 * std::uint64_t{size}};
  if (kind == 'S') return ElementType{size, "U8", size};
  const auto bytes = [size](std::string_view stored) {
    return ElementType{size, stored, stored == "U8" ? size : std::uint64_t{1}};
  };
  if (name[0] == '>' && size > 1) return bytes("U8");
  switch (kind) {
    case 'f': return bytes(size == 2 ? "F16" : size == 4 ? "F32" : size == 8 ? "F64" : "U8");
    case 'i':
      return bytes(size == 1   ? "I8"
                   : size == 2 ? "I16"
                   : size == 4 ? "I32"
                   : size == 8 ? "I64"
                               : "U8");
    case 'u':
      if (size == 1) return ElementType{1, "U8", 1};
      return bytes(size == 2 ? "U16" : size == 4 ? "U32" : size == 8 ? "U64" : "U8");
    case 'b':
      if (size == 1) return ElementType{1, "BOOL", 1};
      return std::nullopt;
    case 'c':
      if (size == 8) return ElementType{8, "F32", 2};
      if (size == 16) return ElementType{16, "F64", 2};
      return bytes("U8");
    case 'M':
    case 'm': return bytes(size == 8 ? "I64" : "U8");
    default: return std::nullopt;
  }
}

std::optional<std::uint64_t> Elements(const std::vector<std::uint64_t>& shape) {
  // A dimension of 0 makes it empty, however large the others are.
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  std::uint64_t n = 1;
  for (const std::uint64_t d : shape) {
    if (__builtin_mul_overflow(n, d, &n) || n > (std::uint64_t{1} << 63)) return std::nullopt;
  }
  return n;
}

}  // namespace everstep::checkpoint
