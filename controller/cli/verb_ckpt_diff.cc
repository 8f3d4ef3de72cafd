// `everstep ckpt diff A B`: what changed between two checkpoints of the file tier, by the names and
// checksums in their files' headers; the tensors themselves are not read.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "checkpoint/files/file_tier.h"
#include "checkpoint/store/memory_limit.h"
#include "controller/cli/ckpt_where.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

namespace cp = everstep::checkpoint;

struct Tensor {
  std::string type;  // "F32[4, 8]"
  std::uint64_t bytes = 0;
  std::uint32_t crc = 0;
};

struct Side {
  std::string name;  // directory and checkpoint
  cp::FileCheckpoint checkpoint;
  std::map<std::pair<Rank, std::string>, Tensor> tensors;
  std::map<Rank, std::string> tables;  // everything that is no tensor
};

struct Change {
  const char* what;  // "added", "removed", "changed"
  Rank rank;
  std::string name, was, is;
  std::uint64_t bytes;
};

Result<Side> Read(Context& context, const std::string& word) {
  // WHERE@STEP; a directory's own name may have an @ in it.
  std::string where = word, step;
  if (const std::size_t at = word.rfind('@');
      at != std::string::npos && !std::filesystem::exists(word)) {
    where = word.substr(0, at);
    step = word.substr(at + 1);
  }
  std::int64_t wanted = -1;
  if (!step.empty()) {
    const auto number = ParseInteger("the step of " + word, step, 0, INT64_MAX);
    if (!number.ok()) return number.error();
    wanted = number.value();
  }
  // A checkpoint's own folder.
  std::string folder = where;
  while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
  const std::size_t slash = folder.rfind('/');
  const std::string last = slash == std::string::npos ? folder : folder.substr(slash + 1);
  Step named = kNoStep;
  Generation generation = 0;
  const bool is_folder = cp::ParseCheckpointName(last, &named, &generation);
  Result<std::string> dir =
      is_folder ? Result<std::string>(slash == std::string::npos ? std::string(".")
                                                                 : folder.substr(0, slash))
                : DirectoryOf(context, where);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  Side side;
  if (is_folder) {
    auto looked = tier.Look(last);
    if (!looked.ok()) return FromDisk(looked.error());
    side.checkpoint = std::move(looked.value());
  } else {
    auto chosen = ChosenCheckpoint(&tier, wanted);
    if (!chosen.ok()) return chosen.error();
    side.checkpoint = std::move(chosen.value());
  }
  side.name = dir.value() + "/" + side.checkpoint.name;
  if (side.checkpoint.manifest.ranks.empty()) {
    return CliError{ExitCode::kFailed, "DATA_LOSS",
                    fmt::format("{} is {}: {}", side.name, cp::FileStateName(side.checkpoint.state),
                                side.checkpoint.why),
                    "everstep ckpt list " + dir.value()};
  }
  for (const cp::ManifestFile& file : side.checkpoint.manifest.ranks) {
    auto head = tier.ReadHead(side.checkpoint, file.rank);
    if (!head.ok()) return FromDisk(head.error());
    const std::vector<cp::SafetensorsEntry>& entries = head.value().file.tensors;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      side.tensors[{file.rank, entries[i].name}] = {
          fmt::format("{}[{}]", entries[i].dtype, fmt::join(entries[i].shape, ", ")),
          entries[i].bytes(), head.value().tensor_crcs[i]};
    }
    side.tables[file.rank] = std::move(head.value().table);
    if (side.checkpoint.manifest.replicated_layout) break;  // every rank's file says the same
  }
  return side;
}

std::vector<Change> Compare(const Side& a, const Side& b) {
  std::vector<Change> changes;
  const auto add = [&](const char* what, const auto& key, const std::string& was,
                       const std::string& is, std::uint64_t bytes) {
    changes.push_back({what, key.first, key.second, was, is, bytes});
  };
  auto i = a.tensors.begin();
  auto j = b.tensors.begin();
  while (i != a.tensors.end() || j != b.tensors.end()) {
    if (j == b.tensors.end() || (i != a.tensors.end() && i->first < j->first)) {
      add("removed", i->first, i->second.type, "", i->second.bytes);
      ++i;
    } else if (i == a.tensors.end() || j->first < i->first) {
      add("added", j->first, "", j->second.type, j->second.bytes);
      ++j;
    } else {
      if (i->second.crc != j->second.crc || i->second.type != j->second.type) {
        add("changed", i->first, i->second.type, j->second.type, j->second.bytes);
      }
      ++i;
      ++j;
    }
  }
  for (const auto& [rank, table] : a.tables) {
    const auto other = b.tables.find(rank);
    if (other == b.tables.end() || other->second == table) continue;
    changes.push_back({"changed", rank, "(values that are no tensors)", "", "",
                       static_cast<std::uint64_t>(other->second.size())});
  }
  return changes;
}

}  // namespace

VerbResult RunCkptDiff(Context& context) {
  const Result<Side> a = Read(context, context.args.words[0]);
  if (!a.ok()) return a.error();
  const Result<Side> b = Read(context, context.args.words[1]);
  if (!b.ok()) return b.error();
  const std::vector<Change> changes = Compare(a.value(), b.value());
  const auto count = [&](std::string_view what) {
    return std::count_if(changes.begin(), changes.end(),
                         [what](const Change& c) { return what == c.what; });
  };
  if (context.json()) {
    std::vector<std::string> items;
    items.reserve(changes.size());
    for (const Change& c : changes) {
      items.push_back(fmt::format(
          R"({{"change":"{}","rank":{},"tensor":{},"was":{},"is":{},"bytes":{}}})", c.what, c.rank,
          JsonQuote(c.name), JsonQuote(c.was), JsonQuote(c.is), c.bytes));
    }
    if (context.output == Output::kJson) {
      context.Out(JsonItems("CheckpointDiff", items));
    } else {
      for (const std::string& item : items) context.Out(item + "\n");
    }
  } else if (context.output == Output::kName) {
    for (const Change& c : changes) context.Out(c.name + "\n");
  } else {
    Table table({{"CHANGE"},
                 {"RANK", Align::kRight},
                 {"TENSOR"},
                 {"WAS"},
                 {"IS"},
                 {"SIZE", Align::kRight}});
    for (const Change& c : changes) {
      table.Add({c.what, std::to_string(c.rank), c.name, OrDash(c.was), OrDash(c.is),
                 cp::HumanBytes(c.bytes)});
    }
    if (table.rows() > 0) {
      context.Out(table.Format(context.render.headers, context.render.max_width));
    }
  }
  const Side& from = a.value();
  const Side& to = b.value();
  const std::int32_t was = from.checkpoint.manifest.world_size;
  const std::int32_t is = to.checkpoint.manifest.world_size;
  context.Remark(fmt::format("{} to {}: {} added, {} removed, {} changed of {}{}", from.name,
                             to.name, count("added"), count("removed"), count("changed"),
                             Plural(static_cast<std::int64_t>(from.tensors.size()), "tensor"),
                             was == is ? "" : fmt::format("; {} ranks, then {}", was, is)));
  return changes.empty() ? ExitCode::kOk : ExitCode::kFailed;
}

}  // namespace everstep::cli
