// `everstep cluster kill|pause|resume worker|node|agent|keeper|controller`: real signals to real
// processes.
#include <algorithm>
#include <csignal>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/suggest.h"
#include "controller/cli/supervisor.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

using std::chrono::milliseconds;

enum class Action { kKill, kPause, kResume };
enum class Target { kWorker, kNode, kAgent, kKeeper, kController };

struct Kind {
  Action action = Action::kKill;
  Target target = Target::kWorker;
};

Kind KindOf(Verb verb) {
  switch (verb) {
    case Verb::kKillWorker: return {Action::kKill, Target::kWorker};
    case Verb::kKillNode: return {Action::kKill, Target::kNode};
    case Verb::kKillAgent: return {Action::kKill, Target::kAgent};
    case Verb::kKillKeeper: return {Action::kKill, Target::kKeeper};
    case Verb::kKillController: return {Action::kKill, Target::kController};
    case Verb::kPauseWorker: return {Action::kPause, Target::kWorker};
    case Verb::kPauseNode: return {Action::kPause, Target::kNode};
    case Verb::kPauseAgent: return {Action::kPause, Target::kAgent};
    case Verb::kPauseKeeper: return {Action::kPause, Target::kKeeper};
    case Verb::kPauseController: return {Action::kPause, Target::kController};
    case Verb::kResumeNode: return {Action::kResume, Target::kNode};
    case Verb::kResumeAgent: return {Action::kResume, Target::kAgent};
    case Verb::kResumeKeeper: return {Action::kResume, Target::kKeeper};
    case Verb::kResumeController: return {Action::kResume, Target::kController};
    default: return {Action::kResume, Target::kWorker};
  }
}

int SignalOf(Action action) {
  return action == Action::kKill ? SIGKILL : action == Action::kPause ? SIGSTOP : SIGCONT;
}

const char* Past(Action action) {
  return action == Action::kKill ? "killed" : action == Action::kPause ? "paused" : "resumed";
}

std::string SignalName(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? fmt::format("SIG{}", name) : fmt::format("signal {}", signal);
}

Result<int> ReadSignal(const std::string& text) {
  std::string name = text;
  for (char& c : name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  if (name.rfind("SIG", 0) == 0) name.erase(0, 3);
  std::vector<std::string> names;
  for (int signal = 1; signal < 32; ++signal) {
    const char* known = ::sigabbrev_np(signal);
    if (known == nullptr) continue;
    if (name == known || name == std::to_string(signal)) return signal;
    names.push_back(known);
  }
  const std::string near = Nearest(name, names);
  return CliError{ExitCode::kUsage, "INVALID_ARGUMENT",
                  fmt::format("--signal cannot be \"{}\"", text),
                  near.empty() ? "a name such as KILL, TERM, SEGV, STOP, or a number from 1 to 31"
                               : fmt::format("did you mean: {}", near)};
}

// How long, as --for says; empty: it does not.
Result<std::optional<Hold>> ReadFor(const Parsed& args, milliseconds* length) {
  if (!args.Has("for")) return std::optional<Hold>();
  const std::string text = args.Get("for");
  if (text == "ever") return std::optional<Hold>(Hold{.ever = true});
  const Result<milliseconds> duration = ParseDuration("--for", text);
  if (!duration.ok()) return duration.error();
  *length = duration.value();
  return std::optional<Hold>(Hold{.until_ms = WallMilliseconds() + duration.value().count()});
}

struct Struck {
  pid_t pid = 0;
  std::string what;  // "agent", "keeper", "worker"
};

void Say(Context& context, Kind kind, int signal, const std::string& subject,
         const std::vector<Struck>& struck, const std::string& after) {
  if (context.json()) {
    std::vector<std::string> items;
    items.reserve(struck.size());
    for (const Struck& one : struck) {
      items.push_back(fmt::format("{{\"pid\":{},\"process\":{}}}", one.pid, JsonQuote(one.what)));
    }
    context.Out(
        fmt::format("{{\"apiVersion\":\"everstep/v1\",\"kind\":\"Drill\",\"action\":\"{}\","
                    "\"subject\":{},\"signal\":{},\"processes\":[{}]}}\n",
                    Past(kind.action), JsonQuote(subject), signal, fmt::join(items, ",")));
    return;
  }
  std::vector<std::string> parts;
  parts.reserve(struck.size());
  for (const Struck& one : struck) parts.push_back(fmt::format("{} {}", one.what, one.pid));
  context.Out(fmt::format("{} {}: {} ({}){}\n", Past(kind.action), subject, fmt::join(parts, ", "),
                          SignalName(signal), after));
}

VerbResult DrillWorker(Context& context, Kind kind) {
  const Result<std::int64_t> rank = ParseInteger("RANK", context.args.words[1], 0, 1'000'000);
  if (!rank.ok()) return rank.error();
  int signal = SignalOf(kind.action);
  if (context.args.Has("signal")) {
    const Result<int> named = ReadSignal(context.args.Get("signal"));
    if (!named.ok()) return named.error();
    signal = named.value();
  }
  milliseconds length{0};
  Result<std::optional<Hold>> held = ReadFor(context.args, &length);
  if (!held.ok()) return held.error();
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  v1::DrillRequest request;
  request.set_job(job.value().job());
  request.set_rank(static_cast<std::int32_t>(rank.value()));
  request.set_signal(signal);
  const Result<v1::DrillReply> reply = client.value()->Drill(request);
  if (!reply.ok()) return reply.error();
  const std::string subject = fmt::format("rank {} of job {} on {}", rank.value(), request.job(),
                                          OrDash(reply.value().node()));
  Say(context, kind, signal, subject, {{reply.value().pid(), "worker"}}, "");
  if (kind.action == Action::kPause && length.count() > 0) {
    std::this_thread::sleep_for(length);
    request.set_signal(SIGCONT);
    const Result<v1::DrillReply> resumed = client.value()->Drill(request);
    if (!resumed.ok()) return resumed.error();
    Say(context, {Action::kResume, kind.target}, SIGCONT, subject,
        {{resumed.value().pid(), "worker"}}, "");
  }
  return ExitCode::kOk;
}

std::string WhatItIs(const ProcessFacts& process) {
  // A keeper that dies is outlived by its guard, which ends the workers and then itself.
  if (process.name == "everstep-guard") return "guard";
  for (const char* part : {"agent", "keeper", "controller"}) {
    if (process.program == std::string("everstep-") + part) return part;
  }
  return "worker";
}

bool Hit(Target target, const ProcessFacts& process) {
  const std::string what = WhatItIs(process);
  return target == Target::kNode || (target == Target::kAgent && what == "agent") ||
         (target == Target::kKeeper && what == "keeper") ||
         (target == Target::kController && what == "controller");
}

// The agent first, so that it does not tell of the others' deaths as if only they had died.
std::vector<ProcessFacts> Victims(const std::string& dir, Target target) {
  std::vector<ProcessFacts> victims;
  for (ProcessFacts& process : ProcessesOf(dir)) {
    if (Hit(target, process)) victims.push_back(std::move(process));
  }
  const auto order = [](const ProcessFacts& process) {
    const std::string what = WhatItIs(process);
    return what == "agent" ? 0 : what == "keeper" ? 1 : what == "guard" ? 2 : 3;
  };
  std::stable_sort(victims.begin(), victims.end(),
                   [&](const auto& a, const auto& b) { return order(a) < order(b); });
  return victims;
}

std::vector<Struck> Strike(const std::vector<ProcessFacts>& victims, int signal) {
  std::vector<Struck> struck;
  for (const ProcessFacts& victim : victims) {
    if (SendSignal(victim.id, signal)) struck.push_back({victim.id.pid, WhatItIs(victim)});
  }
  return struck;
}

Outcome CheckNode(const ClusterInfo& cluster, const std::string& node) {
  const std::vector<std::string>& nodes = cluster.plan.nodes;
  if (std::find(nodes.begin(), nodes.end(), node) != nodes.end()) return Done{};
  const std::string near = Nearest(node, nodes);
  return CliError{ExitCode::kNotFound, "NOT_FOUND",
                  fmt::format("cluster {} has no node \"{}\"", cluster.name, node),
                  near.empty() ? fmt::format("it has: {}", fmt::join(nodes, ", "))
                               : fmt::format("did you mean: {}", near)};
}

std::string AfterKill(const ClusterInfo& cluster, Target target, const std::optional<Hold>& hold,
                      milliseconds length, const std::string& part) {
  if (target == Target::kKeeper) return "; its agent starts another";
  if (!cluster.running) return "; it does not come back, its supervisor is gone";
  if (hold && hold->ever) return fmt::format("; down until: everstep cluster start {}", part);
  if (length.count() == 0) return "; it is started again at once";
  return fmt::format("; it comes back in {}",
                     HumanSeconds(static_cast<double>(length.count()) / 1000.0));
}

}  // namespace

VerbResult RunDrill(Context& context, Verb verb) {
  const Kind kind = KindOf(verb);
  if (kind.target == Target::kWorker) return DrillWorker(context, kind);
  Result<ClusterInfo> found = context.Cluster();
  if (!found.ok()) return found.error();
  const ClusterInfo& cluster = found.value();
  const bool controller = kind.target == Target::kController;
  const std::string part = controller ? "controller" : context.args.words[0];
  if (!controller) {
    if (Outcome known = CheckNode(cluster, part); !known.ok()) return known.error();
  }
  const std::string dir = cluster.state_dir + (controller ? "/controller" : "/nodes/" + part);
  milliseconds length{0};
  Result<std::optional<Hold>> asked = ReadFor(context.args, &length);
  if (!asked.ok()) return asked.error();
  std::optional<Hold> hold = asked.value();
  if (!hold && kind.target == Target::kNode) {
    length = kNodeReturn;
    hold = Hold{.until_ms = WallMilliseconds() + length.count()};
  }
  const std::string subject = controller || kind.target == Target::kNode ? part
                              : kind.target == Target::kAgent            ? "the agent of " + part
                                                                         : "the keeper of " + part;
  const std::vector<ProcessFacts> victims = Victims(dir, kind.target);
  if (victims.empty()) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("{} of cluster {} does not run", subject, cluster.name),
                    fmt::format("start it: everstep cluster start {}", part)};
  }
  // Held before it dies, or its supervisor is quicker.
  if (kind.action == Action::kKill && hold && kind.target != Target::kKeeper) {
    if (Outcome written = WriteHold(dir, *hold); !written.ok()) return written.error();
  }
  const int signal = SignalOf(kind.action);
  std::vector<Struck> struck = Strike(victims, signal);
  if (kind.action == Action::kKill) {
    std::vector<ProcessId> ids;
    ids.reserve(victims.size());
    for (const ProcessFacts& victim : victims) ids.push_back(victim.id);
    // What was forked between the look and the blow.
    for (int round = 0; round < 3 && kind.target == Target::kNode; ++round) {
      const std::vector<Struck> more = Strike(Victims(dir, kind.target), signal);
      if (more.empty()) break;
    }
    if (!WaitGone(ids, context.timeout)) {
      return CliError{ExitCode::kTimeout, "DEADLINE_EXCEEDED",
                      fmt::format("{} was sent SIGKILL and is still there", subject),
                      "a process in uninterruptible sleep (state D) waits for its device"};
    }
  }
  Say(context, kind, signal, subject, struck,
      kind.action == Action::kKill ? AfterKill(cluster, kind.target, hold, length, part) : "");
  if (kind.action == Action::kPause && length.count() > 0 && context.args.Has("for")) {
    std::this_thread::sleep_for(length);
    struck = Strike(victims, SIGCONT);
    Say(context, {Action::kResume, kind.target}, SIGCONT, subject, struck, "");
  }
  return ExitCode::kOk;
}

}  // namespace everstep::cli
