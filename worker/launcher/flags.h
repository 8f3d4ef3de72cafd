// The command line of everstep-run: torchrun's, flag for flag, and our own beside it.
//
// Pure: the command line and the environment come in as values, a LaunchFlags or one sentence of
// error goes out. Nothing is read from the machine (how many CPUs, which host) and nothing is
// printed; that is for the caller. Follows argparse where torchrun's users rely on it:
// `--nproc-per-node` and
// `--nproc_per_node`, `--flag value` and `--flag=value`, unique abbreviations, `-r3`, PET_*
// defaults, and everything after the script belongs to the script.
//
// Thread-safe: no state. Reference: docs/reference/flags.md.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace everstep::launcher {

// Bits as torchrun counts them: 0 none, 1 stdout, 2 stderr, 3 both.
inline constexpr std::uint8_t kStreamOut = 1;
inline constexpr std::uint8_t kStreamErr = 2;

// --redirects and --tee: one value for all local ranks, or a value for each ("0:1,1:2", others 0).
struct StreamSpec {
  std::uint8_t all = 0;
  std::map<std::int32_t, std::uint8_t> by_local_rank;  // not empty: `all` is not used

  std::uint8_t For(std::int32_t local_rank) const;
  friend bool operator==(const StreamSpec&, const StreamSpec&) = default;
};

// --nproc-per-node as written; ResolveWorkers makes a number of it.
enum class WorkerCountKind : std::uint8_t { kNumber, kAuto, kCpu, kGpu, kXpu };
struct WorkerCount {
  WorkerCountKind kind = WorkerCountKind::kNumber;
  std::uint32_t number = 1;
  friend bool operator==(const WorkerCount&, const WorkerCount&) = default;
};

enum class ScriptKind : std::uint8_t {
  kPython,   // python -u SCRIPT ARGS
  kModule,   // python -u -m MODULE ARGS
  kProgram,  // SCRIPT ARGS (--no-python)
  kRunPath,  // runpy.run_path(SCRIPT) (--run-path)
};

// Limits of what a command line may ask for.
inline constexpr std::uint32_t kMaxNodes = 65536;
inline constexpr std::uint32_t kMaxWorkersPerNode = 1024;
inline constexpr std::int32_t kMaxRestartsLimit = 1000000;

struct LaunchFlags {
  // --- torchrun's ---
  std::uint32_t min_nodes = 1;
  std::uint32_t max_nodes = 1;
  WorkerCount workers;
  std::string rdzv_backend = "static";
  std::string rdzv_endpoint;
  std::string rdzv_id = "none";
  std::map<std::string, std::string> rdzv_conf;
  bool standalone = false;
  std::int32_t max_restarts = 0;
  bool max_restarts_given = false;        // by flag or PET_MAX_RESTARTS
  double monitor_interval_seconds = 0.1;  // accepted; exits are events here, nothing polls
  std::string start_method = "spawn";     // accepted; workers are programs, not functions
  std::string event_log_handler = "null";
  std::string role = "default";
  ScriptKind script_kind = ScriptKind::kPython;
  std::string log_dir;  // empty: inside the state directory
  StreamSpec redirects;
  StreamSpec tee;
  std::vector<std::int32_t> local_ranks_filter;  // empty: all
  std::vector<std::string> duplicate_stdout_filters;
  std::vector<std::string> duplicate_stderr_filters;
  std::uint32_t node_rank = 0;
  std::string master_addr = "127.0.0.1";
  std::optional<std::uint16_t> master_port;
  std::string local_addr;
  std::string logs_specs;
  std::string numa_binding;  // empty, node, socket, exclusive, core-complex
  std::vector<std::string> signals_to_handle = {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"};
  std::uint32_t shutdown_timeout_seconds = 30;
  bool virtual_local_rank = false;
  std::string script;
  std::vector<std::string> script_args;

  // --- ours ---
  std::string controller;  // --controller HOST:PORT[,HOST:PORT]: submit to this cluster
  std::string state_dir;   // --state-dir; empty: a directory of this run, see state.h
  std::string name;        // --name; empty: made from rdzv_id or the script
  std::uint32_t spares = 0;
  bool preload = true;                 // --no-preload: workers start cold
  std::uint32_t copies = 0;            // --copies; 0: the controller's default
  std::uint32_t parity_states = 0;     // --redundancy: k, with r = copies - 1; 0: kept by copies
  std::uint32_t verify_after = 0;      // --verify-after; 0: never
  std::string ckpt_dir;                // --ckpt-dir; empty: no file tier
  double ckpt_every_seconds = 600;     // --ckpt-every; 0: by steps
  std::uint64_t ckpt_every_steps = 0;  // --ckpt-every Nsteps
  std::uint32_t ckpt_keep = 3;
  bool dry_run = false;
};

enum class ParseKind : std::uint8_t { kRun, kHelp, kVersion, kError };

struct ParseResult {
  ParseKind kind = ParseKind::kError;
  LaunchFlags flags;                  // kRun only
  std::string error;                  // kError only: one sentence, what next included
  std::vector<std::string> warnings;  // kRun: flags that are accepted and have no effect here
};

using Environment = std::map<std::string, std::string>;

// `arguments` without the program's own name.
ParseResult ParseFlags(const std::vector<std::string>& arguments, const Environment& environment);

// The text of --help.
std::string HelpText();

// How many workers this node runs. gpus and xpus: how many the machine has, 0 when none.
struct MachineFacts {
  std::uint32_t cpus = 1;
  std::uint32_t gpus = 0;
  std::uint32_t xpus = 0;
};
struct Resolved {
  std::uint32_t workers = 0;
  std::string error;  // not empty: the wish cannot be met
};
Resolved ResolveWorkers(const WorkerCount& wish, const MachineFacts& machine);

}  // namespace everstep::launcher
