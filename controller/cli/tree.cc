#include "controller/cli/tree.h"

#include <iterator>
#include <utility>
#include <vector>

namespace everstep::cli {
namespace {

using Count = WordSpec::Count;

OptionSpec Watch(std::string help) {
  return {"watch", 'w', "", std::move(help)};
}

WordSpec Job() {
  return {"JOB", "name of the job, or a unique beginning of it", Names::kJobs};
}
WordSpec Node() {
  return {"NODE", "name of the node", Names::kNodes};
}
WordSpec Rank() {
  return {"RANK", "global rank of the worker in its job"};
}

CommandSpec JobCommands() {
  return {
      .name = "job",
      .summary = "Training jobs: list, show, wait, cancel, ledger, plan",
      .children = {
          {.name = "list",
           .verb = Verb::kJobList,
           .summary = "List jobs",
           .description = "One line a job, ended ones too while the controller remembers them.",
           .options = {Watch("show it again every second until Ctrl-C")},
           .examples = {{"everstep job list", ""}, {"everstep job list -o name", "names only"}},
           .aliases = {"ls"}},
          {.name = "show",
           .verb = Verb::kJobShow,
           .summary = "Everything about one job: ranks, faults, why it is where it is",
           .description =
               "Each fault has the reason code that `everstep events` and the summary of the run "
               "have, how long it took to detect and to recover, and the steps it cost.",
           .words = {Job()},
           .options = {Watch("show it again every second until Ctrl-C")},
           .examples = {{"everstep job show gpt", ""},
                        {"everstep job show gpt -o json", "for scripts"}},
           .aliases = {"get"}},
          {.name = "wait",
           .verb = Verb::kJobWait,
           .summary = "Wait until a job has ended, runs, or has made a step",
           .description =
               "Ends with 0 when the condition holds. Without --for that is: the job has "
               "SUCCEEDED; a job that FAILED or was CANCELLED is 1. 7: not within --timeout. "
               "It goes on waiting while the controller restarts.",
           .words = {Job()},
           .options = {{"for", 0, "CONDITION",
                        "a state (RUNNING, WAITING, ...), \"ended\", \"step=N\" or "
                        "\"committed=N\"",
                        "SUCCEEDED"},
                       {"timeout", 0, "DURATION", "give up after this long; 0: never", "0"}},
           .examples = {{"everstep job wait gpt --timeout 2h", ""},
                        {"everstep job wait gpt --for step=1000", ""}}},
          {.name = "cancel",
           .verb = Verb::kJobCancel,
           .summary = "End a job",
           .description =
               "Its workers get SIGTERM, after the job's grace SIGKILL. With --forget the job is "
               "then taken from the list, and what is left of it in the memory of its nodes is "
               "given up; of a job that has ended, at once. Its events and its logs stay.",
           .words = {Job()},
           .options = {{"reason", 0, "TEXT", "why; stands in its events", "cancelled by operator"},
                       {"wait", 0, "", "return when no process of it is left"},
                       {"forget", 0, "", "give up its record and what it has in memory, too"}},
           .examples = {{"everstep job cancel gpt --reason \"wrong data set\"", ""},
                        {"everstep job cancel gpt --forget", "a failed one: frees its memory"}}},
          {.name = "ledger",
           .verb = Verb::kJobLedger,
           .summary = "Which microbatches of which steps went into the model, and by whom",
           .description =
               "Of a pipeline job: runs of steps that were divided in the same way, and what a "
               "later generation took back. With --verify the controller's records are checked: 0, "
               "each (step, microbatch) is in exactly once; 1, it is not, and what is wrong.",
           .words = {Job()},
           .options = {{"verify", 0, "", "prove or refute that each is in exactly once"}},
           .examples = {{"everstep job ledger gpt", ""},
                        {"everstep job ledger gpt --verify", "for scripts: by its exit code"}}},
          {.name = "plan",
           .verb = Verb::kJobPlan,
           .summary = "What would become of a pipeline job's plan if nodes were lost or came",
           .description =
               "Asks the planner what the job's ranks would ask it after the change, from the "
               "profile and the plan that they told: pipelines, who receives which layers, bytes, "
               "the time of a step before and after. Nothing is changed. Without an option: the "
               "plan there is.",
           .words = {Job()},
           .options = {{"lose", 0, "NODE[,NODE...]", "these nodes", "", {}, Names::kNodes},
                       {"join", 0, "N", "so many new nodes", "0"}},
           .examples = {{"everstep job plan gpt --lose n7,n12", ""},
                        {"everstep job plan gpt --join 2 -o json", ""}}}}};
}

CommandSpec NodeCommands() {
  return {
      .name = "node",
      .summary = "Machines: list, show, drain, undrain",
      .children = {
          {.name = "list",
           .verb = Verb::kNodeList,
           .summary = "List nodes",
           .options = {Watch("show it again every second until Ctrl-C")},
           .examples = {{"everstep node list", ""}},
           .aliases = {"ls"}},
          {.name = "show",
           .verb = Verb::kNodeShow,
           .summary = "Everything about one node",
           .words = {Node()},
           .examples = {{"everstep node show n2", ""}},
           .aliases = {"get"}},
          {.name = "drain",
           .verb = Verb::kNodeDrain,
           .summary = "Move jobs away from nodes and keep them away",
           .description =
               "The jobs switch to other nodes without a fault; nobody's restart budget is "
               "charged. Refused when a job would drop below its minimum, unless --allow-pause.",
           .words = {{"NODE", "names of the nodes", Names::kNodes, Count::kMany}},
           .options = {{"reason", 0, "TEXT", "why; required, shown by node list"},
                       {"deadline", 0, "DURATION", "the node goes away after this long; 0: unknown",
                        "0"},
                       {"allow-pause", 0, "", "a job may wait for capacity meanwhile"}},
           .examples = {{"everstep node drain n2 --reason \"memory errors\"", ""},
                        {"everstep node drain n2 n3 --reason rack --deadline 90s", ""}}},
          {.name = "undrain",
           .verb = Verb::kNodeUndrain,
           .summary = "Give drained nodes back to the jobs",
           .words = {{"NODE", "names of the nodes", Names::kNodes, Count::kMany}},
           .examples = {{"everstep node undrain n2", ""}}}}};
}

CommandSpec CkptCommands() {
  return {
      .name = "ckpt",
      .summary = "Checkpoints: files, where copies lie, what they survive, what they cost",
      .children = {
          {.name = "placement",
           .verb = Verb::kCkptPlacement,
           .summary = "On which nodes each rank's state lies, and what that survives",
           .description =
               "The probability that a complete step is left when nodes, or whole failure domains "
               "(labels of the agents: --label rack=r7), are lost at random. It is exact unless a "
               "range is shown: then losses were sampled, and it is the range of 95 % confidence. "
               "Below, what other policies would cost on these nodes and survive: memory kept for "
               "others (two slots), bytes sent and processor time of parity a step, bytes and time "
               "to "
               "bring back one lost node, how many nodes whichever may be lost, how many domains "
               "are "
               "fatal alone, P(k): the probability to survive k. A job's policy is chosen with "
               "everstep run --redundancy 'rs(4+2)', or replicate(M), or xor(K+1).",
           .words = {Job()},
           .options = {{"nodes", 0, "K", "show losses of up to K nodes", "8"},
                       Watch("show it again every second until Ctrl-C")},
           .examples =
               {{"everstep ckpt placement gpt", ""},
                {"everstep ckpt placement gpt -o json | jq .fatal",
                 "domains whose loss alone loses state"},
                {"everstep ckpt placement gpt -o json | jq '.policies[] | {policy, memory}'",
                 "what policies cost, in states of a node"}}},
          {.name = "survive",
           .verb = Verb::kCkptSurvive,
           .summary = "What would become of a job if nodes were lost now",
           .description =
               "Nothing is touched: the controller runs its own recovery on a copy of what it "
               "knows. Says whether a complete step is left, which one, from where each rank would "
               "get it, what has to be moved and how long that takes. Exit 1: nothing is left.",
           .words = {Job()},
           .options = {{"lose", 0, "NODE[,NODE...]", "these nodes", "", {}, Names::kNodes},
                       {"domain", 0, "LEVEL=NAME[,...]",
                        "all nodes of these failure domains: zone=a, evict=night"},
                       {"nodes", 0, "K", "any K nodes: the probability, and the worst K"}},
           .examples = {{"everstep ckpt survive gpt --lose n3,n7", ""},
                        {"everstep ckpt survive gpt --domain zone=a", ""},
                        {"everstep ckpt survive gpt --nodes 2", ""}}},
          CkptTrafficCommand()}};
}

CommandSpec DrillCommands(const std::string& name, const std::string& summary,
                          const std::string& description, const std::vector<Verb>& verbs,
                          const OptionSpec* option, const OptionSpec* worker_option) {
  const auto options = [&](bool worker) {
    std::vector<OptionSpec> list;
    const OptionSpec* one = worker ? worker_option : option;
    if (one != nullptr) list.push_back(*one);
    return list;
  };
  const std::string line = "everstep cluster " + name;
  return {
      .name = name,
      .summary = summary,
      .description = description,
      .children = {{.name = "worker",
                    .verb = verbs[0],
                    .summary = "A worker of a job, by rank; through the controller, on any cluster",
                    .words = {Job(), Rank()},
                    .options = options(true),
                    .examples = {{line + " worker gpt 1", ""}}},
                   {.name = "node",
                    .verb = verbs[1],
                    .summary = "All processes of a node: agent, keeper, workers",
                    .words = {Node()},
                    .options = options(false),
                    .examples = {{line + " node n1", ""}}},
                   {.name = "agent",
                    .verb = verbs[2],
                    .summary = "The agent of a node; its keeper and workers run on",
                    .words = {Node()},
                    .options = options(false),
                    .examples = {{line + " agent n1", ""}}},
                   {.name = "keeper",
                    .verb = verbs[3],
                    .summary = "The keeper of a node; its workers die with it",
                    .words = {Node()},
                    .options = name == "kill" ? std::vector<OptionSpec>{} : options(false),
                    .examples = {{line + " keeper n1", ""}}},
                   {.name = "controller",
                    .verb = verbs[4],
                    .summary = "The controller; jobs go on without it",
                    .options = options(false),
                    .examples = {{line + " controller", ""}}}}};
}

CommandSpec ClusterCommands() {
  const OptionSpec down_for{"for", 0, "DURATION",
                            "keep it down this long; \"ever\": until `everstep cluster start`",
                            "an agent, keeper and controller come back at once, a node after 5s"};
  const OptionSpec pause_for{"for", 0, "DURATION", "wait this long, then resume it",
                             "until `cluster resume`"};
  const OptionSpec signal{"signal", 0, "SIGNAL", "name or number", "KILL"};
  return {
      .name = "cluster",
      .summary = "Clusters on this machine: up, down, list, and drills on them",
      .description =
          "A local cluster is a controller and some nodes, each with its own processes, on "
          "loopback: for trying things out, for tests and for drills.",
      .children = {
          {.name = "up",
           .verb = Verb::kClusterUp,
           .summary = "Start a controller and nodes on this machine",
           .description =
               "Returns when every node is ALIVE. The cluster outlives the shell; a supervisor "
               "process starts a dead controller or agent again. `everstep cluster down` ends it "
               "and leaves nothing behind.",
           .options = {{"nodes", 'n', "N", "nodes to start, 1 to 256", "4"},
                       {"spares", 0, "N", "that many more, for jobs with --spares", "0"},
                       {"name", 0, "NAME", "name of the cluster: letters, digits, - and _",
                        "local"},
                       {"state-dir",
                        0,
                        "DIR",
                        "where its files go; must be new or empty",
                        "below $XDG_STATE_HOME, ~/.local/state",
                        {},
                        Names::kFiles},
                       {"listen", 0, "HOST:PORT", "the controller's address", "127.0.0.1:0"},
                       {"slots", 0, "N", "workers that each node may run; 0: no limit", "0"},
                       {"timeout", 0, "DURATION", "for all of it", "30s"}},
           .examples = {{"everstep cluster up --nodes 4", ""},
                        {"everstep --cluster local run --nnodes 2 --nproc-per-node 2 train.py",
                         "a job on two of its nodes"}}},
          {.name = "down",
           .verb = Verb::kClusterDown,
           .summary = "End a cluster: its processes, sockets and files",
           .description =
               "Works for a cluster whose supervisor is gone, too. Jobs on it end. Without NAME: "
               "the only cluster there is.",
           .words = {{"NAME", "name of the cluster", Names::kClusters, Count::kOptional}},
           .options = {{"keep-files", 0, "", "leave its state directory with the logs"},
                       {"all", 0, "", "every cluster of this user"},
                       {"timeout", 0, "DURATION", "for all of it", "30s"}},
           .examples = {{"everstep cluster down", ""}, {"everstep cluster down --all", ""}}},
          {.name = "list",
           .verb = Verb::kClusterList,
           .summary = "List the clusters of this user on this machine",
           .description =
               "RUNNING: its supervisor lives. STALE: it does not; `everstep cluster down NAME` "
               "cleans it up.",
           .examples = {{"everstep cluster list", ""},
                        {"everstep cluster list -o json", "controller addresses for scripts"}},
           .aliases = {"ls"}},
          DrillCommands("kill", "SIGKILL a part of a cluster, as a drill",
                        "For local clusters; `kill worker` reaches workers of any cluster.",
                        {Verb::kKillWorker, Verb::kKillNode, Verb::kKillAgent, Verb::kKillKeeper,
                         Verb::kKillController},
                        &down_for, &signal),
          DrillCommands("pause", "SIGSTOP a part of a cluster, as a drill",
                        "For local clusters; `pause worker` reaches workers of any cluster.",
                        {Verb::kPauseWorker, Verb::kPauseNode, Verb::kPauseAgent,
                         Verb::kPauseKeeper, Verb::kPauseController},
                        &pause_for, &pause_for),
          DrillCommands("resume", "SIGCONT what was paused", "",
                        {Verb::kResumeWorker, Verb::kResumeNode, Verb::kResumeAgent,
                         Verb::kResumeKeeper, Verb::kResumeController},
                        nullptr, nullptr),
          {.name = "start",
           .verb = Verb::kClusterStart,
           .summary = "Start a killed node or controller now",
           .words = {{"PART", "name of a node, or \"controller\"", Names::kNodes}},
           .examples = {{"everstep cluster start n1", ""}}},
          {.name = "supervise",
           .verb = Verb::kClusterSupervise,
           .summary = "The process behind `cluster up`",
           .words = {{"DIR", "state directory", Names::kFiles}},
           .hidden = true}}};
}

// The file tier's verbs first: they are what people ask for.
CommandSpec AllCkptCommands() {
  CommandSpec all = CkptCommands();
  std::vector<CommandSpec> files = CkptFileCommands();
  all.children.insert(all.children.begin(), std::make_move_iterator(files.begin()),
                      std::make_move_iterator(files.end()));
  std::vector<CommandSpec> trust = CkptTrustCommands();
  all.children.insert(all.children.end(), std::make_move_iterator(trust.begin()),
                      std::make_move_iterator(trust.end()));
  return all;
}

std::vector<CommandSpec> Commands() {
  return {
      {.name = "status",
       .verb = Verb::kStatus,
       .summary = "Controller, nodes and jobs on one screen",
       .options = {Watch("show it again every second until Ctrl-C")},
       .examples = {{"everstep status", ""}, {"everstep status -w", ""}}},
      JobCommands(),
      NodeCommands(),
      AllCkptCommands(),
      PlanCommands(),
      SimulateCommand(),
      {.name = "events",
       .verb = Verb::kEvents,
       .summary = "What happened and why: one line an event, with its reason code",
       .description = "The codes are listed in docs/reference/events.md.",
       .options = {Watch("go on with new events, across restarts of the controller"),
                   {"job", 0, "JOB", "only events of this job", "", {}, Names::kJobs},
                   {"node", 0, "NODE", "only events of this node", "", {}, Names::kNodes},
                   {"since", 0, "DURATION", "only events this young"},
                   {"type", 0, "TYPE", "only events of this type, for example node_lost"},
                   {"reason", 0, "CODE", "only events with this reason code"},
                   {"limit", 0, "N", "the newest N of them; 0: all that are kept", "0"},
                   {"after", 0, "SEQUENCE", "only those after this sequence number"}},
       .examples = {{"everstep events -w", ""},
                    {"everstep events --job gpt --since 10m", ""},
                    {"everstep events -o jsonl | jq .reason", "one JSON object a line"}}},
      {.name = "logs",
       .verb = Verb::kLogs,
       .summary = "What the workers of a job print",
       .description =
           "Through the controller from the nodes, of the running generation. Lines of more than "
           "one rank have the rank in front.",
       .words = {Job()},
       .options = {{"rank", 'r', "RANK", "only this global rank", "all"},
                   {"follow", 'f', "", "go on with new lines until Ctrl-C or the job's end"},
                   {"tail", 'n', "N", "begin with the last N lines; -1: from the beginning", "-1"}},
       .examples = {{"everstep logs gpt --rank 0 -f", ""}, {"everstep logs gpt --tail 20", ""}}},
      {.name = "run",
       .verb = Verb::kRun,
       .summary = "Run a training script, as torchrun does (everstep-run)",
       .description =
           "Everything after `run` belongs to everstep-run: `everstep run --help`. A --controller "
           "or --cluster before `run` is passed on as EVERSTEP_CONTROLLER.",
       .examples = {{"everstep run --standalone --nproc-per-node 2 train.py --lr 0.1", ""},
                    {"everstep --cluster local run --nnodes 2 train.py", "on a local cluster"}},
       .passes_on = true},
      ClusterCommands(),
      {.name = "version",
       .verb = Verb::kVersion,
       .summary = "Print the version of this program",
       .description = "`everstep status` shows the controller's.",
       .examples = {{"everstep version", ""}}},
      {.name = "completion",
       .verb = Verb::kCompletion,
       .summary = "Print a completion script for a shell",
       .words =
           {{"SHELL", "bash, zsh or fish", Names::kNone, Count::kOne, {"bash", "zsh", "fish"}}},
       .examples = {{"source <(everstep completion bash)", "for this shell"},
                    {"everstep completion fish > ~/.config/fish/completions/everstep.fish", ""}}},
      {.name = "help",
       .verb = Verb::kHelp,
       .summary = "Help on a command or a topic",
       .words = {{"COMMAND", "a command, or a topic", Names::kTopics, Count::kAny}},
       .examples = {{"everstep help job wait", ""}, {"everstep help exit-codes", ""}}},
      {.name = "docs",
       .verb = Verb::kDocs,
       .summary = "The reference page as Markdown",
       .hidden = true},
      {.name = "__complete",
       .verb = Verb::kComplete,
       .summary = "Candidates for the last word, one a line",
       .hidden = true,
       .passes_on = true}};
}

}  // namespace

const ProgramSpec& Program() {
  static const ProgramSpec program{
      .root = {.name = "everstep",
               .summary = "keeps distributed training jobs stepping while machines fail",
               .children = Commands()},
      .globals = {{"controller", 0, "HOST:PORT[,...]", "address of the controller",
                   "$EVERSTEP_CONTROLLER, else the only local cluster"},
                  {"cluster",
                   0,
                   "NAME",
                   "a local cluster, by name",
                   "$EVERSTEP_CLUSTER",
                   {},
                   Names::kClusters},
                  {"timeout", 0, "DURATION", "limit of each call", "10s"},
                  {"output",
                   'o',
                   "FORMAT",
                   "table, json, jsonl or name",
                   "table",
                   {"table", "json", "jsonl", "name"}},
                  {"no-headers", 0, "", "tables without their first line"},
                  {"quiet", 'q', "", "no remarks on stderr, only errors"}}};
  return program;
}

const std::vector<Topic>& Topics() {
  static const std::vector<Topic> topics{
      {"exit-codes", "What the exit code of a command means",
       "  0    it worked\n"
       "  1    it was understood and did not work; the job waited for has failed\n"
       "  2    the command line is wrong\n"
       "  3    no such job, node, cluster\n"
       "  4    not permitted\n"
       "  5    no controller answers; worth another try\n"
       "  6    a precondition does not hold (a name is taken, a drain would pause a job, ...)\n"
       "  7    waited as long as --timeout said\n"
       "  130  Ctrl-C\n"
       "\n"
       "`everstep run` has those of everstep-run: docs/reference/exit-codes.md.\n"},
      {"output", "Tables, JSON, and errors in JSON",
       "-o table   for people; on a terminal lines are cut at its width\n"
       "-o json    one object: apiVersion, kind, and the fields of proto/admin.proto\n"
       "-o jsonl   one object a line: lists and events\n"
       "-o name    names only, one a line\n"
       "\n"
       "Data go to stdout, errors and remarks to stderr. With json and jsonl an error is an "
       "object\n"
       "on stdout: {\"error\":{\"code\":...,\"message\":...,\"hint\":...}}.\n"
       "64-bit integers are strings in JSON, as protobuf's JSON form has them.\n"},
      {"environment", "Environment variables",
       "EVERSTEP_CONTROLLER  as --controller\n"
       "EVERSTEP_CLUSTER     as --cluster\n"
       "EVERSTEP_TRACES      folder of recordings for `everstep simulate`: norm/, oobleck/, "
       "profiles/\n"
       "XDG_STATE_HOME       local clusters are below XDG_STATE_HOME/everstep; default\n"
       "                     ~/.local/state\n"}};
  return topics;
}

}  // namespace everstep::cli
