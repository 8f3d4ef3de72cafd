// `everstep cluster up|down|list|start` and the hidden supervisor.
#include <unistd.h>

#include <csignal>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/local_cluster.h"
#include "controller/cli/suggest.h"
#include "controller/cli/supervisor.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"
#include "proto/base/clock.h"
#include "proto/base/endpoint.h"

namespace everstep::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kPoll{10};

volatile std::sig_atomic_t interrupted = 0;

// Ctrl-C while a cluster comes up takes it down again instead of leaving half of one.
class InterruptGuard {
 public:
  InterruptGuard() {
    interrupted = 0;
    struct sigaction action = {};
    action.sa_handler = [](int) { interrupted = 1; };
    ::sigaction(SIGINT, &action, &old_int_);
    ::sigaction(SIGTERM, &action, &old_term_);
  }
  ~InterruptGuard() {
    ::sigaction(SIGINT, &old_int_, nullptr);
    ::sigaction(SIGTERM, &old_term_, nullptr);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  struct sigaction old_int_ = {};
  struct sigaction old_term_ = {};
};

std::string StateOf(const ClusterInfo& cluster) {
  if (!cluster.running) return "STALE";
  return ::access((cluster.state_dir + "/ready").c_str(), F_OK) == 0 ? "RUNNING" : "STARTING";
}

std::string ClusterJson(const ClusterInfo& cluster) {
  std::vector<std::string> nodes;
  for (const std::string& node : cluster.plan.nodes) nodes.push_back(JsonQuote(node));
  return fmt::format(
      "{{\"name\":{},\"state\":\"{}\",\"controller\":{},\"http\":{},\"nodes\":[{}],"
      "\"state_dir\":{},\"supervisor_pid\":{},\"created\":{}}}\n",
      JsonQuote(cluster.name), StateOf(cluster), JsonQuote(cluster.controller),
      JsonQuote(cluster.http), fmt::join(nodes, ","), JsonQuote(cluster.state_dir),
      cluster.supervisor.pid, JsonQuote(cluster.plan.created));
}

std::string WithKind(const std::string& kind, const std::string& object) {
  return fmt::format("{{\"apiVersion\":\"everstep/v1\",\"kind\":\"{}\",{}", kind, object.substr(1));
}

Result<ClusterPlan> PlanFromOptions(const Parsed& args) {
  const Result<std::int64_t> nodes = ParseInteger("--nodes", args.Get("nodes", "4"), 1, 256);
  if (!nodes.ok()) return nodes.error();
  const Result<std::int64_t> spares =
      ParseInteger("--spares", args.Get("spares", "0"), 0, 256 - nodes.value());
  if (!spares.ok()) return spares.error();
  const Result<std::int64_t> slots = ParseInteger("--slots", args.Get("slots", "0"), 0, 1024);
  if (!slots.ok()) return slots.error();
  ClusterPlan plan;
  plan.name = args.Get("name", "local");
  plan.created = FormatTimestamp(RealClock().Now());
  plan.programs = OwnFolder();
  plan.listen = args.Get("listen", "127.0.0.1:0");
  plan.slots = static_cast<unsigned>(slots.value());
  for (std::int64_t n = 0; n < nodes.value() + spares.value(); ++n) {
    plan.nodes.push_back(fmt::format("n{}", n));
  }
  const std::size_t colon = plan.listen.rfind(':');
  if (colon == std::string::npos || colon == 0 ||
      !ParseInteger("", plan.listen.substr(colon + 1), 0, 65535).ok()) {
    return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                    fmt::format("--listen cannot be \"{}\"", plan.listen),
                    "the form is host:port, for example 127.0.0.1:7700; port 0: any free one"};
  }
  return plan;
}

// Names of nodes that are not there yet, as a person reads them.
std::string Missing(const std::vector<std::string>& wanted, const v1::ClusterStatus& status) {
  std::vector<std::string> missing;
  for (const std::string& name : wanted) {
    bool alive = false;
    for (const v1::NodeStatus& node : status.nodes()) {
      alive |= node.node() == name && node.state() == "ALIVE";
    }
    if (!alive) missing.push_back(name);
  }
  return fmt::format("{}", fmt::join(missing, ", "));
}

// Polls until every node is ALIVE.
Outcome AwaitNodes(const std::string& state_dir, const ClusterPlan& plan, milliseconds limit) {
  const auto deadline = steady_clock::now() + limit;
  std::unique_ptr<AdminClient> client;
  std::string waiting = "the controller's address";
  while (steady_clock::now() < deadline && interrupted == 0) {
    const ClusterInfo info = ReadCluster(plan.name, state_dir);
    if (const std::string failure = ReadSmallFile(state_dir + "/failure"); !failure.empty()) {
      return CliError{ExitCode::kFailed, "FAILED",
                      fmt::format("cluster {} did not start: {}", plan.name,
                                  failure.substr(0, failure.find_last_not_of('\n') + 1)),
                      ""};
    }
    if (info.supervisor.pid != 0 && !info.running) {
      return CliError{ExitCode::kFailed, "FAILED",
                      fmt::format("the supervisor of cluster {} has ended: {}", plan.name,
                                  LastLines(state_dir + "/supervisor.log", 2)),
                      ""};
    }
    if (!info.controller.empty()) {
      if (client == nullptr || client->controller() != info.controller) {
        AdminClient::Options options;
        options.controller = info.controller;
        options.timeout = milliseconds(1'000);
        options.retry = milliseconds(0);
        client = std::make_unique<AdminClient>(std::move(options));
      }
      const Result<v1::ClusterStatus> status = client->GetStatus();
      const std::string missing = status.ok() ? Missing(plan.nodes, status.value()) : "";
      if (status.ok() && missing.empty()) return Done{};
      waiting = status.ok() ? "nodes " + missing : "an answer of the controller";
    }
    std::this_thread::sleep_for(kPoll);
  }
  if (interrupted != 0) {
    return CliError{ExitCode::kInterrupted, "CANCELLED",
                    fmt::format("interrupted; cluster {} is taken down again", plan.name), ""};
  }
  return CliError{ExitCode::kTimeout, "DEADLINE_EXCEEDED",
                  fmt::format("cluster {} was not up within {}: it waits for {}; {}", plan.name,
                              HumanSeconds(static_cast<double>(limit.count()) / 1000.0), waiting,
                              LastLines(state_dir + "/supervisor.log", 1)),
                  "give it longer with --timeout, or start fewer nodes with --nodes"};
}

void Tell(Context& context, const ClusterInfo& cluster, const TakenDown& down) {
  if (down.files_left) {
    context.Remark(fmt::format("left in {}: files that are not the cluster's", cluster.state_dir));
  }
}

constexpr milliseconds kJobsEndLimit{3'000};

// So that whoever follows a job is told that it ended, and why. Best effort: a controller that does
// not answer has nothing to say.
std::size_t EndJobs(const ClusterInfo& cluster) {
  if (!cluster.running || cluster.controller.empty()) return 0;
  AdminClient::Options options;
  options.controller = cluster.controller;
  options.timeout = milliseconds(1'000);
  options.retry = milliseconds(0);
  AdminClient client(std::move(options));
  const auto deadline = steady_clock::now() + kJobsEndLimit;
  std::size_t asked = 0;
  for (bool first = true;; first = false) {
    const Result<v1::JobList> jobs = client.ListJobs();
    if (!jobs.ok()) return asked;
    bool running = false;
    for (const v1::JobStatus& job : jobs.value().items()) {
      if (IsTerminal(job)) continue;
      running = true;
      if (!first) continue;
      v1::CancelJobRequest request;
      request.set_job(job.job());
      request.set_reason(fmt::format("cluster {} goes down", cluster.name));
      asked += client.CancelJob(request).ok();
    }
    if (!running || steady_clock::now() >= deadline) return asked;
    std::this_thread::sleep_for(kPoll);
  }
}

VerbResult DownOne(Context& context, const ClusterInfo& cluster, milliseconds limit) {
  const std::string state = StateOf(cluster);
  const bool keep = context.args.Has("keep-files");
  const std::size_t jobs = EndJobs(cluster);
  if (jobs > 0)
    context.Remark(fmt::format("{} ended with it", Plural(static_cast<std::int64_t>(jobs), "job")));
  const TakenDown down = TakeDown(context.registry, cluster, keep, limit);
  Tell(context, cluster, down);
  if (!down.survivors.empty()) {
    return CliError{
        ExitCode::kFailed, "FAILED",
        fmt::format("of cluster {} are left: {}", cluster.name, fmt::join(down.survivors, ", ")),
        fmt::format("try again: everstep cluster down {}", cluster.name)};
  }
  if (context.json()) {
    context.Out(
        WithKind("ClusterDown", fmt::format("{{\"name\":{},\"was\":\"{}\",\"killed\":{}}}\n",
                                            JsonQuote(cluster.name), state, down.killed)));
  } else if (context.output == Output::kName) {
    context.Out(cluster.name + "\n");
  } else {
    context.Out(fmt::format("cluster {} is down{}{}\n", cluster.name,
                            state == "STALE" ? " (it was stale)" : "",
                            keep ? "; its files are in " + cluster.state_dir : ""));
  }
  return ExitCode::kOk;
}

}  // namespace

VerbResult RunClusterUp(Context& context) {
  const auto limit = context.args.Has("timeout") ? context.timeout : milliseconds(30'000);
  Result<ClusterPlan> made = PlanFromOptions(context.args);
  if (!made.ok()) return made.error();
  const ClusterPlan& plan = made.value();
  const std::string dir =
      CleanPath(context.args.Has("state-dir") ? context.args.Get("state-dir")
                                              : context.registry.DefaultStateDir(plan.name));
  const auto began = steady_clock::now();
  const InterruptGuard guard;
  if (Outcome laid = LayOut(context.registry, plan, dir); !laid.ok()) return laid.error();
  Outcome up = AwaitNodes(dir, plan, limit);
  if (up.ok()) up = WriteSmallFile(dir + "/ready", "");
  const ClusterInfo cluster = ReadCluster(plan.name, dir);
  if (!up.ok()) {
    TakeDown(context.registry, cluster, /*keep_files=*/false, milliseconds(10'000));
    return up.error();
  }
  const double took = std::chrono::duration<double>(steady_clock::now() - began).count();
  switch (context.output) {
    case Output::kJson: context.Out(WithKind("Cluster", ClusterJson(cluster))); break;
    case Output::kJsonl: context.Out(ClusterJson(cluster)); break;
    case Output::kName: context.Out(plan.name + "\n"); break;
    default:
      context.Out(fmt::format(
          "cluster {} is up: controller {}, {}, {}\n", plan.name, cluster.controller,
          Plural(static_cast<std::int64_t>(plan.nodes.size()), "node"), HumanSeconds(took)));
      context.Remark(fmt::format("  export EVERSTEP_CONTROLLER={}\n  files and logs: {}",
                                 cluster.controller, dir));
      if (!cluster.http.empty()) {
        context.Remark(fmt::format("  metrics: http://{}/metrics", cluster.http));
      }
      if (!IsLoopback(plan.listen)) {
        context.Remark(
            fmt::format("  {} is no loopback address, and the channel is not encrypted: for "
                        "networks that you trust only",
                        plan.listen));
      }
  }
  return ExitCode::kOk;
}

VerbResult RunClusterDown(Context& context) {
  const auto limit = context.args.Has("timeout") ? context.timeout : milliseconds(30'000);
  std::vector<ClusterInfo> clusters;
  if (context.args.Has("all")) {
    clusters = context.registry.List();
  } else if (!context.args.words.empty() || context.args.Has("cluster")) {
    Result<ClusterInfo> named = context.registry.Find(
        context.args.words.empty() ? context.args.Get("cluster") : context.args.words[0]);
    if (!named.ok()) return named.error();
    clusters.push_back(std::move(named.value()));
  } else {
    clusters = context.registry.List();
    if (clusters.empty()) {
      return CliError{ExitCode::kNotFound, "NOT_FOUND", "there is no local cluster",
                      "everstep cluster up starts one"};
    }
    if (clusters.size() > 1) {
      std::vector<std::string> names;
      names.reserve(clusters.size());
      for (const ClusterInfo& cluster : clusters) names.push_back(cluster.name);
      return CliError{
          ExitCode::kUsage, "INVALID_ARGUMENT",
          fmt::format("there are {} local clusters: {}", names.size(), fmt::join(names, ", ")),
          fmt::format("say which: everstep cluster down {}; or --all", names[0])};
    }
  }
  for (const ClusterInfo& cluster : clusters) {
    const VerbResult down = DownOne(context, cluster, limit);
    if (!down.ok()) return down.error();
  }
  return ExitCode::kOk;
}

VerbResult RunClusterList(Context& context) {
  const std::vector<ClusterInfo> clusters = context.registry.List();
  if (context.output != Output::kTable) {
    std::vector<std::string> items;
    items.reserve(clusters.size());
    for (const ClusterInfo& cluster : clusters) {
      items.push_back(context.output == Output::kName ? cluster.name + "\n" : ClusterJson(cluster));
    }
    context.Out(context.output == Output::kJson ? JsonItems("ClusterList", items)
                                                : fmt::format("{}", fmt::join(items, "")));
    return ExitCode::kOk;
  }
  if (clusters.empty() && context.render.headers) {
    context.Out("No clusters.\n");
    return ExitCode::kOk;
  }
  Table table(
      {{"NAME"}, {"STATE"}, {"CONTROLLER"}, {"NODES", Align::kRight}, {"CREATED"}, {"DIRECTORY"}});
  for (const ClusterInfo& cluster : clusters) {
    table.Add({cluster.name, StateOf(cluster), cluster.controller,
               std::to_string(cluster.plan.nodes.size()), cluster.plan.created, cluster.state_dir});
  }
  context.Out(table.Format(context.render.headers, context.render.max_width));
  for (const ClusterInfo& cluster : clusters) {
    if (cluster.running) continue;
    const std::size_t left = ProcessesOf(cluster.state_dir).size();
    context.Remark(
        fmt::format("cluster {} is stale: its supervisor is gone, {} of its processes "
                    "run\n  hint: everstep cluster down {}",
                    cluster.name, left, cluster.name));
  }
  return ExitCode::kOk;
}

VerbResult RunClusterSupervise(Context& context) {
  return static_cast<ExitCode>(Supervise(context.args.words[0], context.env));
}

VerbResult RunClusterStart(Context& context) {
  Result<ClusterInfo> found = context.Cluster();
  if (!found.ok()) return found.error();
  const ClusterInfo& cluster = found.value();
  const std::string& part = context.args.words[0];
  std::vector<std::string> parts = cluster.plan.nodes;
  parts.push_back("controller");
  if (std::find(parts.begin(), parts.end(), part) == parts.end()) {
    const std::string near = Nearest(part, parts);
    return CliError{ExitCode::kNotFound, "NOT_FOUND",
                    fmt::format("cluster {} has no part \"{}\"", cluster.name, part),
                    near.empty() ? fmt::format("it has: {}", fmt::join(parts, ", "))
                                 : fmt::format("did you mean: {}", near)};
  }
  if (!cluster.running) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("cluster {} is stale: its supervisor is gone", cluster.name),
                    fmt::format("clean it up: everstep cluster down {}", cluster.name)};
  }
  const std::string dir = part == "controller" ? cluster.state_dir + "/controller"
                                               : cluster.state_dir + "/nodes/" + part;
  const std::string program = part == "controller" ? "everstep-controller" : "everstep-agent";
  const auto pid = [&]() -> pid_t {
    for (const ProcessFacts& process : ProcessesOf(dir)) {
      if (process.program == program) return process.id.pid;
    }
    return 0;
  };
  if (const pid_t there = pid(); there != 0) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("{} runs already, pid {}", part, there), ""};
  }
  RemoveHold(dir);
  SendSignal(cluster.supervisor, SIGHUP);
  const auto deadline = steady_clock::now() + context.timeout;
  while (steady_clock::now() < deadline) {
    if (const pid_t there = pid(); there != 0) {
      context.Out(fmt::format("{} is started, pid {}\n", part, there));
      return ExitCode::kOk;
    }
    std::this_thread::sleep_for(kPoll);
  }
  return CliError{ExitCode::kTimeout, "DEADLINE_EXCEEDED",
                  fmt::format("{} did not start: {}", part,
                              LastLines(cluster.state_dir + "/supervisor.log", 1)),
                  fmt::format("its log is in {}", dir)};
}

}  // namespace everstep::cli
