#include "checkpoint/files/manifest.h"

#include <fmt/format.h>

#include <charconv>
#include <set>

#include "checkpoint/files/json.h"
#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

constexpr std::string_view kFormat = "everstep-checkpoint";
constexpr std::string_view kSealField = ",\n \"crc32c\": \"";
constexpr std::string_view kSealEnd = "\"}\n";

bool ReadHex(JsonReader* in, std::uint32_t* out) {
  std::string text;
  if (!in->String(&text)) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out, 16);
  if (text.size() == 8 && error == std::errc() && end == text.data() + text.size()) return true;
  return in->Fail("eight hex digits were expected");
}

// A name that stays within its folder.
bool PlainName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

bool ReadFile(JsonReader* in, ManifestFile* file) {
  std::uint64_t seen = 0;
  std::int64_t rank = -1;
  if (!in->BeginObject()) return false;
  for (std::string key; in->NextKey(&key);) {
    const auto field = [&](unsigned bit) {
      if ((seen & (1u << bit)) != 0) return in->Fail(fmt::format("field {} twice", key));
      seen |= 1u << bit;
      return true;
    };
    if (key == "rank") {
      if (!field(0) || !in->Signed(&rank)) return false;
    } else if (key == "file") {
      if (!field(1) || !in->String(&file->file)) return false;
    } else if (key == "bytes") {
      if (!field(2) || !in->Unsigned(&file->bytes)) return false;
    } else if (key == "crc32c") {
      if (!field(3) || !ReadHex(in, &file->crc32c)) return false;
    } else if (key == "head_bytes") {
      if (!field(4) || !in->Unsigned(&file->head_bytes)) return false;
    } else if (key == "head_crc32c") {
      if (!field(5) || !ReadHex(in, &file->head_crc32c)) return false;
    } else if (key == "crc_root") {
      if (!field(6) || !ReadHex(in, &file->crc_root)) return false;
    } else if (key == "payload_bytes") {
      if (!field(7) || !in->Unsigned(&file->payload_bytes)) return false;
    } else if (!in->Skip()) {
      return false;
    }
  }
  if (!in->ok()) return false;
  if (seen != 0xFF) return in->Fail("a rank's entry lacks a field");
  if (rank < 0 || rank >= static_cast<std::int64_t>(kMaxWorldSize)) {
    return in->Fail(fmt::format("rank {}", rank));
  }
  if (!PlainName(file->file)) return in->Fail("a file name that leaves its folder");
  file->rank = static_cast<Rank>(rank);
  return true;
}

}  // namespace

std::string WriteManifest(const Manifest& m) {
  std::string text = fmt::format(
      "{{\"format\": \"{}\", \"version\": {},\n \"job\": {}, \"generation\": {}, \"step\": {},\n"
      " \"world_size\": {}, \"replicated_layout\": {},{}\n \"captured_ns\": {}, \"sealed_ns\": {}, "
      "\"writer\": {},\n \"ranks\": [",
      kFormat, kManifestVersion, JsonString(m.job), m.generation, m.step, m.world_size,
      m.replicated_layout, m.shares ? " \"shares\": true," : "", m.captured_ns, m.sealed_ns,
      JsonString(m.writer));
  for (const ManifestFile& f : m.ranks) {
    text += fmt::format(
        "{}\n  {{\"rank\": {}, \"file\": {}, \"bytes\": {}, \"crc32c\": \"{:08x}\", "
        "\"head_bytes\": {}, \"head_crc32c\": \"{:08x}\", \"crc_root\": \"{:08x}\", "
        "\"payload_bytes\": {}}}",
        &f == m.ranks.data() ? "" : ",", f.rank, JsonString(f.file), f.bytes, f.crc32c,
        f.head_bytes, f.head_crc32c, f.crc_root, f.payload_bytes);
  }
  text += "]";
  return fmt::format("{}{}{:08x}{}", text, kSealField, Crc32c(text), kSealEnd);
}

Result<Manifest> ParseManifest(std::string_view text) {
  const auto wrong = [](ErrorCode code, const std::string& what) {
    return Error{code, "manifest: " + what};
  };
  if (text.size() > kMaxManifestBytes) {
    return wrong(ErrorCode::kInvalid,
                 fmt::format("{} bytes; the limit is {}", text.size(), kMaxManifestBytes));
  }
  const std::size_t seal = text.rfind(kSealField);
  if (seal == std::string_view::npos ||
      text.size() != seal + kSealField.size() + 8 + kSealEnd.size() || !text.ends_with(kSealEnd)) {
    return wrong(ErrorCode::kCorrupt, "it does not end with its checksum: truncated");
  }
  const std::uint32_t crc = Crc32c(text.substr(0, seal));
  const std::string_view told = text.substr(seal + kSealField.size(), 8);
  if (told != fmt::format("{:08x}", crc)) {
    return wrong(ErrorCode::kCorrupt,
                 fmt::format("its checksum is {:08x}, the text says {}", crc, told));
  }
  Manifest m;
  JsonReader in(text);
  std::string format;
  std::uint64_t version = 0, seen = 0;
  std::int64_t world = 0;
  std::set<std::string> keys;
  in.BeginObject();
  for (std::string key; in.NextKey(&key);) {
    if (!keys.insert(key).second) in.Fail(fmt::format("field {:.80} twice", key));
    ++seen;
    if (key == "format") {
      in.String(&format);
    } else if (key == "version") {
      in.Unsigned(&version);
    } else if (key == "job") {
      in.String(&m.job);
    } else if (key == "generation") {
      in.Unsigned(&m.generation);
    } else if (key == "step") {
      in.Signed(&m.step);
    } else if (key == "world_size") {
      in.Signed(&world);
    } else if (key == "replicated_layout") {
      in.Bool(&m.replicated_layout);
    } else if (key == "shares") {  // came later: absent is false
      in.Bool(&m.shares);
      --seen;
    } else if (key == "captured_ns") {
      in.Unsigned(&m.captured_ns);
    } else if (key == "sealed_ns") {
      in.Unsigned(&m.sealed_ns);
    } else if (key == "writer") {
      in.String(&m.writer);
    } else if (key == "ranks") {
      in.BeginArray();
      while (in.NextItem()) {
        ManifestFile file;
        if (!ReadFile(&in, &file)) break;
        if (static_cast<std::size_t>(file.rank) != m.ranks.size()) {
          in.Fail(fmt::format("rank {} where rank {} was expected", file.rank, m.ranks.size()));
        }
        m.ranks.push_back(std::move(file));
      }
    } else {
      in.Skip();
      --seen;
    }
    if (!in.ok()) break;
  }
  if (in.Finish()) {
    if (format != kFormat || version != kManifestVersion) {
      in.Fail(fmt::format("format {:.40} version {}; this release reads {} version {}", format,
                          version, kFormat, kManifestVersion));
    } else if (seen != 11) {
      in.Fail("a field is missing");
    } else if (m.generation > kMaxGeneration) {
      in.Fail(fmt::format("generation {}", m.generation));
    } else if (m.step < 0 || world < 1 || world > static_cast<std::int64_t>(kMaxWorldSize)) {
      in.Fail(fmt::format("step {}, world size {}", m.step, world));
    } else if (m.ranks.size() != static_cast<std::size_t>(world)) {
      in.Fail(fmt::format("{} files for a world of {}", m.ranks.size(), world));
    }
  }
  if (!in.ok()) return wrong(ErrorCode::kInvalid, in.error());
  m.world_size = static_cast<std::int32_t>(world);
  return m;
}

}  // namespace everstep::checkpoint
