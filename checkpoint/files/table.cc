#include "checkpoint/files/table.h"

#include <fmt/format.h>

#include <set>
#include <utility>

#include "checkpoint/files/json.h"

namespace everstep::checkpoint {
namespace {

class Walker {
 public:
  Walker(JsonReader* in, std::uint64_t data_bytes, Table* out)
      : in_(*in), data_bytes_(data_bytes), out_(*out) {}

  bool Node() {
    if (in_.Peek() != JsonReader::Kind::kObject) return in_.Skip();
    if (!in_.BeginObject()) return false;
    std::string kind;
    if (!in_.NextKey(&kind)) return in_.ok() && in_.Fail("a node without a kind");
    if (!Body(kind)) return false;
    std::string second;
    if (in_.NextKey(&second)) return in_.Fail(fmt::format("a node of two kinds, {:.20}", second));
    return in_.ok();
  }

 private:
  bool Body(const std::string& kind) {
    if (kind == "T") return Leaf(false);
    if (kind == "N" || kind == "n") return Leaf(true);
    if (kind == "d" || kind == "o" || kind == "C") return Items();
    if (kind == "l" || kind == "t") return List();
    if (kind != "z" && kind != "f" && kind != "c" && kind != "b" && kind != "y" && kind != "v") {
      ++out_.unknown;
    }
    return in_.Skip();
  }

  // [[key, node], ...]
  bool Items() {
    if (!in_.BeginArray()) return false;
    for (std::size_t i = 0; in_.NextItem(); ++i) {
      if (!in_.BeginArray()) return false;
      std::string key;
      if (!in_.NextItem()) return in_.ok() && in_.Fail("an item without a key");
      if (!Key(i, &key)) return false;
      if (!in_.NextItem()) return in_.ok() && in_.Fail("an item without a value");
      if (!Within(key)) return false;
      if (in_.NextItem()) return in_.Fail("an item of three");
      if (!in_.ok()) return false;
    }
    return in_.ok();
  }

  bool Key(std::size_t index, std::string* key) {
    if (in_.Peek() == JsonReader::Kind::kString) return in_.String(key);
    std::string_view raw;
    const bool number = in_.Peek() == JsonReader::Kind::kNumber;
    if (!in_.Raw(&raw)) return false;
    *key = number ? std::string(raw) : fmt::format("key{}", index);
    return true;
  }

  bool List() {
    if (!in_.BeginArray()) return false;
    for (std::size_t i = 0; in_.NextItem(); ++i) {
      if (!Within(std::to_string(i))) return false;
    }
    return in_.ok();
  }

  bool Within(const std::string& key) {
    constexpr std::size_t kLongestName = 4096;
    const std::size_t before = path_.size();
    if (before + key.size() < kLongestName) {
      if (!path_.empty()) path_ += '.';
      path_ += key;
    }
    const bool ok = Node();
    path_.resize(before);
    return ok;
  }

  // [dtype, shape, offset], and for a part of a DTensor a fourth that describes the whole
  bool Leaf(bool numpy) {
    TableEntry entry;
    if (!in_.BeginArray() || !in_.NextItem() || !in_.String(&entry.dtype) || !in_.NextItem()) {
      return in_.ok() && in_.Fail("a tensor without dtype or shape");
    }
    if (!in_.BeginArray()) return false;
    while (in_.NextItem()) {
      std::uint64_t d = 0;
      if (!in_.Unsigned(&d)) return false;
      if (entry.shape.size() >= 64) return in_.Fail("more than 64 dimensions");
      entry.shape.push_back(d);
    }
    if (!in_.ok()) return false;
    if (!in_.NextItem()) return in_.ok() && in_.Fail("a tensor without an offset");
    if (!in_.Unsigned(&entry.offset)) return false;
    while (in_.NextItem()) {
      if (!in_.Skip()) return false;
    }
    if (!in_.ok()) return false;
    const auto type = numpy ? NumpyType(entry.dtype) : TorchType(entry.dtype);
    const auto elements = Elements(entry.shape);
    if (!elements) return in_.Fail(fmt::format("{}: a shape beyond 64 bits", Named()));
    if (!type) {
      ++out_.unknown;
      return true;
    }
    entry.type = *type;
    if (__builtin_mul_overflow(*elements, std::uint64_t{type->bytes}, &entry.bytes)) {
      return in_.Fail(fmt::format("{}: a shape beyond 64 bits", Named()));
    }
    if (entry.bytes == 0) entry.offset = 0;
    if (entry.offset > data_bytes_ || entry.bytes > data_bytes_ - entry.offset) {
      return in_.Fail(fmt::format("{}: {} bytes at {} end beyond the data's {}", Named(),
                                  entry.bytes, entry.offset, data_bytes_));
    }
    entry.name = Named();
    for (int n = 2; !names_.insert(entry.name).second; ++n) {
      entry.name = fmt::format("{}#{}", Named(), n);
    }
    out_.entries.push_back(std::move(entry));
    return true;
  }

  std::string Named() const { return path_.empty() ? "state" : path_; }

  JsonReader& in_;
  const std::uint64_t data_bytes_;
  Table& out_;
  std::string path_;
  std::set<std::string> names_;
};

}  // namespace

Result<Table> ReadTable(std::string_view text, std::uint64_t data_bytes) {
  JsonReader in(text);
  Table table;
  std::uint64_t format = 0;
  bool root = false;
  in.BeginObject();
  for (std::string key; in.NextKey(&key);) {
    if (key == "format") {
      in.Unsigned(&format);
    } else if (key == "root" && !root) {
      root = true;
      Walker(&in, data_bytes, &table).Node();
    } else {
      in.Skip();
    }
  }
  if (in.Finish() && (format != kTableFormat || !root)) {
    in.Fail(fmt::format("format {}, {} root; this release reads format {} with one", format,
                        root ? "a" : "no", kTableFormat));
  }
  if (!in.ok()) return Error{ErrorCode::kInvalid, "the state's table: " + in.error()};
  return table;
}

}  // namespace everstep::checkpoint
