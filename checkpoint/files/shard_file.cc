#include "checkpoint/files/shard_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>
#include <set>
#include <utility>

#include "checkpoint/files/json.h"
#include "checkpoint/files/table.h"
#include "checkpoint/store/arena.h"
#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

Error Wrong(std::string what) {
  return Error{ErrorCode::kInvalid, "checkpoint file: " + std::move(what)};
}

std::string HexOf(const std::vector<std::uint32_t>& crcs) {
  std::string out;
  out.reserve(8 * crcs.size());
  for (const std::uint32_t crc : crcs) out += fmt::format("{:08x}", crc);
  return out;
}

std::optional<std::uint32_t> Hex32(std::string_view text) {
  std::uint32_t value = 0;
  if (text.size() != 8) return std::nullopt;
  const auto [end, error] = std::from_chars(text.data(), text.data() + 8, value, 16);
  if (error != std::errc() || end != text.data() + 8) return std::nullopt;
  return value;
}

bool ReadCrcs(std::string_view text, std::uint64_t count, std::vector<std::uint32_t>* out) {
  if (count > text.size() || text.size() != 8 * count) return false;
  for (std::size_t i = 0; i < count; ++i) {
    const auto crc = Hex32(text.substr(8 * i, 8));
    if (!crc) return false;
    out->push_back(*crc);
  }
  return true;
}

bool ReadBytes(std::string_view hex, void* out, std::size_t size) {
  if (hex.size() != 2 * size) return false;
  auto* bytes = static_cast<unsigned char*>(out);
  for (std::size_t i = 0; i < size; ++i) {
    unsigned value = 0;
    const char* from = hex.data() + 2 * i;
    const auto [end, error] = std::from_chars(from, from + 2, value, 16);
    if (error != std::errc() || end != from + 2) return false;
    bytes[i] = static_cast<unsigned char>(value);
  }
  return true;
}

bool AllZero(const unsigned char* data, std::uint64_t size) {
  return std::all_of(data, data + size, [](unsigned char c) { return c == 0; });
}

// The tensors of the file, where they lie in the payload, and which names share bytes.
struct Plan {
  std::vector<SafetensorsEntry> tensors;
  std::vector<std::uint64_t> offsets;
  std::vector<std::pair<std::string, std::string>> shared;
};

Plan PlanFile(const Table& table, const unsigned char* payload, std::uint64_t data_bytes) {
  std::vector<const TableEntry*> sorted;
  for (const TableEntry& e : table.entries) sorted.push_back(&e);
  std::stable_sort(sorted.begin(), sorted.end(), [](const TableEntry* a, const TableEntry* b) {
    return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes);
  });
  Plan plan;
  std::uint64_t at = 0;    // payload covered up to here
  std::uint64_t file = 0;  // data written up to here
  const auto add = [&](std::string name, std::string_view dtype, std::vector<std::uint64_t> shape,
                       std::uint64_t offset, std::uint64_t bytes) {
    plan.tensors.push_back(
        {std::move(name), std::string(dtype), std::move(shape), file, file + bytes});
    plan.offsets.push_back(offset);
    file += bytes;
  };
  // What no entry names is padding when it is short and zero; else it is kept as bytes.
  const auto gap = [&](std::uint64_t until) {
    if (until - at >= kTensorAlignment || !AllZero(payload + at, until - at)) {
      add(fmt::format("__everstep__.bytes.{}", at), "U8", {until - at}, at, until - at);
    }
    at = until;
  };
  const TableEntry* last = nullptr;
  for (const TableEntry* e : sorted) {
    std::vector<std::uint64_t> shape = e->shape;
    if (e->type.parts != 1) shape.push_back(e->type.parts);
    if (e->bytes == 0) {
      add(e->name, e->type.stored, std::move(shape), e->offset, 0);
      continue;
    }
    if (last != nullptr && last->offset == e->offset && last->bytes == e->bytes) {
      plan.shared.emplace_back(e->name, last->name);
      continue;
    }
    if (e->offset < at) continue;  // overlaps in part: its bytes are kept by the others
    if (e->offset > at) gap(e->offset);
    add(e->name, e->type.stored, std::move(shape), e->offset, e->bytes);
    at = e->offset + e->bytes;
    last = e;
  }
  if (at < data_bytes) gap(data_bytes);
  return plan;
}

std::string Facts(const SlotContent& slot) {
  const SlotFields& f = slot.fields;
  return fmt::format(
      "{{\"version\":{},\"job\":{},\"generation\":{},\"step\":{},\"rank\":{},\"world_size\":{},"
      "\"replicated_layout\":{},\"payload_bytes\":{},\"table_offset\":{},\"captured_ns\":{}}}",
      kShardFileVersion, JsonString(slot.job), f.generation, f.step, f.rank, f.world_size,
      (f.flags & kFlagReplicatedLayout) != 0, f.payload_bytes, f.table_offset, f.captured_ns);
}

}  // namespace

std::uint32_t ShardHead::file_crc() const {
  std::uint32_t crc = head_crc;
  for (std::size_t i = 0; i < file.tensors.size(); ++i) {
    crc = Crc32cCombine(crc, tensor_crcs[i], file.tensors[i].bytes());
  }
  return crc;
}

Result<ShardHead> MakeShardHead(const SlotContent& slot, std::string* text) {
  const SlotFields& f = slot.fields;
  if (auto ok = CheckFields(f); !ok.ok()) return ok.error();
  ShardHead head;
  head.job = slot.job;
  head.fields = f;
  head.crc_root = slot.crc_root;
  head.chunk_crcs.assign(slot.chunk_crcs, slot.chunk_crcs + ChunkCount(f.payload_bytes));
  if (CrcRoot(f, slot.chunk_crcs) != slot.crc_root) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("step {} of rank {}: its header fails its checksum", f.step, f.rank)};
  }
  for (std::size_t i = 0; i < head.chunk_crcs.size(); ++i) {
    const std::uint64_t at = i * std::uint64_t{kChunkBytes};
    const std::uint64_t size = std::min<std::uint64_t>(kChunkBytes, f.payload_bytes - at);
    const std::uint32_t crc = Crc32c(slot.payload + at, size);
    if (crc == head.chunk_crcs[i]) continue;
    return Error{ErrorCode::kCorrupt,
                 fmt::format("step {} of rank {}: chunk {} of {} has CRC {:08x}, not {:08x}",
                             f.step, f.rank, i, head.chunk_crcs.size(), crc, head.chunk_crcs[i])};
  }
  head.table.assign(reinterpret_cast<const char*>(slot.payload) + f.table_offset, f.table_bytes);
  auto table = ReadTable(head.table, f.table_offset);
  if (!table.ok()) return table.error();
  Plan plan = PlanFile(table.value(), slot.payload, f.table_offset);
  head.offsets = plan.offsets;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    head.tensor_crcs.push_back(Crc32c(slot.payload + plan.offsets[i], plan.tensors[i].bytes()));
  }
  std::string shared = "{";
  for (const auto& [name, as] : plan.shared) {
    shared +=
        fmt::format("{}{}:{}", shared.size() > 1 ? "," : "", JsonString(name), JsonString(as));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(&f);
  head.file.tensors = std::move(plan.tensors);
  head.file.metadata = {
      {"format", "pt"},
      {"everstep", Facts(slot)},
      {"everstep.fields", fmt::format("{:02x}", fmt::join(bytes, bytes + sizeof f, ""))},
      {"everstep.root", fmt::format("{:08x}", slot.crc_root)},
      {"everstep.offsets", fmt::format("[{}]", fmt::join(head.offsets, ","))},
      {"everstep.crc32c", HexOf(head.tensor_crcs)},
      {"everstep.chunks", HexOf(head.chunk_crcs)},
      {"everstep.table", head.table},
      {"everstep.shared", shared + "}"},
  };
  auto built = BuildSafetensorsHead(head.file);
  if (!built.ok()) return built.error();
  *text = std::move(built.value());
  head.file.head_bytes = text->size();
  head.file.data_bytes = head.file.tensors.empty() ? 0 : head.file.tensors.back().end;
  head.head_crc = Crc32c(*text);
  return head;
}

Result<ShardHead> ParseShardHead(std::string_view text, std::uint64_t file_bytes) {
  auto parsed = ParseSafetensors(text, file_bytes);
  if (!parsed.ok()) return parsed.error();
  ShardHead head;
  head.file = std::move(parsed.value());
  head.head_crc = Crc32c(text.substr(0, head.file.head_bytes));
  const auto& metadata = head.file.metadata;
  const auto field = [&metadata](const char* key) -> std::string_view {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string_view() : std::string_view(found->second);
  };
  std::uint64_t version = 0;
  JsonReader facts(field("everstep"));
  facts.BeginObject();
  for (std::string key; facts.NextKey(&key);) {
    if (key == "version") {
      facts.Unsigned(&version);
    } else if (key == "job") {
      facts.String(&head.job);
    } else {
      facts.Skip();
    }
  }
  if (!facts.Finish()) return Wrong("metadata everstep, " + facts.error());
  if (version != kShardFileVersion) {
    return Wrong(fmt::format("version {}, this release reads {}", version, kShardFileVersion));
  }
  if (!ReadBytes(field("everstep.fields"), &head.fields, sizeof head.fields)) {
    return Wrong(fmt::format("metadata everstep.fields: not {} bytes in hex", sizeof head.fields));
  }
  if (auto ok = CheckFields(head.fields); !ok.ok()) return Wrong(ok.error().message);
  const auto root = Hex32(field("everstep.root"));
  if (!root) return Wrong("metadata everstep.root: no CRC");
  head.crc_root = *root;
  const std::size_t count = head.file.tensors.size();
  if (!ReadCrcs(field("everstep.crc32c"), count, &head.tensor_crcs)) {
    return Wrong(fmt::format("metadata everstep.crc32c: not one for each of {} tensors", count));
  }
  const std::uint64_t chunks = ChunkCount(head.fields.payload_bytes);
  if (!ReadCrcs(field("everstep.chunks"), chunks, &head.chunk_crcs)) {
    return Wrong(fmt::format("metadata everstep.chunks: not one for each of {} chunks", chunks));
  }
  if (CrcRoot(head.fields, head.chunk_crcs.data()) != head.crc_root) {
    return Wrong("the slot's facts and chunk checksums do not give everstep.root");
  }
  head.table = field("everstep.table");
  if (head.table.size() != head.fields.table_bytes) {
    return Wrong(fmt::format("metadata everstep.table: {} bytes, the slot's table had {}",
                             head.table.size(), head.fields.table_bytes));
  }
  JsonReader offsets(field("everstep.offsets"));
  offsets.BeginArray();
  while (offsets.NextItem()) {
    std::uint64_t offset = 0;
    if (offsets.Unsigned(&offset)) head.offsets.push_back(offset);
  }
  if (!offsets.Finish()) return Wrong("metadata everstep.offsets, " + offsets.error());
  if (head.offsets.size() != count) {
    return Wrong(
        fmt::format("metadata everstep.offsets: {} for {} tensors", head.offsets.size(), count));
  }
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const SafetensorsEntry& e = head.file.tensors[i];
    if (e.bytes() == 0) continue;
    if (head.offsets[i] < at || head.offsets[i] > head.fields.table_offset ||
        e.bytes() > head.fields.table_offset - head.offsets[i]) {
      return Wrong(fmt::format("metadata everstep.offsets: tensor {:.200}, {} bytes at {} of {}",
                               e.name, e.bytes(), head.offsets[i], head.fields.table_offset));
    }
    at = head.offsets[i] + e.bytes();
  }
  return head;
}

void Restamp(const JobId& job, ShardHead* head) {
  if (head->job == job) return;
  head->job = job;
  head->fields.job_crc = Crc32c(job);
  head->crc_root = CrcRoot(head->fields, head->chunk_crcs.data());
}

std::string NameOfByte(const ShardHead& head, std::uint64_t offset) {
  for (std::size_t i = 0; i < head.offsets.size(); ++i) {
    const SafetensorsEntry& e = head.file.tensors[i];
    if (offset >= head.offsets[i] && offset - head.offsets[i] < e.bytes()) {
      return fmt::format("tensor {}, at {} of the file", e.name,
                         head.file.head_bytes + e.begin + (offset - head.offsets[i]));
    }
  }
  return offset >= head.fields.table_offset ? "the state's table" : "padding between tensors";
}

}  // namespace everstep::checkpoint
