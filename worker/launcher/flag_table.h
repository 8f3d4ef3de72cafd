// Every flag of everstep-run, one row each: how it is spelt, where its default comes from, what it
// means. ParseFlags, --help and docs/reference/flags.md all read this one table
// (launcher_flags_test compares the page).
#pragma once

#include <cstdint>
#include <string_view>

namespace everstep::launcher {

enum class FlagId : std::uint8_t {
  kNnodes,
  kNprocPerNode,
  kRdzvBackend,
  kRdzvEndpoint,
  kRdzvId,
  kRdzvConf,
  kStandalone,
  kMaxRestarts,
  kMonitorInterval,
  kStartMethod,
  kEventLogHandler,
  kRole,
  kModule,
  kNoPython,
  kRunPath,
  kLogDir,
  kRedirects,
  kTee,
  kLocalRanksFilter,
  kDuplicateStdoutFilters,
  kDuplicateStderrFilters,
  kNodeRank,
  kMasterAddr,
  kMasterPort,
  kLocalAddr,
  kLogsSpecs,
  kNumaBinding,
  kSignalsToHandle,
  kShutdownTimeout,
  kVirtualLocalRank,
  kController,
  kStateDir,
  kName,
  kSpares,
  kNoPreload,
  kCopies,
  kCkptDir,
  kCkptEvery,
  kCkptKeep,
  kDryRun,
  kHelp,
  kVersion
};

struct FlagRow {
  FlagId id;
  std::string_view name;  // "--nproc-per-node"; the '_' spelling is accepted too
  char letter;            // 'r' for -r; 0: none
  bool takes_value;
  std::string_view variable;     // environment default; empty: none
  std::string_view placeholder;  // for --help
  std::string_view help;
  bool torchrun;  // false: our own; must be spelt in full
};

inline constexpr FlagRow kFlagTable[] = {
    {FlagId::kNnodes, "--nnodes", 0, true, "PET_NNODES", "N or MIN:MAX",
     "nodes of the job; 1 by default", true},
    {FlagId::kNprocPerNode, "--nproc-per-node", 0, true, "PET_NPROC_PER_NODE", "N|auto|cpu|gpu|xpu",
     "workers on each node; 1 by default", true},
    {FlagId::kRdzvBackend, "--rdzv-backend", 0, true, "PET_RDZV_BACKEND", "NAME",
     "static or c10d; both mean the same controller here", true},
    {FlagId::kRdzvEndpoint, "--rdzv-endpoint", 0, true, "PET_RDZV_ENDPOINT", "HOST[:PORT]",
     "where the launchers of a job find each other", true},
    {FlagId::kRdzvId, "--rdzv-id", 0, true, "PET_RDZV_ID", "ID",
     "the job's name, equal on all its nodes", true},
    {FlagId::kRdzvConf, "--rdzv-conf", 0, true, "PET_RDZV_CONF", "K=V,...",
     "join_timeout and last_call_timeout (seconds) are used", true},
    {FlagId::kStandalone, "--standalone", 0, false, "PET_STANDALONE", "",
     "one node, its own controller; --rdzv-* are ignored", true},
    {FlagId::kMaxRestarts, "--max-restarts", 0, true, "PET_MAX_RESTARTS", "N",
     "restarts charged to the script; 0 by default", true},
    {FlagId::kMonitorInterval, "--monitor-interval", 0, true, "PET_MONITOR_INTERVAL", "SECONDS",
     "accepted; exits are noticed at once", true},
    {FlagId::kStartMethod, "--start-method", 0, true, "PET_START_METHOD", "spawn|fork|forkserver",
     "accepted; has no effect on scripts", true},
    {FlagId::kEventLogHandler, "--event-log-handler", 0, true, "PET_EVENT_LOG_HANDLER", "NAME",
     "accepted; events are in `everstep events`", true},
    {FlagId::kRole, "--role", 0, true, "PET_ROLE", "NAME", "ROLE_NAME of the workers", true},
    {FlagId::kModule, "--module", 'm', false, "PET_MODULE", "", "run SCRIPT as `python -m`", true},
    {FlagId::kNoPython, "--no-python", 0, false, "PET_NO_PYTHON", "",
     "SCRIPT is a program of its own", true},
    {FlagId::kRunPath, "--run-path", 0, false, "PET_RUN_PATH", "",
     "run SCRIPT with runpy.run_path; wins over --no-python", true},
    {FlagId::kLogDir, "--log-dir", 0, true, "PET_LOG_DIR", "DIR", "where workers' logs go", true},
    {FlagId::kRedirects, "--redirects", 'r', true, "PET_REDIRECTS", "0-3 or R:0-3,...",
     "to files only: 1 stdout, 2 stderr, 3 both", true},
    {FlagId::kTee, "--tee", 't', true, "PET_TEE", "0-3 or R:0-3,...",
     "to files and to the console, with a prefix", true},
    {FlagId::kLocalRanksFilter, "--local-ranks-filter", 0, true, "PET_LOCAL_RANKS_FILTER",
     "R,R,...", "only these local ranks are shown on the console", true},
    {FlagId::kDuplicateStdoutFilters, "--duplicate-stdout-filters", 0, true,
     "PET_DUPLICATE_STDOUT_FILTERS", "TEXT,...", "lines with one of these are copied to a file",
     true},
    {FlagId::kDuplicateStderrFilters, "--duplicate-stderr-filters", 0, true,
     "PET_DUPLICATE_STDERR_FILTERS", "TEXT,...", "the same for stderr", true},
    {FlagId::kNodeRank, "--node-rank", 0, true, "PET_NODE_RANK", "N",
     "this node's number with --rdzv-backend=static", true},
    {FlagId::kMasterAddr, "--master-addr", 0, true, "PET_MASTER_ADDR", "HOST",
     "node 0 with --rdzv-backend=static", true},
    {FlagId::kMasterPort, "--master-port", 0, true, "PET_MASTER_PORT", "PORT",
     "its port; 29500 when more than one node", true},
    {FlagId::kLocalAddr, "--local-addr", 0, true, "PET_LOCAL_ADDR", "HOST",
     "this node's address for the others", true},
    {FlagId::kLogsSpecs, "--logs-specs", 0, true, "", "NAME", "not supported: name none", true},
    {FlagId::kNumaBinding, "--numa-binding", 0, true, "", "node|socket|exclusive|core-complex",
     "bind workers to the CPUs near their GPU", true},
    {FlagId::kSignalsToHandle, "--signals-to-handle", 0, true, "PET_SIGNALS_TO_HANDLE",
     "SIG,SIG,...", "signals that end the run; TERM, INT, HUP, QUIT by default", true},
    {FlagId::kShutdownTimeout, "--shutdown-timeout", 0, true, "PET_SHUTDOWN_TIMEOUT", "SECONDS",
     "between SIGTERM and SIGKILL; 30 by default", true},
    {FlagId::kVirtualLocalRank, "--virtual-local-rank", 0, false, "PET_VIRTUAL_LOCAL_RANK", "",
     "LOCAL_RANK=0 and one visible GPU for each worker", true},
    {FlagId::kController, "--controller", 0, true, "EVERSTEP_CONTROLLER", "HOST:PORT,...",
     "run on the cluster of this controller", false},
    {FlagId::kStateDir, "--state-dir", 0, true, "EVERSTEP_STATE_DIR", "DIR",
     "controller, logs and sockets of this run", false},
    {FlagId::kName, "--name", 0, true, "EVERSTEP_JOB_NAME", "NAME",
     "the job's name; --rdzv-id or the script's name by default", false},
    {FlagId::kSpares, "--spares", 0, true, "EVERSTEP_SPARES", "N",
     "warm nodes kept beyond the maximum; 0 by default", false},
    {FlagId::kNoPreload, "--no-preload", 0, false, "EVERSTEP_NO_PRELOAD", "",
     "start workers cold, without the fork server", false},
    {FlagId::kCopies, "--copies", 0, true, "EVERSTEP_COPIES", "M",
     "nodes whose memory holds each rank's state, its own among them; 2 by default, 1: no peer",
     false},
    {FlagId::kCkptDir, "--ckpt-dir", 0, true, "EVERSTEP_CKPT_DIR", "DIR",
     "checkpoints go there from memory, and come from there when memory is lost", false},
    {FlagId::kCkptEvery, "--ckpt-every", 0, true, "EVERSTEP_CKPT_EVERY", "SECONDS|Nsteps",
     "how often; 600 by default", false},
    {FlagId::kCkptKeep, "--ckpt-keep", 0, true, "EVERSTEP_CKPT_KEEP", "N",
     "newest checkpoints kept there; 3 by default, 0: all", false},
    {FlagId::kDryRun, "--dry-run", 0, false, "", "", "print the job as JSON, start nothing", false},
    {FlagId::kHelp, "--help", 'h', false, "", "", "this text", true},
    {FlagId::kVersion, "--version", 0, false, "", "", "the version", false},
};

}  // namespace everstep::launcher
