#include "controller/cli/render.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <google/protobuf/util/json_util.h>

#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "proto/wire/job_status.h"

namespace everstep::cli {
namespace {

std::string Count(std::int64_t n) {
  return HumanCount(n);
}

std::string Reason(const std::string& reason) {
  return reason.empty() || reason == "none" ? "-" : reason;
}

template <typename Strings>
std::string JoinWords(const Strings& items, const char* separator) {
  std::string out;
  for (const auto& item : items) {
    if (!out.empty()) out += separator;
    out += item;
  }
  return out;
}

std::string NodesOf(const v1::JobStatus& job) {
  std::string out = fmt::format("{}/{}", job.nodes(), job.max_nodes());
  if (job.min_nodes() != job.max_nodes()) {
    out = fmt::format("{}/{}:{}", job.nodes(), job.min_nodes(), job.max_nodes());
  }
  return out;
}

std::string RestartsOf(const v1::JobStatus& job) {
  if (job.max_restarts() < 0) return fmt::format("{}", job.restarts());
  return fmt::format("{}/{}", job.restarts(), job.max_restarts());
}

// "14:02:11.482" of an RFC 3339 time; anything else as it is.
std::string TimeOfDay(const std::string& time) {
  const bool rfc = time.size() >= 20 && time[10] == 'T' && time.back() == 'Z';
  return rfc ? time.substr(11, time.size() - 12) : time;
}

// Steps are known where the script tells of them (everstep.Checkpointer).
std::string LostIn(const v1::JobStatus& job) {
  const bool known = std::any_of(job.faults().begin(), job.faults().end(),
                                 [](const v1::FaultStatus& f) { return f.steps_lost() >= 0; });
  const std::string steps = known                  ? Plural(job.steps_lost(), "step")
                            : job.faults().empty() ? "0 steps"
                                                   : "steps unknown";
  return fmt::format("{}, {}", HumanSeconds(job.seconds_lost()), steps);
}

// One line without control characters, never cut.
std::string Plain(const std::string& text) {
  Table one({{""}});
  one.Add({text});
  std::string line = one.Format(/*headers=*/false);
  line.pop_back();
  return line;
}

std::string RenderFaults(const v1::JobStatus& job, const RenderOptions& options) {
  Table table({{"FAULT", Align::kRight},
               {"DETECTED"},
               {"REASON"},
               {"SUBJECT"},
               {"AFTER", Align::kRight},
               {"RECOVERY", Align::kRight},
               {"GENERATION"},
               {"STEP"},
               {"LOST", Align::kRight},
               {"ACTION"}});
  std::string evidence;  // too long for a column
  for (const v1::FaultStatus& f : job.faults()) {
    // The day only where it is not the day of the submission.
    const bool same_day = f.detected().substr(0, 10) == job.submitted().substr(0, 10);
    table.Add({std::to_string(f.id()), same_day ? TimeOfDay(f.detected()) : f.detected(),
               Reason(f.reason()), f.subject(), HumanSeconds(f.detect_seconds()),
               HumanSeconds(f.recovery_seconds()),
               f.generation_after() == f.generation_before()
                   ? std::to_string(f.generation_before())
                   : fmt::format("{} -> {}", f.generation_before(), f.generation_after()),
               fmt::format("{} -> {}", Count(f.step_before()), Count(f.step_after())),
               Count(f.steps_lost()), f.action()});
    if (!f.evidence().empty()) evidence += fmt::format("  {}: {}\n", f.id(), Plain(f.evidence()));
  }
  std::string out = table.Format(options.headers, options.max_width);
  if (!evidence.empty()) out += "\nEvidence:\n" + evidence;
  return out;
}

std::string RenderRootCause(const v1::RootCause& cause) {
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"Root cause", fmt::format("rank {} (local {}) on {}, pid {}", cause.rank(),
                                 cause.local_rank(), OrDash(cause.node()), cause.pid())},
      {"  Exit", cause.exit_code() < 0 ? fmt::format("signal {}", -cause.exit_code())
                                       : fmt::format("code {}", cause.exit_code())},
      {"  Time", cause.time()},
      {"  Message", cause.message()}};
  if (!cause.error_file().empty()) pairs.push_back({"  Error file", cause.error_file()});
  if (cause.others_size() > 0) {
    pairs.push_back(
        {"  Others", fmt::format("{} failed later", Plural(cause.others_size(), "worker"))});
  }
  return FormatPairs(pairs);
}

template <typename Nodes>
Table NodesTable(const Nodes& nodes) {
  Table table({{"NODE"},
               {"STATE"},
               {"ADDRESS"},
               {"BEAT", Align::kRight},
               {"LEASE", Align::kRight},
               {"WARM"},
               {"REATTACHED", Align::kRight},
               {"JOBS"},
               {"REASON"}});
  for (const v1::NodeStatus& n : nodes) {
    table.Add({n.node(), n.state(), n.address(), HumanSeconds(n.heartbeat_age_seconds()),
               HumanSeconds(n.lease_ms() / 1000.0), n.warm() ? "yes" : "no",
               std::to_string(n.agent_restarts()), JoinWords(n.jobs(), " "), Reason(n.reason())});
  }
  return table;
}

template <typename Jobs>
Table JobsTable(const Jobs& jobs) {
  Table table({{"JOB"},
               {"STATE"},
               {"NODES"},
               {"SPARES", Align::kRight},
               {"WORLD", Align::kRight},
               {"GENERATION", Align::kRight},
               {"STEP", Align::kRight},
               {"COMMITTED", Align::kRight},
               {"RESTARTS"},
               {"LOST CAPACITY", Align::kRight},
               {"TIME", Align::kRight},
               {"REASON"}});
  for (const v1::JobStatus& j : jobs) {
    table.Add({j.job(), j.state(), NodesOf(j), std::to_string(j.spares()),
               std::to_string(j.world_size()), std::to_string(j.generation()), Count(j.step()),
               Count(j.committed_step()), RestartsOf(j), std::to_string(j.lost_capacity()),
               HumanSeconds(j.age_seconds()), Reason(j.reason())});
  }
  return table;
}

google::protobuf::util::JsonPrintOptions JsonOptions() {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  return options;
}

}  // namespace

std::string RenderStatus(const v1::ClusterStatus& status, const RenderOptions& options) {
  std::string out = FormatPairs(
      {{"Cluster", status.cluster()},
       {"Controller", fmt::format("pid {}, version {}, up {}", status.controller_pid(),
                                  OrDash(status.version()), HumanSeconds(status.uptime_seconds()))},
       {"Store", fmt::format("{}, opened {}", OrDash(status.store()),
                             Plural(static_cast<std::int64_t>(status.starts()), "time"))}});
  out += "\n" + (status.nodes().empty()
                     ? "No nodes have registered.\n"
                     : NodesTable(status.nodes()).Format(options.headers, options.max_width));
  out += "\n" + (status.jobs().empty()
                     ? "No jobs.\n"
                     : JobsTable(status.jobs()).Format(options.headers, options.max_width));
  return out;
}

std::string RenderJobs(const v1::JobList& jobs, const RenderOptions& options) {
  if (jobs.items().empty() && options.headers) return "No jobs.\n";
  return JobsTable(jobs.items()).Format(options.headers, options.max_width);
}

std::string RenderNodes(const v1::NodeList& nodes, const RenderOptions& options) {
  if (nodes.items().empty() && options.headers) return "No nodes have registered.\n";
  return NodesTable(nodes.items()).Format(options.headers, options.max_width);
}

std::string RenderNode(const v1::NodeStatus& node, const RenderOptions&) {
  std::vector<std::string> labels;
  for (const auto& [key, value] : std::vector<std::pair<std::string, std::string>>(
           node.labels().begin(), node.labels().end())) {
    labels.push_back(fmt::format("{}={}", key, value));
  }
  std::sort(labels.begin(), labels.end());
  // A node that is lost while it drains has both stories.
  const bool both = !node.drain_reason().empty() && node.state().rfind("DRAIN", 0) != 0;
  std::vector<std::pair<std::string, std::string>> pairs = {{"Node", node.node()},
                                                            {"State", node.state()},
                                                            {"Reason", Reason(node.reason())},
                                                            {"Evidence", node.evidence()},
                                                            {"Since", OrDash(node.since())}};
  if (both) {
    pairs.push_back({"Draining", fmt::format("{} (since {})", node.drain_reason(),
                                             OrDash(node.drain_since()))});
  }
  const std::vector<std::pair<std::string, std::string>> rest = {
      {"Address", node.address()},
      {"Incarnation", std::to_string(node.incarnation())},
      {"Last heartbeat", HumanSeconds(node.heartbeat_age_seconds()) + " ago"},
      {"Lease", HumanSeconds(node.lease_ms() / 1000.0)},
      {"Slots", node.slots() == 0 ? "no limit" : std::to_string(node.slots())},
      {"Warm", node.warm() ? "yes" : "no"},
      {"Reattached", Plural(node.agent_restarts(), "time")},
      {"Jobs", JoinWords(node.jobs(), " ")},
      {"Labels", JoinWords(labels, " ")}};
  pairs.insert(pairs.end(), rest.begin(), rest.end());
  return FormatPairs(pairs);
}

std::string RenderJob(const v1::JobStatus& job, const RenderOptions& options) {
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"Job", job.job()}, {"State", job.state()}, {"Reason", Reason(job.reason())}};
  if (!job.message().empty()) pairs.push_back({"Message", job.message()});
  const bool ended = IsTerminal(job);
  if (ended) pairs.push_back({"Exit code", std::to_string(job.exit_code())});
  pairs.insert(
      pairs.end(),
      {{"Generation", std::to_string(job.generation())},
       {"Nodes", fmt::format("{} ({})", NodesOf(job), Plural(job.spares(), "warm spare"))},
       {ended ? "Ran last on" : "Members", JoinWords(job.members(), " ")},
       {"World size", std::to_string(job.world_size())},
       {"Step", fmt::format("{} (committed {})", Count(job.step()), Count(job.committed_step()))},
       {"Restarts", fmt::format("{}, lost capacity {}, start failures {}", RestartsOf(job),
                                job.lost_capacity(), job.start_failures())},
       {"Lost in faults", LostIn(job)},
       {"Submitted", ended ? OrDash(job.submitted())
                           : fmt::format("{} ({} ago)", OrDash(job.submitted()),
                                         HumanSeconds(job.age_seconds()))}});
  if (ended) {
    pairs.push_back({"Ended", fmt::format("{} (after {})", OrDash(job.ended()),
                                          HumanSeconds(job.age_seconds()))});
  }
  if (!job.memory_kept_until().empty()) {
    pairs.push_back({"Memory kept", fmt::format("until {}; run --name {} goes on from it, job "
                                                "cancel --forget {} frees it",
                                                job.memory_kept_until(), job.job(), job.job())});
  }
  pairs.push_back({"Command", job.command()});
  pairs.push_back({"Logs", job.log_dir().empty() ? fmt::format("everstep logs {}", job.job())
                                                 : fmt::format("{} on its nodes", job.log_dir())});
  std::string out = FormatPairs(pairs);
  if (job.has_root_cause()) out += "\n" + RenderRootCause(job.root_cause());
  if (!job.ranks().empty()) {
    Table ranks({{"RANK", Align::kRight},
                 {"LOCAL", Align::kRight},
                 {"NODE"},
                 {"PID", Align::kRight},
                 {"STATE"},
                 {"EXIT", Align::kRight}});
    for (const v1::RankStatus& r : job.ranks()) {
      ranks.Add({std::to_string(r.rank()), std::to_string(r.local_rank()), r.node(),
                 r.pid() > 0 ? std::to_string(r.pid()) : "-", r.state(),
                 r.state() == "EXITED" ? std::to_string(r.exit_code()) : "-"});
    }
    out += "\n" + ranks.Format(options.headers, options.max_width);
  }
  if (!job.faults().empty()) out += "\n" + RenderFaults(job, options);
  return out;
}

std::string RenderEvent(const v1::Event& event) {
  // The day is said by -o jsonl; a person at a terminal wants the time.
  const std::string time = TimeOfDay(event.time());
  std::string who = event.job();
  if (!event.node().empty()) who += (who.empty() ? "" : "@") + event.node();
  if (event.rank() >= 0) who += fmt::format("#{}", event.rank());
  if (event.generation() > 0) who += fmt::format(" g{}", event.generation());
  std::string line = fmt::format("{} {:<7} {:<20} {:<17} {}", time, event.severity(), event.type(),
                                 Reason(event.reason()), OrDash(who));
  if (!event.message().empty()) line += ": " + event.message();
  if (!event.evidence().empty()) line += " [" + event.evidence() + "]";
  return Plain(line) + "\n";
}

std::string ToJsonLine(const google::protobuf::Message& message) {
  std::string out;
  const auto status = google::protobuf::util::MessageToJsonString(message, &out, JsonOptions());
  if (!status.ok())
    return R"({"error":"a reply that is no UTF-8"})"
           "\n";
  while (!out.empty() && out.back() == '\n') out.pop_back();
  return out + "\n";
}

std::string ToJson(const std::string& kind, const google::protobuf::Message& message) {
  const std::string body = ToJsonLine(message);
  const std::string head = fmt::format(R"({{"apiVersion":"everstep/v1","kind":"{}")", kind);
  return head + (body == "{}\n" ? "" : ",") + body.substr(1);
}

}  // namespace everstep::cli
