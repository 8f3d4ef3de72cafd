#include "checkpoint/files/file_tier.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <tuple>
#include <utility>

#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr char kManifest[] = "manifest.json";
constexpr char kDamagedMark[] = "damaged";
constexpr char kGivenUpMark[] = "given-up";
constexpr char kVerifiedMark[] = "verified";
constexpr std::string_view kPartSuffix = ".part";

bool Digits(std::string_view text, std::uint64_t* out) {
  if (text.empty() || text.size() > 19) return false;
  *out = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
    *out = *out * 10 + static_cast<std::uint64_t>(c - '0');
  }
  return true;
}

// Of this process among all that write into a shared directory: process numbers of two machines or
// containers may be equal.
std::uint32_t OwnToken() {
  static const std::uint32_t token = std::random_device()();
  return token;
}

}  // namespace

const char* FileStateName(FileCheckpoint::State state) {
  switch (state) {
    case FileCheckpoint::State::kComplete: return "complete";
    case FileCheckpoint::State::kIncomplete: return "incomplete";
    case FileCheckpoint::State::kGivenUp: return "given up";
    case FileCheckpoint::State::kDamaged: return "damaged";
  }
  return "unknown";
}

std::string CheckpointName(Step step, Generation generation) {
  return fmt::format("step-{:012}.gen-{}", step, generation);
}

bool ParseCheckpointName(const std::string& name, Step* step, Generation* generation) {
  const std::size_t dot = name.find(".gen-");
  if (!name.starts_with("step-") || dot == std::string::npos) return false;
  std::uint64_t s = 0, g = 0;
  const std::string_view text = name;
  if (!Digits(text.substr(5, dot - 5), &s) || !Digits(text.substr(dot + 5), &g)) return false;
  if (s > INT64_MAX || CheckpointName(static_cast<Step>(s), g) != name) return false;
  *step = static_cast<Step>(s);
  *generation = g;
  return true;
}

std::string ShardFileName(Rank rank, std::int32_t world_size) {
  return fmt::format("rank-{:05}-of-{:05}.safetensors", rank, world_size);
}

// Beside, synced, renamed, and the folder synced: after it returns the file is there whole, and
// before it the old one (or none).
Outcome FileTier::Replace(const std::string& folder, const std::string& name,
                          const std::function<Outcome(DiskWriter*)>& write) {
  const std::string part = fmt::format("{}/.{}.{:08x}{}", folder, name, OwnToken(), kPartSuffix);
  const auto attempt = [&]() -> Outcome {
    auto file = disk_->Create(part);
    if (!file.ok()) return file.error();
    KillPoint("persist.part_made");
    if (auto ok = write(file.value().get()); !ok.ok()) return ok;
    KillPoint("persist.part_written");
    if (auto ok = file.value()->Sync(); !ok.ok()) return ok;
    KillPoint("persist.part_synced");
    file.value().reset();
    if (auto ok = disk_->Rename(part, folder + "/" + name); !ok.ok()) return ok;
    KillPoint("persist.part_renamed");
    return disk_->SyncDirectory(folder);
  };
  auto done = attempt();
  // A full disk gets back what was taken of it.
  if (!done.ok()) [[maybe_unused]]
    const auto removed = disk_->Remove(part);
  return done;
}

Result<ShardHead> FileTier::ReadHeadAt(const std::string& path) {
  auto file = disk_->Open(path);
  if (!file.ok()) return file.error();
  DiskReader& in = *file.value();
  char first[8] = {};
  if (in.bytes() < sizeof first) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: {} bytes; it is truncated", path, in.bytes())};
  }
  if (auto ok = in.Read(0, first, sizeof first); !ok.ok()) return ok.error();
  auto length = SafetensorsHeadBytes({first, sizeof first}, in.bytes());
  if (!length.ok()) return Error{length.error().code, path + ": " + length.error().message};
  std::string head(length.value(), '\0');
  if (auto ok = in.Read(0, head.data(), head.size()); !ok.ok()) return ok.error();
  auto parsed = ParseShardHead(head, in.bytes());
  if (!parsed.ok()) return Error{parsed.error().code, path + ": " + parsed.error().message};
  return parsed;
}

Outcome FileTier::WriteShard(const SlotContent& slot, std::uint64_t* written) {
  *written = 0;
  std::string text;
  auto made = MakeShardHead(slot, &text);
  if (!made.ok()) return made.error();
  const ShardHead& head = made.value();
  const SlotFields& f = slot.fields;
  const std::string folder = Folder(CheckpointName(f.step, f.generation));
  const std::string name = ShardFileName(f.rank, f.world_size);
  if (auto there = ReadHeadAt(folder + "/" + name);
      there.ok() && there.value().head_crc == head.head_crc &&
      there.value().file_bytes() == head.file_bytes()) {
    return Done{};
  }
  if (auto ok = disk_->MakeDirectory(folder); !ok.ok()) return ok;
  KillPoint("persist.folder_made");
  auto done = Replace(folder, name, [&](DiskWriter* out) -> Outcome {
    if (auto ok = out->Write(text.data(), text.size()); !ok.ok()) return ok;
    for (std::size_t i = 0; i < head.offsets.size(); ++i) {
      const std::uint64_t bytes = head.file.tensors[i].bytes();
      if (bytes == 0) continue;
      if (auto ok = out->Write(slot.payload + head.offsets[i], bytes); !ok.ok()) return ok;
      KillPoint("persist.tensor_written");
    }
    return Done{};
  });
  if (!done.ok()) return done;
  KillPoint("persist.shard_written");
  *written = head.file_bytes();
  return disk_->SyncDirectory(directory_);
}

Result<bool> FileTier::Seal(Step step, Generation generation, std::uint64_t now_ns,
                            const std::string& writer, std::string* missing) {
  const std::string name = CheckpointName(step, generation);
  auto names = disk_->List(Folder(name));
  if (!names.ok()) return names.error();
  Manifest m{.generation = generation,
             .step = step,
             .replicated_layout = true,
             .sealed_ns = now_ns,
             .writer = writer};
  std::vector<std::string> shards;
  for (const std::string& file : names.value()) {
    if (file == kManifest) return true;
    if (file.starts_with("rank-") && file.ends_with(".safetensors")) shards.push_back(file);
  }
  for (const std::string& file : shards) {
    auto read = ReadHeadAt(Folder(name) + "/" + file);
    if (!read.ok()) return read.error();
    const ShardHead& head = read.value();
    const SlotFields& f = head.fields;
    if (m.ranks.empty()) {
      m.job = head.job;
      m.world_size = f.world_size;
      m.captured_ns = f.captured_ns;
    }
    if (f.step != step || f.generation != generation || f.world_size != m.world_size ||
        head.job != m.job || file != ShardFileName(f.rank, f.world_size)) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("{}/{}/{}: it is of job {}, step {}, generation {}, rank {} of {}, "
                               "and does not belong beside the others; two jobs may be writing to "
                               "one directory: give each its own",
                               directory_, name, file, head.job, f.step, f.generation, f.rank,
                               f.world_size)};
    }
    m.replicated_layout = m.replicated_layout && (f.flags & kFlagReplicatedLayout) != 0;
    m.shares = m.shares || (f.flags & kFlagShare) != 0;
    m.ranks.push_back({.rank = f.rank,
                       .file = file,
                       .bytes = head.file_bytes(),
                       .crc32c = head.file_crc(),
                       .head_bytes = head.file.head_bytes,
                       .head_crc32c = head.head_crc,
                       .crc_root = head.crc_root,
                       .payload_bytes = f.payload_bytes});
  }
  std::sort(m.ranks.begin(), m.ranks.end(),
            [](const ManifestFile& a, const ManifestFile& b) { return a.rank < b.rank; });
  if (m.ranks.empty() || m.ranks.size() != static_cast<std::size_t>(m.world_size)) {
    if (missing != nullptr) {
      *missing =
          fmt::format("{} of {} ranks' files are in {}", m.ranks.size(),
                      m.world_size == 0 ? "all" : std::to_string(m.world_size), Folder(name));
    }
    return false;
  }
  KillPoint("persist.ranks_found");
  const std::string text = WriteManifest(m);
  auto done = Replace(Folder(name), kManifest,
                      [&](DiskWriter* out) { return out->Write(text.data(), text.size()); });
  if (!done.ok()) return done.error();
  KillPoint("persist.manifest_written");
  if (auto ok = disk_->SyncDirectory(directory_); !ok.ok()) return ok.error();
  return true;
}

Result<FileCheckpoint> FileTier::Look(const std::string& name) {
  FileCheckpoint c{.name = name};
  if (!ParseCheckpointName(name, &c.step, &c.generation)) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{}/{}: not a checkpoint's name (step-N.gen-G)", directory_, name)};
  }
  auto names = disk_->List(Folder(name));
  if (!names.ok()) return names.error();
  const auto has = [&names](const std::string& file) {
    return std::binary_search(names.value().begin(), names.value().end(), file);
  };
  const auto damaged = [&c](std::string why) {
    c.state = FileCheckpoint::State::kDamaged;
    c.why = std::move(why);
    return c;
  };
  const auto words = [&](const char* file) {
    auto mark = disk_->Open(Folder(name) + "/" + file);
    if (!mark.ok()) return mark.error().message;
    std::string why(std::min<std::uint64_t>(4096, mark.value()->bytes()), '\0');
    if (!mark.value()->Read(0, why.data(), why.size()).ok()) why.clear();
    return why;
  };
  if (has(kDamagedMark)) return damaged(words(kDamagedMark));
  c.verified = has(kVerifiedMark);
  if (!has(kManifest)) {
    const auto files = std::count_if(names.value().begin(), names.value().end(),
                                     [](const std::string& n) { return n.starts_with("rank-"); });
    c.why = fmt::format("no manifest; {} ranks' files", files);
    return c;
  }
  auto file = disk_->Open(Folder(name) + "/" + kManifest);
  if (!file.ok()) return damaged(file.error().message);
  if (file.value()->bytes() > kMaxManifestBytes) return damaged("a manifest beyond its limit");
  std::string text(file.value()->bytes(), '\0');
  if (auto ok = file.value()->Read(0, text.data(), text.size()); !ok.ok()) {
    return damaged(ok.error().message);
  }
  auto manifest = ParseManifest(text);
  if (!manifest.ok()) return damaged(manifest.error().message);
  c.manifest = std::move(manifest.value());
  if (c.manifest.step != c.step || c.manifest.generation != c.generation) {
    return damaged(fmt::format("its manifest is of step {}, generation {}", c.manifest.step,
                               c.manifest.generation));
  }
  for (const ManifestFile& f : c.manifest.ranks) {
    auto shard = disk_->Open(Folder(name) + "/" + f.file);
    if (!shard.ok()) return damaged(shard.error().message);
    if (shard.value()->bytes() != f.bytes) {
      return damaged(
          fmt::format("{} has {} bytes, not {}", f.file, shard.value()->bytes(), f.bytes));
    }
  }
  c.state = FileCheckpoint::State::kComplete;
  if (has(kGivenUpMark)) {
    c.state = FileCheckpoint::State::kGivenUp;
    c.why = words(kGivenUpMark);
  }
  return c;
}

Result<std::vector<FileCheckpoint>> FileTier::List() {
  auto names = disk_->List(directory_);
  if (!names.ok()) return names.error();
  std::vector<FileCheckpoint> found;
  Step step;
  Generation generation;
  for (const std::string& name : names.value()) {
    if (!ParseCheckpointName(name, &step, &generation)) continue;
    auto c = Look(name);
    if (c.ok()) {
      found.push_back(std::move(c.value()));
    } else if (c.error().code != ErrorCode::kNotFound) {  // removed meanwhile
      found.push_back({.name = name,
                       .step = step,
                       .generation = generation,
                       .state = FileCheckpoint::State::kDamaged,
                       .why = c.error().message});
    }
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::tie(a.step, a.generation) > std::tie(b.step, b.generation);
  });
  return found;
}

Result<ShardHead> FileTier::ReadHead(const FileCheckpoint& c, Rank rank) {
  if (rank < 0 || static_cast<std::size_t>(rank) >= c.manifest.ranks.size()) {
    return Error{ErrorCode::kNotFound, fmt::format("{} has no rank {}", c.name, rank)};
  }
  const ManifestFile& f = c.manifest.ranks[static_cast<std::size_t>(rank)];
  const std::string path = Folder(c.name) + "/" + f.file;
  auto head = ReadHeadAt(path);
  if (!head.ok()) return Error{ErrorCode::kCorrupt, head.error().message};
  const ShardHead& h = head.value();
  if (h.head_crc != f.head_crc32c || h.crc_root != f.crc_root || h.file_bytes() != f.bytes ||
      h.fields.rank != rank || h.fields.payload_bytes != f.payload_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: its header has CRC {:08x}, the manifest says {:08x}", path,
                             h.head_crc, f.head_crc32c)};
  }
  return head;
}

Outcome FileTier::ReadPayload(const FileCheckpoint& c, Rank rank, const ShardHead& head,
                              unsigned char* payload, const std::atomic<bool>* over) {
  const std::string path =
      Folder(c.name) + "/" + c.manifest.ranks[static_cast<std::size_t>(rank)].file;
  auto file = disk_->Open(path);
  if (!file.ok()) return file.error();
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < head.offsets.size(); ++i) {
    const SafetensorsEntry& e = head.file.tensors[i];
    if (e.bytes() == 0) continue;
    std::memset(payload + at, 0, head.offsets[i] - at);
    at = head.offsets[i] + e.bytes();
    for (std::uint64_t done = 0; done < e.bytes();) {
      if (over != nullptr && *over) return Error{ErrorCode::kStale, path + ": given up"};
      const std::uint64_t piece = std::min<std::uint64_t>(kChunkBytes, e.bytes() - done);
      auto ok = file.value()->Read(head.file.head_bytes + e.begin + done,
                                   payload + head.offsets[i] + done, piece);
      if (!ok.ok()) return ok;
      done += piece;
    }
  }
  std::memset(payload + at, 0, head.fields.table_offset - at);
  std::copy_n(head.table.data(), head.table.size(), payload + head.fields.table_offset);
  for (std::size_t i = 0; i < head.chunk_crcs.size(); ++i) {
    const std::uint64_t from = i * std::uint64_t{kChunkBytes};
    const std::uint64_t size =
        std::min<std::uint64_t>(kChunkBytes, head.fields.payload_bytes - from);
    if (Crc32c(payload + from, size) == head.chunk_crcs[i]) continue;
    for (std::size_t t = 0; t < head.offsets.size(); ++t) {  // the tensor's own checksum names it
      const SafetensorsEntry& e = head.file.tensors[t];
      const std::uint32_t crc = Crc32c(payload + head.offsets[t], e.bytes());
      if (crc == head.tensor_crcs[t]) continue;
      return Error{ErrorCode::kCorrupt,
                   fmt::format("{}: tensor {} ({} bytes at {} of the file) has CRC {:08x}, not "
                               "{:08x}",
                               path, e.name, e.bytes(), head.file.head_bytes + e.begin, crc,
                               head.tensor_crcs[t])};
    }
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: {} fails its checksum", path, NameOfByte(head, from))};
  }
  return Done{};
}

Outcome FileTier::ReadChunks(
    const FileCheckpoint& c, Rank rank, const ShardHead& head,
    const std::vector<std::uint32_t>& chunks,
    const std::function<bool(std::uint32_t, const unsigned char*, std::uint32_t)>& take) {
  const std::string path =
      Folder(c.name) + "/" + c.manifest.ranks[static_cast<std::size_t>(rank)].file;
  auto file = disk_->Open(path);
  if (!file.ok()) return file.error();
  std::vector<unsigned char> data(kChunkBytes);
  for (const std::uint32_t chunk : chunks) {
    const std::uint64_t begin = std::uint64_t{chunk} * kChunkBytes;
    if (chunk >= head.chunk_crcs.size()) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("{}: chunk {} of {}", path, chunk, head.chunk_crcs.size())};
    }
    const std::uint64_t end =
        std::min<std::uint64_t>(begin + kChunkBytes, head.fields.payload_bytes);
    std::fill(data.begin(), data.end(), static_cast<unsigned char>(0));
    for (std::size_t i = 0; i < head.offsets.size(); ++i) {
      const SafetensorsEntry& e = head.file.tensors[i];
      const std::uint64_t from = std::max(begin, head.offsets[i]);
      const std::uint64_t to = std::min(end, head.offsets[i] + e.bytes());
      if (from >= to) continue;
      auto ok = file.value()->Read(head.file.head_bytes + e.begin + (from - head.offsets[i]),
                                   data.data() + (from - begin), to - from);
      if (!ok.ok()) return ok;
    }
    if (const std::uint64_t from = std::max(begin, head.fields.table_offset); from < end) {
      std::copy_n(head.table.data() + (from - head.fields.table_offset), end - from,
                  data.data() + (from - begin));
    }
    if (Crc32c(data.data(), end - begin) != head.chunk_crcs[chunk]) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("{}: {} fails its checksum", path, NameOfByte(head, begin))};
    }
    if (!take(chunk, data.data(), static_cast<std::uint32_t>(end - begin))) {
      return Error{ErrorCode::kStale, fmt::format("reading {}: given up here", path)};
    }
  }
  return Done{};
}

std::vector<Damage> FileTier::Verify(const FileCheckpoint& c,
                                     const std::function<void(std::uint64_t)>& progress) {
  std::vector<Damage> found;
  if (c.state != FileCheckpoint::State::kComplete) {
    found.push_back({c.name, c.why});
    return found;
  }
  std::vector<unsigned char> buffer(4u << 20);
  std::uint64_t done = 0;
  for (const ManifestFile& f : c.manifest.ranks) {
    const std::string path = Folder(c.name) + "/" + f.file;
    auto head = ReadHead(c, f.rank);
    if (!head.ok()) {
      found.push_back({f.file, head.error().message});
      continue;
    }
    auto file = disk_->Open(path);
    if (!file.ok()) {
      found.push_back({f.file, file.error().message});
      continue;
    }
    const ShardHead& h = head.value();
    std::uint32_t whole = h.head_crc;
    bool readable = true;
    for (std::size_t i = 0; i < h.file.tensors.size() && readable; ++i) {
      const SafetensorsEntry& e = h.file.tensors[i];
      std::uint32_t crc = 0;
      for (std::uint64_t at = e.begin; at < e.end;) {
        const std::uint64_t n = std::min<std::uint64_t>(buffer.size(), e.end - at);
        if (auto ok = file.value()->Read(h.file.head_bytes + at, buffer.data(), n); !ok.ok()) {
          found.push_back({f.file, ok.error().message});
          readable = false;
          break;
        }
        crc = Crc32cExtend(crc, buffer.data(), n);
        whole = Crc32cExtend(whole, buffer.data(), n);
        at += n;
        done += n;
        if (progress) progress(done);
      }
      if (readable && crc != h.tensor_crcs[i]) {
        found.push_back({f.file, fmt::format("tensor {} ({} bytes at {} of the file) has CRC "
                                             "{:08x}, not {:08x}",
                                             e.name, e.bytes(), h.file.head_bytes + e.begin, crc,
                                             h.tensor_crcs[i])});
        readable = false;
      }
    }
    if (readable && whole != f.crc32c) {
      found.push_back({f.file, fmt::format("the file has CRC {:08x}, the manifest says {:08x}",
                                           whole, f.crc32c)});
    }
  }
  return found;
}

Outcome FileTier::Mark(const std::string& name, const char* mark, const std::string& why) {
  const std::string text = why.substr(0, 4095) + "\n";
  return Replace(Folder(name), mark,
                 [&](DiskWriter* out) { return out->Write(text.data(), text.size()); });
}

Outcome FileTier::MarkDamaged(const std::string& name, const std::string& why) {
  return Mark(name, kDamagedMark, why);
}

Outcome FileTier::MarkGivenUp(const std::string& name, const std::string& why) {
  return Mark(name, kGivenUpMark, why);
}

Outcome FileTier::MarkVerified(const std::string& name) {
  auto names = disk_->List(Folder(name));
  if (!names.ok()) return names.error();
  const auto has = [&names](const char* file) {
    return std::find(names.value().begin(), names.value().end(), file) != names.value().end();
  };
  if (!has(kManifest)) {
    return Error{ErrorCode::kNotFound, fmt::format("{} is no checkpoint", Folder(name))};
  }
  return has(kVerifiedMark) ? Outcome(Done{}) : Mark(name, kVerifiedMark, "");
}

// The manifest goes first: whoever is stopped in the middle leaves an incomplete folder.
Outcome FileTier::RemoveFolder(const std::string& name) {
  auto names = disk_->List(Folder(name));
  if (!names.ok()) return names.error();
  std::stable_partition(names.value().begin(), names.value().end(),
                        [](const std::string& n) { return n == kManifest; });
  for (const std::string& file : names.value()) {
    auto ok = disk_->Remove(Folder(name) + "/" + file);
    if (!ok.ok() && ok.error().code != ErrorCode::kNotFound) return ok;
    KillPoint("persist.file_pruned");
    if (file == kManifest) {
      if (ok = disk_->SyncDirectory(Folder(name)); !ok.ok()) return ok;
    }
  }
  KillPoint("persist.folder_emptied");
  auto ok = disk_->Remove(Folder(name));
  if (!ok.ok() && ok.error().code != ErrorCode::kNotFound) return ok;
  return Done{};
}

Outcome FileTier::Prune(std::size_t keep, std::vector<std::string>* removed, bool dry_run) {
  removed->clear();
  auto list = List();
  if (!list.ok()) return list.error();
  const FileCheckpoint* good = nullptr;  // newest whose heads can be read
  std::size_t complete = 0;
  bool verified = false;  // the newest such stays
  for (const FileCheckpoint& c : list.value()) {
    bool whole = c.state == FileCheckpoint::State::kComplete;
    if (good == nullptr) {
      // Nothing goes for the sake of one that cannot be restored from.
      for (const ManifestFile& f : c.manifest.ranks) whole = whole && ReadHead(c, f.rank).ok();
      if (whole) good = &c;
      if (whole) ++complete;
      verified = verified || (whole && c.verified);
      continue;
    }
    if (whole && c.verified && !std::exchange(verified, true)) continue;
    if (whole && ++complete <= std::max<std::size_t>(keep, 1)) continue;
    if (!dry_run) {
      if (auto ok = RemoveFolder(c.name); !ok.ok()) return ok;
    }
    removed->push_back(c.name);
  }
  if (!removed->empty() && !dry_run) return disk_->SyncDirectory(directory_);
  return Done{};
}

}  // namespace everstep::checkpoint
