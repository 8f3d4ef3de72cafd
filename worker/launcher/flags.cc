#include "worker/launcher/flags.h"

#include <algorithm>
#include <optional>

#include <fmt/format.h>

#include "worker/launcher/flag_table.h"
#include "worker/launcher/flag_values.h"

namespace everstep::launcher {
namespace {

constexpr std::string_view kSeeHelp = "; `everstep-run --help` lists every flag";

std::string Dashed(std::string_view name) {
  std::string text(name);
  // Only after the leading dashes: "--nproc_per_node" -> "--nproc-per-node".
  std::replace(text.begin(), text.end(), '_', '-');
  return text;
}

std::string Error(std::string_view text) {
  return fmt::format("everstep-run: {}", text);
}

// What one word of the command line is, by argparse's rules.
struct Word {
  const FlagRow* flag = nullptr;        // nullptr and error empty: not a flag
  std::optional<std::string> attached;  // what stood after '=' or directly behind the letter
  std::string error;
};

bool LooksLikeNegativeNumber(std::string_view word) {
  bool dot = false;
  if (word.size() < 2 || word[0] != '-') return false;
  for (const char c : word.substr(1)) {
    if (c == '.' && !dot) {
      dot = true;
    } else if (c < '0' || c > '9') {
      return false;
    }
  }
  return word.back() != '.';
}

Word ClassifyLong(const std::string& word) {
  Word result;
  const std::size_t equals = word.find('=');
  const std::string typed = word.substr(0, equals);
  const std::string name = Dashed(typed);
  if (equals != std::string::npos) result.attached = word.substr(equals + 1);
  std::vector<const FlagRow*> candidates;
  for (const FlagRow& row : kFlagTable) {
    if (row.name == name) {
      result.flag = &row;
      return result;
    }
    if (row.torchrun && row.name.substr(0, name.size()) == name) candidates.push_back(&row);
  }
  if (candidates.size() == 1) {
    result.flag = candidates.front();
  } else if (candidates.size() > 1) {
    std::vector<std::string_view> names;
    names.reserve(candidates.size());
    for (const FlagRow* row : candidates) names.push_back(row->name);
    result.error =
        Error(fmt::format("{} could mean {}; write it in full", typed, fmt::join(names, " or ")));
  } else if (word.find(' ') == std::string::npos) {
    result.error = Error(fmt::format("unknown flag {}{} (flags of the script go after the script)",
                                     typed, kSeeHelp));
  }
  return result;
}

Word ClassifyShort(const std::string& word) {
  Word result;
  for (const FlagRow& row : kFlagTable) {
    if (row.letter != 0 && row.letter == word[1]) result.flag = &row;
  }
  if (result.flag != nullptr) {
    if (word.size() > 2) result.attached = word.substr(word[2] == '=' ? 3 : 2);
    return result;
  }
  if (!LooksLikeNegativeNumber(word) && word.find(' ') == std::string::npos) {
    result.error = Error(
        fmt::format("unknown flag {}{} (flags of the script go after the script)", word, kSeeHelp));
  }
  return result;
}

Word Classify(const std::string& word) {
  if (word.size() < 2 || word[0] != '-') return {};
  return word[1] == '-' ? ClassifyLong(word) : ClassifyShort(word);
}

class Parser {
 public:
  Parser(const std::vector<std::string>& arguments, const Environment& environment)
      : arguments_(arguments), environment_(environment) {}

  ParseResult Run() {
    for (const FlagRow& row : kFlagTable) {
      if (!ApplyVariable(row)) return Failed();
    }
    if (!ReadWords()) return result_.kind == ParseKind::kError ? Failed() : std::move(result_);
    if (!Settle()) return Failed();
    std::vector<std::string>& warnings = result_.warnings;
    for (auto it = warnings.begin(); it != warnings.end();) {  // each is said once
      it = std::find(warnings.begin(), it, *it) != it ? warnings.erase(it) : it + 1;
    }
    result_.kind = ParseKind::kRun;
    return std::move(result_);
  }

 private:
  ParseResult Failed() {
    ParseResult failed;
    failed.error = error_;
    return failed;
  }

  bool Fail(std::string text) {
    error_ = std::move(text);
    return false;
  }

  bool ApplyVariable(const FlagRow& row) {
    if (row.variable.empty()) return true;
    const auto found = environment_.find(std::string(row.variable));
    if (found == environment_.end()) return true;
    if (row.takes_value) return Apply(row, found->second, row.variable);
    std::int64_t on = 0;
    if (!ReadInteger(found->second, 0, 1, &on).empty()) {
      return Fail(Error(fmt::format("{}={}: must be 0 or 1; correct or unset the variable",
                                    row.variable, found->second)));
    }
    return on == 0 || Apply(row, "", row.variable);
  }

  // False: an error, or --help or --version (result_.kind says so).
  bool ReadWords() {
    std::size_t i = 0;
    bool dashes_seen = false;
    for (; i < arguments_.size(); ++i) {
      const std::string& word = arguments_[i];
      if (word == "--") {
        dashes_seen = true;
        ++i;
        break;
      }
      Word read = Classify(word);
      if (!read.error.empty()) return Fail(read.error);
      if (read.flag == nullptr) break;
      while (!read.flag->takes_value && read.attached && word[1] != '-') {
        // -mr3: a switch, then another letter.
        if (!Apply(*read.flag, "", read.flag->name)) return false;
        read = Classify("-" + *read.attached);
        if (!read.error.empty()) return Fail(read.error);
        if (read.flag == nullptr)
          return Fail(Error(fmt::format("{} is not a flag{}", word, kSeeHelp)));
      }
      if (!read.flag->takes_value) {
        if (read.attached) {
          return Fail(Error(
              fmt::format("{} takes no value; leave out '={}'", read.flag->name, *read.attached)));
        }
        if (!Apply(*read.flag, "", read.flag->name)) return false;
        continue;
      }
      if (!read.attached) {
        const bool more = i + 1 < arguments_.size() && IsValue(arguments_[i + 1]);
        if (!more) {
          return Fail(Error(fmt::format("{} needs a value: {} {}", read.flag->name, read.flag->name,
                                        read.flag->placeholder)));
        }
        read.attached = arguments_[++i];
      }
      if (!Apply(*read.flag, *read.attached, read.flag->name)) return false;
    }
    if (i >= arguments_.size()) {
      return Fail(Error(
          "no training script was given; write `everstep-run [flags] SCRIPT [script's flags]`"));
    }
    result_.flags.script = arguments_[i++];
    // argparse drops one "--", before the script or directly behind it, so do we.
    if (!dashes_seen && i < arguments_.size() && arguments_[i] == "--") ++i;
    result_.flags.script_args.assign(arguments_.begin() + static_cast<std::ptrdiff_t>(i),
                                     arguments_.end());
    return true;
  }

  static bool IsValue(const std::string& word) {
    if (word == "--") return false;
    const Word read = Classify(word);
    return read.flag == nullptr && read.error.empty();
  }

  // `source` is the flag or the variable, for the error.
  bool Apply(const FlagRow& row, const std::string& value, std::string_view source) {
    std::string wrong = Store(row.id, value);
    if (result_.kind != ParseKind::kError) return false;
    if (wrong.empty()) return true;
    return Fail(Error(fmt::format("{}={}: {}", source, value, wrong)));
  }

  std::string Store(FlagId id, const std::string& value) {
    LaunchFlags& f = result_.flags;
    std::int64_t number = 0;
    std::string wrong;
    switch (id) {
      case FlagId::kNnodes: return ReadNodes(value, &f.min_nodes, &f.max_nodes);
      case FlagId::kNprocPerNode: return ReadWorkerCount(value, &f.workers);
      case FlagId::kRdzvBackend:
        if (value != "static" && value != "c10d") {
          return "only static and c10d are understood; the controller does what etcd does "
                 "elsewhere, "
                 "so use c10d";
        }
        f.rdzv_backend = value;
        return {};
      case FlagId::kRdzvEndpoint: f.rdzv_endpoint = value; return {};
      case FlagId::kRdzvId:
        if (value.empty()) return "must not be empty";
        f.rdzv_id = value;
        return {};
      case FlagId::kRdzvConf: return ReadConfig(value, &f.rdzv_conf);
      case FlagId::kStandalone: f.standalone = true; return {};
      case FlagId::kMaxRestarts:
        wrong = ReadInteger(value, 0, kMaxRestartsLimit, &number);
        f.max_restarts = static_cast<std::int32_t>(number);
        f.max_restarts_given = true;
        return wrong;
      case FlagId::kMonitorInterval:
        result_.warnings.emplace_back(
            "--monitor-interval has no effect: exits are noticed when they happen");
        return ReadSeconds(value, &f.monitor_interval_seconds);
      case FlagId::kStartMethod:
        return OneOf(value, {"spawn", "fork", "forkserver"}, &f.start_method);
      case FlagId::kEventLogHandler: f.event_log_handler = value; return {};
      case FlagId::kRole: f.role = value; return {};
      case FlagId::kModule: module_ = true; return {};
      case FlagId::kNoPython: no_python_ = true; return {};
      case FlagId::kRunPath: run_path_ = true; return {};
      case FlagId::kLogDir: f.log_dir = value; return {};
      case FlagId::kRedirects: return ReadStreams(value, &f.redirects);
      case FlagId::kTee: return ReadStreams(value, &f.tee);
      case FlagId::kLocalRanksFilter: return ReadRanks(value, &f.local_ranks_filter);
      case FlagId::kDuplicateStdoutFilters:
        f.duplicate_stdout_filters = ReadFilters(value);
        return {};
      case FlagId::kDuplicateStderrFilters:
        f.duplicate_stderr_filters = ReadFilters(value);
        return {};
      case FlagId::kNodeRank:
        wrong = ReadInteger(value, 0, kMaxNodes - 1, &number);
        f.node_rank = static_cast<std::uint32_t>(number);
        return wrong;
      case FlagId::kMasterAddr:
        if (value.empty()) return "must not be empty";
        f.master_addr = value;
        return {};
      case FlagId::kMasterPort:
        wrong = ReadInteger(value, 0, 65535, &number);
        f.master_port = static_cast<std::uint16_t>(number);
        return wrong;
      case FlagId::kLocalAddr: f.local_addr = value; return {};
      case FlagId::kLogsSpecs:
        return "plug-ins for logs are not supported; leave the flag out and use --log-dir, --tee "
               "and "
               "--redirects";
      case FlagId::kNumaBinding:
        return OneOf(value, {"node", "socket", "exclusive", "core-complex"}, &f.numa_binding);
      case FlagId::kSignalsToHandle: return ReadSignals(value, &f.signals_to_handle);
      case FlagId::kShutdownTimeout:
        wrong = ReadInteger(value, 0, 86400, &number);
        f.shutdown_timeout_seconds = static_cast<std::uint32_t>(number);
        shutdown_timeout_given_ = true;
        return wrong;
      case FlagId::kVirtualLocalRank: f.virtual_local_rank = true; return {};
      case FlagId::kController: f.controller = value; return {};
      case FlagId::kStateDir: f.state_dir = value; return {};
      case FlagId::kName: return ReadJobName(value, &f.name);
      case FlagId::kSpares:
        wrong = ReadInteger(value, 0, kMaxNodes, &number);
        f.spares = static_cast<std::uint32_t>(number);
        return wrong;
      case FlagId::kNoPreload: f.preload = false; return {};
      case FlagId::kCopies:
        wrong = ReadInteger(value, 1, kMaxNodes, &number);
        f.copies = static_cast<std::uint32_t>(number);
        return wrong;
      case FlagId::kRedundancy: return ReadRedundancy(value, &redundancy_);
      case FlagId::kVerifyAfter:
        wrong = ReadInteger(value, 0, 1'000'000'000, &number);
        f.verify_after = static_cast<std::uint32_t>(number);
        return wrong;
      case FlagId::kCkptDir:
        f.ckpt_dir = value;
        return value.empty() ? "must name a directory" : "";
      case FlagId::kCkptEvery:
        return ReadInterval(value, &f.ckpt_every_seconds, &f.ckpt_every_steps);
      case FlagId::kCkptKeep:
        wrong = ReadInteger(value, 0, 1'000'000, &number);
        f.ckpt_keep = static_cast<std::uint32_t>(number);
        return wrong;
      case FlagId::kDryRun: f.dry_run = true; return {};
      case FlagId::kHelp: result_.kind = ParseKind::kHelp; return {};
      case FlagId::kVersion: result_.kind = ParseKind::kVersion; return {};
    }
    return "is not known";
  }

  static std::string OneOf(const std::string& value, const std::vector<std::string_view>& choices,
                           std::string* out) {
    if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
      return fmt::format("must be one of {}", fmt::join(choices, ", "));
    }
    *out = value;
    return {};
  }

  // --redundancy, against --copies and --nnodes. False: it failed.
  bool SettleRedundancy() {
    LaunchFlags& f = result_.flags;
    if (!redundancy_) return true;
    const checkpoint::Redundancy& policy = *redundancy_;
    const std::string text = checkpoint::PrintRedundancy(policy);
    if (f.copies != 0 && (!policy.copies() || f.copies != policy.parity + 1)) {
      return Fail(
          Error(fmt::format("--copies={} and --redundancy={} contradict each other; leave "
                            "one of the two out",
                            f.copies, text)));
    }
    if (!policy.copies() && policy.shards + policy.parity > f.max_nodes) {
      return Fail(Error(
          fmt::format("--redundancy={} takes {} nodes and --nnodes asks for up to {}; {} fits",
                      text, policy.shards + policy.parity, f.max_nodes,
                      checkpoint::PrintRedundancy(checkpoint::OnNodes(policy, f.max_nodes)))));
    }
    f.copies = policy.parity + 1;
    f.parity_states = policy.copies() ? 0 : policy.shards;
    return true;
  }

  // What only the whole line tells.
  bool Settle() {
    LaunchFlags& f = result_.flags;
    if (f.script.empty()) return Fail(Error("the training script's name is empty; name a file"));
    if (run_path_) {
      f.script_kind = ScriptKind::kRunPath;
    } else if (no_python_ && module_) {
      return Fail(Error(
          "--no-python and --module contradict each other (a module needs python); leave one out"));
    } else if (no_python_) {
      f.script_kind = ScriptKind::kProgram;
    } else if (module_) {
      f.script_kind = ScriptKind::kModule;
    }
    if (!shutdown_timeout_given_) {
      const auto found = environment_.find("TORCH_ELASTIC_SHUTDOWN_TIMEOUT");
      std::int64_t number = 0;
      if (found != environment_.end()) {
        const std::string wrong = ReadInteger(found->second, 0, 86400, &number);
        if (!wrong.empty()) {
          return Fail(Error(fmt::format(
              "TORCH_ELASTIC_SHUTDOWN_TIMEOUT={}: {}; correct or unset it", found->second, wrong)));
        }
        f.shutdown_timeout_seconds = static_cast<std::uint32_t>(number);
      }
    }
    for (const char* key : {"join_timeout", "last_call_timeout"}) {
      const auto found = f.rdzv_conf.find(key);
      double seconds = 0;
      if (found == f.rdzv_conf.end()) continue;
      const std::string wrong = ReadSeconds(found->second, &seconds);
      if (!wrong.empty()) {
        return Fail(Error(fmt::format("--rdzv-conf {}={}: {}", key, found->second, wrong)));
      }
    }
    if (f.standalone && f.max_nodes > 1) {
      return Fail(
          Error(fmt::format("--standalone is one node and --nnodes asks for up to {}; leave one "
                            "of the two out",
                            f.max_nodes)));
    }
    if (f.rdzv_backend == "static" && f.max_nodes > 1 && f.node_rank >= f.max_nodes) {
      return Fail(Error(fmt::format("--node-rank={}: --nnodes={} makes {} the highest", f.node_rank,
                                    f.max_nodes, f.max_nodes - 1)));
    }
    if (!SettleRedundancy()) return false;
    Warn();
    return true;
  }

  void Warn() {
    const LaunchFlags& f = result_.flags;
    if (f.node_rank != 0 && (f.rdzv_backend != "static" || f.standalone)) {
      result_.warnings.emplace_back(
          "--node-rank has no effect without --rdzv-backend=static: nodes are numbered as they "
          "join");
    }
    if (f.spares != 0 && f.standalone) {
      result_.warnings.emplace_back("--spares has no effect with --standalone: there is one node");
    }
    if (f.event_log_handler != "null") {
      result_.warnings.push_back(
          fmt::format("--event-log-handler={} has no effect: `everstep events` shows the events",
                      f.event_log_handler));
    }
  }

  const std::vector<std::string>& arguments_;
  const Environment& environment_;
  ParseResult result_;
  std::string error_;
  bool module_ = false;
  bool no_python_ = false;
  bool run_path_ = false;
  bool shutdown_timeout_given_ = false;
  std::optional<checkpoint::Redundancy> redundancy_;
};

}  // namespace

std::uint8_t StreamSpec::For(std::int32_t local_rank) const {
  if (by_local_rank.empty()) return all;
  const auto found = by_local_rank.find(local_rank);
  return found == by_local_rank.end() ? std::uint8_t{0} : found->second;
}

ParseResult ParseFlags(const std::vector<std::string>& arguments, const Environment& environment) {
  return Parser(arguments, environment).Run();
}

std::string HelpText() {
  std::string text =
      "usage: everstep-run [flags] SCRIPT [script's flags]\n\n"
      "Runs a PyTorch training script, unmodified, so that it survives its machines.\n"
      "Takes torchrun's flags; '_' may stand for '-'. Environment defaults are in brackets.\n";
  for (const bool torchrun : {true, false}) {
    text += torchrun ? "\ntorchrun's flags:\n" : "\neverstep's own:\n";
    for (const FlagRow& row : kFlagTable) {
      if (row.torchrun != torchrun) continue;
      std::string left(row.name);
      if (row.letter != 0) left = fmt::format("-{}, {}", row.letter, row.name);
      if (row.takes_value) left += fmt::format(" {}", row.placeholder);
      text += fmt::format("  {}\n      {}", left, row.help);
      if (!row.variable.empty()) text += fmt::format(" [{}]", row.variable);
      text += '\n';
    }
  }
  return text;
}

Resolved ResolveWorkers(const WorkerCount& wish, const MachineFacts& machine) {
  const auto missing = [](std::string_view what) {
    return Resolved{0,
                    fmt::format("everstep-run: --nproc-per-node={} but this machine shows no {}; "
                                "check the driver, or give a number",
                                what, what)};
  };
  switch (wish.kind) {
    case WorkerCountKind::kNumber: return {wish.number, {}};
    case WorkerCountKind::kCpu: return {machine.cpus, {}};
    case WorkerCountKind::kGpu:
      if (machine.gpus == 0) return missing("gpu");
      return {machine.gpus, {}};
    case WorkerCountKind::kXpu:
      if (machine.xpus == 0) return missing("xpu");
      return {machine.xpus, {}};
    case WorkerCountKind::kAuto: break;
  }
  if (machine.gpus > 0) return {machine.gpus, {}};
  if (machine.xpus > 0) return {machine.xpus, {}};
  return {machine.cpus, {}};
}

}  // namespace everstep::launcher
