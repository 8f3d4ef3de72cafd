// The names that element types have in torch, numpy and safetensors, and their sizes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace everstep::checkpoint {

// Bits of one element of a safetensors dtype ("F32", "BF16", "F4", ...); none: unknown.
std::optional<std::uint32_t> SafetensorsBits(std::string_view dtype);

struct ElementType {
  std::uint32_t bytes = 0;  // of one element
  // How safetensors names it. A type that it lacks (complex64, numpy's strings) is named by parts:
  // `parts` of them in a last dimension of its own. 1: none is added.
  std::string_view stored;
  std::uint64_t parts = 1;
};
// "float32", "complex64": torch's name without its prefix.
std::optional<ElementType> TorchType(std::string_view name);
// "<f4", "|u1", "<U16": numpy's dtype.str, little-endian.
std::optional<ElementType> NumpyType(std::string_view name);

// Elements of a shape; none: more than 2^63.
std::optional<std::uint64_t> Elements(const std::vector<std::uint64_t>& shape);

}  // namespace everstep::checkpoint
