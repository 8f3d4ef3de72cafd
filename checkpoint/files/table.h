// Reads a slot's table (docs/internals/arena.md, "The table"): which tensors and arrays lie where
// in the payload. Pure: bytes in, facts out; whatever the bytes are, it ends without a crash.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/files/dtype.h"
#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

struct TableEntry {
  std::string name;   // "model.layers.0.weight": the keys that lead to it, joined by dots
  std::string dtype;  // as the table names it: torch's, or numpy's dtype.str
  ElementType type;
  std::vector<std::uint64_t> shape;
  std::uint64_t offset = 0;  // in the payload
  std::uint64_t bytes = 0;
};

struct Table {
  std::vector<TableEntry> entries;  // as they stand in the table; names are unique
  // Nodes of a kind or a type that this release does not know. Their bytes are kept all the same.
  std::uint64_t unknown = 0;
};

inline constexpr std::uint32_t kTableFormat = 1;

// `data_bytes`: of the payload before the table; no entry may end beyond. kInvalid names the offset
// in the table and the entry.
Result<Table> ReadTable(std::string_view table, std::uint64_t data_bytes);

}  // namespace everstep::checkpoint
