#include "checkpoint/files/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "checkpoint/files/dtype.h"
#include "checkpoint/files/json.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kAlignment = 64;
constexpr std::string_view kMetadata = "__metadata__";

Error Wrong(std::string what) {
  return Error{ErrorCode::kInvalid, "safetensors: " + std::move(what)};
}

bool ReadMetadata(JsonReader* in, std::map<std::string, std::string>* out) {
  if (!in->BeginObject()) return false;
  for (std::string key; in->NextKey(&key);) {
    std::string value;
    if (!in->String(&value)) return in->Fail(fmt::format("metadata {:.80}: no string", key));
    if (!out->emplace(key, std::move(value)).second) {
      return in->Fail(fmt::format("metadata {:.80} stands twice", key));
    }
  }
  return in->ok();
}

bool ReadEntry(JsonReader* in, SafetensorsEntry* e) {
  bool dtype = false, shape = false, offsets = false;
  if (!in->BeginObject()) return false;
  for (std::string key; in->NextKey(&key);) {
    if (key == "dtype" && !dtype) {
      dtype = true;
      if (!in->String(&e->dtype)) return false;
    } else if (key == "shape" && !shape) {
      shape = true;
      if (!in->BeginArray()) return false;
      while (in->NextItem()) {
        std::uint64_t d = 0;
        if (!in->Unsigned(&d)) return false;
        if (e->shape.size() >= 64) return in->Fail("more than 64 dimensions");
        e->shape.push_back(d);
      }
    } else if (key == "data_offsets" && !offsets) {
      offsets = true;
      if (!in->BeginArray() || !in->NextItem() || !in->Unsigned(&e->begin) || !in->NextItem() ||
          !in->Unsigned(&e->end) || in->NextItem()) {
        return in->Fail("data_offsets: two numbers were expected");
      }
    } else {
      return in->Fail(fmt::format("field {:.80}, unknown or a second time", key));
    }
  }
  if (!in->ok()) return false;
  if (!dtype || !shape || !offsets) return in->Fail("dtype, shape or data_offsets is missing");
  return true;
}

// The tensors lie one behind the other, each as large as its type and shape say.
Outcome CheckTiling(const Safetensors& file) {
  std::uint64_t at = 0;
  for (const SafetensorsEntry& e : file.tensors) {
    const auto bits = SafetensorsBits(e.dtype);
    if (!bits) return Wrong(fmt::format("tensor {:.200}: unknown dtype {:.20}", e.name, e.dtype));
    const auto elements = Elements(e.shape);
    std::uint64_t all = 0;
    if (!elements || __builtin_mul_overflow(*elements, std::uint64_t{*bits}, &all) ||
        all % 8 != 0) {
      return Wrong(fmt::format("tensor {:.200}: a shape that is no whole number of bytes", e.name));
    }
    if (e.begin > e.end || e.end > file.data_bytes) {
      return Wrong(fmt::format("tensor {:.200}: data_offsets [{}, {}] of {} bytes", e.name, e.begin,
                               e.end, file.data_bytes));
    }
    if (e.bytes() != all / 8) {
      return Wrong(fmt::format("tensor {:.200}: {} bytes for dtype and shape of {}", e.name,
                               e.bytes(), all / 8));
    }
    if (e.begin != at) {
      return Wrong(fmt::format("tensor {:.200} begins at {}, {} the one before ends at {}", e.name,
                               e.begin, e.begin < at ? "within:" : "behind a hole:", at));
    }
    at = e.end;
  }
  if (at != file.data_bytes) {
    return Wrong(fmt::format("the tensors end at {}, the data at {}", at, file.data_bytes));
  }
  return Done{};
}

}  // namespace

Result<std::uint64_t> SafetensorsHeadBytes(std::string_view first8, std::uint64_t file_bytes) {
  if (first8.size() < kLengthBytes || file_bytes < kLengthBytes) {
    return Wrong(fmt::format("{} bytes; the header's length alone has 8",
                             std::min<std::uint64_t>(first8.size(), file_bytes)));
  }
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    length |= std::uint64_t{static_cast<unsigned char>(first8[i])} << (8 * i);
  }
  if (length > kMaxSafetensorsHeader) {
    return Wrong(fmt::format("offset 0: a header of {} bytes; the limit is {}", length,
                             kMaxSafetensorsHeader));
  }
  if (length > file_bytes - kLengthBytes) {
    return Wrong(fmt::format("offset 0: a header of {} bytes in a file of {}; it is truncated",
                             length, file_bytes));
  }
  return length + kLengthBytes;
}

Result<Safetensors> ParseSafetensors(std::string_view head, std::uint64_t file_bytes) {
  const auto length = SafetensorsHeadBytes(head, file_bytes);
  if (!length.ok()) return length.error();
  if (head.size() < length.value()) {
    return Wrong(fmt::format("{} bytes of a head of {}", head.size(), length.value()));
  }
  Safetensors file;
  file.head_bytes = length.value();
  file.data_bytes = file_bytes - length.value();
  JsonReader in(head.substr(kLengthBytes, length.value() - kLengthBytes));
  std::set<std::string> names;
  in.BeginObject();
  for (std::string name; in.NextKey(&name);) {
    if (!names.insert(name).second) {
      in.Fail(fmt::format("tensor {:.200} stands twice", name));
    } else if (name == kMetadata) {
      ReadMetadata(&in, &file.metadata);
    } else {
      SafetensorsEntry e;
      e.name = name;
      if (ReadEntry(&in, &e)) file.tensors.push_back(std::move(e));
    }
  }
  if (!in.Finish()) return Wrong("header, " + in.error());
  std::sort(file.tensors.begin(), file.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  if (auto ok = CheckTiling(file); !ok.ok()) return ok.error();
  return file;
}

Result<std::string> BuildSafetensorsHead(const Safetensors& file) {
  Safetensors whole = file;
  whole.data_bytes = file.tensors.empty() ? 0 : file.tensors.back().end;
  if (auto ok = CheckTiling(whole); !ok.ok()) return ok.error();
  std::string json = "{\"__metadata__\":{";
  for (const auto& [key, value] : file.metadata) {
    if (json.back() != '{') json += ',';
    json += JsonString(key) + ':' + JsonString(value);
  }
  json += '}';
  for (const SafetensorsEntry& e : file.tensors) {
    json += fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        JsonString(e.name), e.dtype, fmt::join(e.shape, ","), e.begin, e.end);
  }
  json += '}';
  json.append((kAlignment - (json.size() + kLengthBytes) % kAlignment) % kAlignment, ' ');
  if (json.size() > kMaxSafetensorsHeader) {
    return Wrong(
        fmt::format("a header of {} bytes; the format's limit is {}: keep large plain "
                    "values as tensors",
                    json.size(), kMaxSafetensorsHeader));
  }
  std::string head(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    head[i] = static_cast<char>((json.size() >> (8 * i)) & 0xff);
  }
  return head + json;
}

}  // namespace everstep::checkpoint
