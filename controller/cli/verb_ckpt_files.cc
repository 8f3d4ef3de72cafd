// `everstep ckpt list|show|verify|save|prune|export`: the file tier. All but save read the
// directory itself, and need no controller when they are given one.
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "checkpoint/files/file_tier.h"
#include "checkpoint/store/memory_limit.h"
#include "controller/cli/ckpt_where.h"
#include "controller/cli/suggest.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

extern char** environ;  // NOLINT: execvpe wants it

namespace everstep::cli {
namespace {

namespace cp = everstep::checkpoint;
namespace fs = std::filesystem;
using State = cp::FileCheckpoint::State;

Result<std::vector<cp::FileCheckpoint>> Listed(cp::FileTier* tier) {
  auto list = tier->List();
  if (!list.ok()) return FromDisk(list.error());
  return std::move(list.value());
}

}  // namespace

CliError FromDisk(const cp::Error& error, std::string hint) {
  const bool missing = error.code == cp::ErrorCode::kNotFound;
  return {missing ? ExitCode::kNotFound : ExitCode::kFailed,
          missing                                 ? "NOT_FOUND"
          : error.code == cp::ErrorCode::kCorrupt ? "DATA_LOSS"
                                                  : "FAILED",
          error.message, std::move(hint)};
}

// What looks like a path is one; anything else is a job, whose directory the controller knows.
bool LooksLikeDirectory(const std::string& word) {
  std::error_code error;
  return word.find('/') != std::string::npos || word == "." || word == ".." ||
         fs::is_directory(word, error);
}

Result<std::string> DirectoryOf(Context& context, const std::string& word) {
  std::error_code error;
  if (LooksLikeDirectory(word)) {
    if (!fs::is_directory(word, error)) {
      return CliError{ExitCode::kNotFound, "NOT_FOUND", fmt::format("no directory {}", word),
                      "give the --ckpt-dir of a run, or the name of a job"};
    }
    return word;
  }
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::JobStatus> job = FindJob(client.value().get(), word);
  if (!job.ok()) return job.error();
  const std::string& dir = job.value().ckpt_dir();
  if (dir.empty()) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("job \"{}\" has no checkpoint directory", job.value().job()),
                    "a job has one when it is started with everstep run --ckpt-dir DIR"};
  }
  if (!fs::is_directory(dir, error)) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND",
                    fmt::format("the checkpoint directory {} of job \"{}\" is not here", dir,
                                job.value().job()),
                    "nothing was written yet, or this machine does not mount it: ask on a node"};
  }
  return dir;
}

Result<cp::FileCheckpoint> ChosenCheckpoint(cp::FileTier* tier, std::int64_t wanted) {
  auto list = Listed(tier);
  if (!list.ok()) return list.error();
  std::string steps;
  for (cp::FileCheckpoint& c : list.value()) {
    if (wanted < 0 ? c.state == State::kComplete : c.step == wanted) return std::move(c);
    if (steps.size() < 60) steps += fmt::format("{}{}", steps.empty() ? "" : ", ", c.step);
  }
  return CliError{ExitCode::kNotFound, "NOT_FOUND",
                  wanted < 0
                      ? fmt::format("no complete checkpoint in {}", tier->directory())
                      : fmt::format("no checkpoint of step {} in {}", wanted, tier->directory()),
                  steps.empty() ? "" : "steps there: " + steps};
}

namespace {

// The one that --step names, else the newest complete one.
Result<cp::FileCheckpoint> Chosen(Context& context, cp::FileTier* tier) {
  if (!context.args.Has("step")) return ChosenCheckpoint(tier, -1);
  const auto step = ParseInteger("--step", context.args.Get("step"), 0, INT64_MAX);
  if (!step.ok()) return step.error();
  return ChosenCheckpoint(tier, step.value());
}

std::string Saved(std::uint64_t ns) {
  if (ns == 0) return "";
  const auto seconds = static_cast<std::time_t>(ns / 1'000'000'000);
  std::tm parts{};
  if (gmtime_r(&seconds, &parts) == nullptr) return "";
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", parts.tm_year + 1900, parts.tm_mon + 1,
                     parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec);
}

// Files are written of committed steps alone.
std::string TrustOf(const cp::FileCheckpoint& c) {
  if (c.state != State::kComplete) return "";
  return c.verified ? "verified" : "committed";
}

std::string FileJson(const cp::ManifestFile& f) {
  return fmt::format(
      "{{\"rank\":{},\"file\":{},\"bytes\":{},\"crc32c\":\"{:08x}\",\"crcRoot\":\"{:08x}\"}}",
      f.rank, JsonQuote(f.file), f.bytes, f.crc32c, f.crc_root);
}

std::string CheckpointJson(const cp::FileCheckpoint& c, bool files) {
  std::string text = fmt::format(
      "{{\"checkpoint\":{},\"step\":{},\"generation\":{},\"state\":\"{}\",\"why\":{},\"job\":{},"
      "\"worldSize\":{},\"replicatedLayout\":{},\"shares\":{},\"bytes\":{},\"saved\":{},\"trust\":"
      "\"{}\"",
      JsonQuote(c.name), c.step, c.generation, cp::FileStateName(c.state), JsonQuote(c.why),
      JsonQuote(c.manifest.job), c.manifest.world_size, c.manifest.replicated_layout,
      c.manifest.shares, c.manifest.bytes(), JsonQuote(Saved(c.manifest.sealed_ns)), TrustOf(c));
  if (files) {
    text += ",\"files\":[";
    for (const cp::ManifestFile& f : c.manifest.ranks) {
      text += (f.rank == 0 ? "" : ",") + FileJson(f);
    }
    text += "]";
  }
  return text + "}";
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

}  // namespace

VerbResult RunCkptList(Context& context) {
  auto dir = DirectoryOf(context, context.args.words[0]);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  auto list = Listed(&tier);
  if (!list.ok()) return list.error();
  if (context.output == Output::kTable) {
    Table table({{"STEP", Align::kRight},
                 {"GENERATION", Align::kRight},
                 {"STATE"},
                 {"TRUST"},
                 {"RANKS", Align::kRight},
                 {"SIZE", Align::kRight},
                 {"SAVED"},
                 {"JOB"},
                 {"WHY"}});
    for (const cp::FileCheckpoint& c : list.value()) {
      const bool known = !c.manifest.ranks.empty();
      table.Add({std::to_string(c.step), std::to_string(c.generation), cp::FileStateName(c.state),
                 TrustOf(c), known ? std::to_string(c.manifest.world_size) : "",
                 known ? cp::HumanBytes(c.manifest.bytes()) : "", Saved(c.manifest.sealed_ns),
                 c.manifest.job, OneLine(c.why)});
    }
    if (table.rows() == 0) context.Remark(fmt::format("no checkpoint in {}", dir.value()));
    context.Out(table.Format(context.render.headers, context.render.max_width));
    return ExitCode::kOk;
  }
  std::vector<std::string> items;
  std::string lines;
  for (const cp::FileCheckpoint& c : list.value()) {
    items.push_back(CheckpointJson(c, false));
    lines += (context.output == Output::kName ? c.name : items.back()) + "\n";
  }
  context.Out(context.output == Output::kJson ? JsonItems("CheckpointList", items) : lines);
  return ExitCode::kOk;
}

VerbResult RunCkptShow(Context& context) {
  if (const std::string& word = context.args.words[0];
      !context.args.Has("step") && !LooksLikeDirectory(word)) {
    Result<std::unique_ptr<AdminClient>> client = context.Client();
    if (!client.ok()) return client.error();
    return ShowJobCheckpoints(context, client.value().get(), word);
  }
  auto dir = DirectoryOf(context, context.args.words[0]);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  auto chosen = Chosen(context, &tier);
  if (!chosen.ok()) return chosen.error();
  const cp::FileCheckpoint& c = chosen.value();
  if (context.output == Output::kName) {
    context.Out(c.name + "\n");
    return ExitCode::kOk;
  }
  if (context.json()) {
    context.Out(CheckpointJson(c, true) + "\n");
    return ExitCode::kOk;
  }
  const bool known = !c.manifest.ranks.empty();
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"checkpoint", tier.directory() + "/" + c.name},
      {"state", cp::FileStateName(c.state)},
      {"trust", OrDash(TrustOf(c))},
      {"why", OrDash(OneLine(c.why))},
      {"job", OrDash(c.manifest.job)},
      {"step", std::to_string(c.step)},
      {"generation", std::to_string(c.generation)},
      {"ranks", known ? std::to_string(c.manifest.world_size) : "-"},
      {"layout", !known                         ? "-"
                 : c.manifest.replicated_layout ? "replicated: any rank's file serves any rank"
                 : c.manifest.shares            ? "shares: a rank's file is its share of one state"
                                                : "each rank its own"},
      {"size", known ? cp::HumanBytes(c.manifest.bytes()) : "-"},
      {"captured", OrDash(Saved(c.manifest.captured_ns))},
      {"saved", OrDash(Saved(c.manifest.sealed_ns))},
      {"writer", OrDash(c.manifest.writer)}};
  context.Out(FormatPairs(pairs));
  Table table({{"RANK", Align::kRight}, {"FILE"}, {"BYTES", Align::kRight}, {"CRC32C"}});
  for (const cp::ManifestFile& f : c.manifest.ranks) {
    table.Add(
        {std::to_string(f.rank), f.file, std::to_string(f.bytes), fmt::format("{:08x}", f.crc32c)});
  }
  if (known) context.Out("\n" + table.Format(context.render.headers, context.render.max_width));
  return ExitCode::kOk;
}

VerbResult RunCkptVerify(Context& context) {
  auto dir = DirectoryOf(context, context.args.words[0]);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  std::vector<cp::FileCheckpoint> which;
  if (context.args.Has("step")) {
    auto chosen = Chosen(context, &tier);
    if (!chosen.ok()) return chosen.error();
    which.push_back(std::move(chosen.value()));
  } else {
    auto list = Listed(&tier);
    if (!list.ok()) return list.error();
    which = std::move(list.value());
  }
  std::vector<std::string> items;
  Table table({{"STEP", Align::kRight}, {"RESULT"}, {"FILE"}, {"WHAT"}});
  std::size_t damaged = 0, whole = 0;
  for (const cp::FileCheckpoint& c : which) {
    if (c.state == State::kIncomplete) continue;  // never was one
    const std::vector<cp::Damage> found = tier.Verify(c);
    ++(found.empty() ? whole : damaged);
    if (found.empty()) table.Add({std::to_string(c.step), "whole", "", ""});
    std::string list;
    for (const cp::Damage& d : found) {
      table.Add({std::to_string(c.step), "damaged", d.file, OneLine(d.what)});
      list += fmt::format("{}{{\"file\":{},\"what\":{}}}", list.empty() ? "" : ",",
                          JsonQuote(d.file), JsonQuote(d.what));
    }
    items.push_back(fmt::format("{{\"checkpoint\":{},\"step\":{},\"whole\":{},\"damage\":[{}]}}",
                                JsonQuote(c.name), c.step, found.empty(), list));
  }
  if (context.output == Output::kJson) {
    context.Out(JsonItems("CheckpointVerification", items));
  } else if (context.output == Output::kJsonl) {
    for (const std::string& item : items) context.Out(item + "\n");
  } else {
    context.Out(table.Format(context.render.headers, 0));
  }
  if (damaged > 0) {
    return CliError{ExitCode::kFailed, "DATA_LOSS",
                    fmt::format("{} of {} in {} {} damaged", damaged,
                                Plural(static_cast<std::int64_t>(damaged + whole), "checkpoint"),
                                dir.value(), damaged == 1 ? "is" : "are"),
                    whole > 0 ? "a restore takes the newest that is whole" : "none is left whole"};
  }
  if (whole == 0) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND",
                    fmt::format("no complete checkpoint in {}", dir.value()), ""};
  }
  return ExitCode::kOk;
}

VerbResult RunCkptPrune(Context& context) {
  const auto keep = ParseInteger("--keep", context.args.Get("keep", "3"), 1, 1'000'000);
  if (!keep.ok()) return keep.error();
  auto dir = DirectoryOf(context, context.args.words[0]);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  std::vector<std::string> removed;
  const bool dry = context.args.Has("dry-run");
  // What stays must be worth it: the newest is read to its last byte, and marked when it is
  // damaged.
  auto list = Listed(&tier);
  if (!list.ok()) return list.error();
  for (const cp::FileCheckpoint& c : list.value()) {
    if (dry || c.state != State::kComplete) continue;
    const std::vector<cp::Damage> found = tier.Verify(c);
    if (found.empty()) break;
    context.Remark(fmt::format("{} is damaged: {}: {}", c.name, found.front().file,
                               OneLine(found.front().what)));
    if (auto marked = tier.MarkDamaged(c.name, found.front().what); !marked.ok()) {
      return FromDisk(marked.error());
    }
  }
  auto ok = tier.Prune(static_cast<std::size_t>(keep.value()), &removed, dry);
  if (!ok.ok()) return FromDisk(ok.error());
  if (context.output == Output::kJson) {
    std::vector<std::string> items;
    items.reserve(removed.size());
    for (const std::string& name : removed) items.push_back(JsonQuote(name));
    context.Out(JsonItems("PrunedCheckpoints", items));
  } else {
    for (const std::string& name : removed) context.Out(name + "\n");
  }
  context.Remark(fmt::format("{} {}",
                             Plural(static_cast<std::int64_t>(removed.size()), "checkpoint"),
                             dry ? "would be removed" : "removed"));
  return ExitCode::kOk;
}

VerbResult RunCkptSave(Context& context) {
  // A call waits until the bytes are on the disk.
  if (!context.args.Has("timeout")) context.timeout = std::chrono::minutes(10);
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  Result<v1::JobStatus> saved = client.value()->SaveCheckpoint(job.value().job());
  if (!saved.ok()) return saved.error();
  const v1::JobStatus& now = saved.value();
  if (context.json()) {
    context.Out(fmt::format("{{\"job\":{},\"step\":{},\"directory\":{}}}\n", JsonQuote(now.job()),
                            now.persisted_step(), JsonQuote(now.ckpt_dir())));
  } else {
    context.Out(fmt::format("step {} of job {} is in {}\n", now.persisted_step(), now.job(),
                            now.ckpt_dir()));
  }
  return ExitCode::kOk;
}

VerbResult RunCkptExport(Context& context) {
  auto dir = DirectoryOf(context, context.args.words[0]);
  if (!dir.ok()) return dir.error();
  cp::FileTier tier(cp::PosixDisk(), dir.value());
  auto chosen = Chosen(context, &tier);
  if (!chosen.ok()) return chosen.error();
  const cp::FileCheckpoint& c = chosen.value();
  if (const auto found = tier.Verify(c); !found.empty()) {
    return CliError{
        ExitCode::kFailed, "DATA_LOSS",
        fmt::format("checkpoint {}: {}: {}", c.name, found.front().file,
                    OneLine(found.front().what)),
        "export another one with --step; everstep ckpt verify names those that are whole"};
  }
  const std::string out = context.args.words[1];
  const auto variable = context.env.find("EVERSTEP_PYTHON");
  const std::string python =
      context.args.Get("python", variable == context.env.end() ? "python3" : variable->second);
  std::vector<std::string> line = {python,
                                   "-m",
                                   "everstep.export",
                                   tier.directory() + "/" + c.name,
                                   out,
                                   "--format",
                                   context.args.Get("format", "safetensors")};
  std::vector<char*> argv;
  argv.reserve(line.size() + 1);
  for (std::string& word : line) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    execvpe(argv[0], argv.data(), environ);
    _exit(errno == ENOENT ? 127 : 126);
  }
  int status = 0;
  while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  const int code = child > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  if (code == 126 || code == 127) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND",
                    fmt::format("no interpreter {} can be started", python),
                    "give one that has torch and everstep with --python"};
  }
  if (code != 0) {
    return CliError{
        ExitCode::kFailed, "FAILED",
        fmt::format("{} -m everstep.export ended with exit code {}", python, code),
        "its own words stand above; --python names an interpreter with torch and everstep"};
  }
  if (context.json()) {
    context.Out(fmt::format("{{\"checkpoint\":{},\"step\":{},\"format\":{},\"directory\":{}}}\n",
                            JsonQuote(c.name), c.step, JsonQuote(line.back()), JsonQuote(out)));
  } else {
    context.Out(fmt::format("step {} is in {} ({})\n", c.step, out, line.back()));
  }
  return ExitCode::kOk;
}

}  // namespace everstep::cli
