#include "controller/server/metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/check.h"

namespace everstep::controller {
namespace {

struct Family {
  const char* name;
  const char* type;  // counter, gauge, histogram
  const char* labels;
  const char* help;
};

// In the order in which they are served.
constexpr Family kFamilies[] = {
    {"everstep_controller_info", "gauge", "cluster, version",
     "Always 1; the labels say what runs."},
    {"everstep_controller_start_time_seconds", "gauge", "",
     "When this process started, in seconds since the Unix epoch."},
    {"everstep_store_starts_total", "counter", "",
     "Times a controller opened this store, this one included: restarts of the controller."},
    {"everstep_nodes", "gauge", "state",
     "Nodes by state: alive, suspect (stream broken, lease not over), lost, draining (alive, takes "
     "no new "
     "work)."},
    {"everstep_sessions", "gauge", "", "Agents' streams that are open and registered."},
    {"everstep_agents_refused_total", "counter", "",
     "Registrations that were not let in: other version, bad name, too many nodes, name in use."},
    {"everstep_agent_reattached_total", "counter", "node",
     "Registrations of a node that kept its keeper's workers: nothing was lost."},
    {"everstep_heartbeat_age_seconds", "gauge", "node", "Time since the node was last heard."},
    {"everstep_node_lease_seconds", "gauge", "node",
     "Silence after which the node is lost; adapts to the gaps between its beats."},
    {"everstep_node_memory_suspect", "gauge", "node",
     "1: copies in this node's memory failed their checksums again and again."},
    {"everstep_jobs", "gauge", "state", "Jobs the store remembers, by state."},
    {"everstep_job_nodes", "gauge", "job", "Nodes in the running generation of an unfinished job."},
    {"everstep_job_generation", "gauge", "job", "Newest generation of an unfinished job."},
    {"everstep_job_step", "gauge", "job", "Newest step any rank reported; -1: none."},
    {"everstep_job_committed_step", "gauge", "job",
     "Newest step with all its copies; what a restart starts from. -1: none."},
    {"everstep_job_verified_step", "gauge", "job",
     "Newest checkpoint that enough quiet steps followed. -1: none."},
    {"everstep_job_shards_damaged_total", "counter", "job",
     "Copies in nodes' memory that failed their checksum."},
    {"everstep_job_shards_repaired_total", "counter", "job",
     "... that were put right from another copy."},
    {"everstep_job_restarts_total", "counter", "job",
     "Restarts charged to the script's own failures (max_restarts counts these)."},
    {"everstep_job_lost_capacity_total", "counter", "job",
     "Restarts because workers were killed or stopped from outside."},
    {"everstep_job_faults_total", "counter", "job, reason",
     "Faults of a job, by reason code; the newest 256."},
    {"everstep_job_recovery_seconds_total", "counter", "job",
     "Time from a fault's detection until the job stepped again (or its workers ran), summed."},
    {"everstep_events_total", "counter", "",
     "Events handed to the core: messages, requests, timers."},
    {"everstep_stale_messages_total", "counter", "",
     "Messages of an old incarnation or generation that were dropped at the door."},
    {"everstep_decision_duration_seconds", "histogram", "", "Time of one decision of the core."},
    {"everstep_store_write_duration_seconds", "histogram", "",
     "Time of one batch's write to the store, sync included."},
    {"everstep_store_records_total", "counter", "", "Records written."},
    {"everstep_mailbox_depth", "gauge", "",
     "Events and requests that wait for the controller's thread."},
    {"everstep_mailbox_refused_total", "counter", "",
     "Events and requests refused because the mailbox was full."},
    {"everstep_admin_requests_total", "counter", "", "Calls of the admin service."},
    {"everstep_admin_streams", "gauge", "",
     "Open streams of the admin service: events, followed jobs, logs."},
    {"everstep_slow_readers_total", "counter", "",
     "Streams cut off because their reader did not read."},
    {"everstep_log_bytes_relayed_total", "counter", "",
     "Bytes of workers' logs passed from agents to readers."},
    {"process_resident_memory_bytes", "gauge", "", "Resident memory of the controller."},
    {"process_cpu_seconds_total", "counter", "", "User and system CPU time of the controller."},
    {"process_open_fds", "gauge", "", "Open file descriptors of the controller."},
};

const Family& FamilyOf(std::string_view name) {
  for (const Family& family : kFamilies) {
    if (name == family.name) return family;
  }
  CheckFailed(__FILE__, __LINE__, "a family of the table", name);
}

std::string Escaped(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

using Labels = std::vector<std::pair<std::string_view, std::string_view>>;

std::string LabelText(const Labels& labels) {
  if (labels.empty()) return {};
  std::string out = "{";
  for (const auto& [key, value] : labels) {
    out += fmt::format("{}{}=\"{}\"", out.size() == 1 ? "" : ",", key, Escaped(value));
  }
  return out + "}";
}

// Writes families in the table's words; samples of one family come together.
class Page {
 public:
  void Begin(std::string_view name) {
    const Family& family = FamilyOf(name);
    name_ = family.name;
    text_ += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name_, family.help, name_, family.type);
  }
  template <typename Number>
  void Sample(const Labels& labels, Number value) {
    text_ += fmt::format("{}{} {}\n", name_, LabelText(labels), value);
  }
  template <typename Number>
  void One(std::string_view name, Number value) {
    Begin(name);
    Sample({}, value);
  }
  void Durations(std::string_view name, const Histogram& histogram) {
    Begin(name);
    const auto counts = histogram.Cumulative();
    for (std::size_t i = 0; i < Histogram::kBoundsMicros.size(); ++i) {
      text_ += fmt::format("{}_bucket{{le=\"{}\"}} {}\n", name_,
                           static_cast<double>(Histogram::kBoundsMicros[i]) / 1e6, counts[i]);
    }
    text_ += fmt::format("{0}_bucket{{le=\"+Inf\"}} {1}\n{0}_sum {2:.9f}\n{0}_count {1}\n", name_,
                         counts.back(), histogram.sum_seconds());
  }
  std::string Take() { return std::move(text_); }

 private:
  std::string text_;
  const char* name_ = "";
};

std::uint64_t ResidentBytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  unsigned long size = 0, resident = 0;
  const int read = std::fscanf(file, "%lu %lu", &size, &resident);
  std::fclose(file);
  return read == 2 ? resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)) : 0;
}

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::size_t OpenDescriptors() {
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  std::size_t count = 0;
  // NOLINTNEXTLINE(concurrency-mt-unsafe): the stream is this function's own
  while (const dirent* entry = readdir(folder)) count += entry->d_name[0] != '.';
  closedir(folder);
  return count - 1;  // less the one that reads
}

void WriteNodes(const ClusterState& state, Timestamp now, Page* page) {
  std::map<std::string_view, std::size_t> by_state = {
      {"alive", 0}, {"suspect", 0}, {"lost", 0}, {"draining", 0}};
  for (const auto& [id, node] : state.nodes) {
    switch (node.record.health) {
      case NodeHealth::kAlive: ++by_state[node.record.draining ? "draining" : "alive"]; break;
      case NodeHealth::kSuspect: ++by_state["suspect"]; break;
      case NodeHealth::kLost: ++by_state["lost"]; break;
    }
  }
  page->Begin("everstep_nodes");
  for (const auto& [name, count] : by_state) page->Sample({{"state", name}}, count);
  page->Begin("everstep_agent_reattached_total");
  for (const auto& [id, node] : state.nodes) page->Sample({{"node", id}}, node.reattached);
  page->Begin("everstep_heartbeat_age_seconds");
  for (const auto& [id, node] : state.nodes) {
    if (node.record.health == NodeHealth::kLost) continue;
    page->Sample({{"node", id}}, std::max(0.0, ToSeconds(now - node.last_heard)));
  }
  page->Begin("everstep_node_lease_seconds");
  for (const auto& [id, node] : state.nodes) {
    if (node.record.health == NodeHealth::kLost) continue;
    page->Sample({{"node", id}}, ToSeconds(node.lease));
  }
  page->Begin("everstep_node_memory_suspect");
  for (const auto& [id, node] : state.nodes) {
    if (!node.memory_suspect.empty()) page->Sample({{"node", id}}, 1);
  }
}

void WriteJobs(const ClusterState& state, Page* page) {
  std::map<std::string, std::size_t> by_state;
  for (int s = 0; s <= static_cast<int>(JobState::kCancelled); ++s) {
    by_state[JobStateName(static_cast<JobState>(s))] = 0;
  }
  std::vector<const JobStateView*> open;  // ended ones would make the page grow for ever
  for (const auto& [id, job] : state.jobs) {
    ++by_state[JobStateName(job.record.state)];
    if (!IsTerminal(job.record.state)) open.push_back(&job);
  }
  page->Begin("everstep_jobs");
  for (const auto& [name, count] : by_state) page->Sample({{"state", name}}, count);
  const auto each = [&](std::string_view name, const auto& value) {
    page->Begin(name);
    for (const JobStateView* job : open) page->Sample({{"job", job->record.spec.job}}, value(*job));
  };
  each("everstep_job_nodes", [](const JobStateView& j) {
    return j.record.state == JobState::kWaiting ? std::size_t{0} : j.plan.nodes.size();
  });
  each("everstep_job_generation", [](const JobStateView& j) { return j.record.generation; });
  each("everstep_job_step", [](const JobStateView& j) { return j.step; });
  each("everstep_job_committed_step", [](const JobStateView& j) {
    return j.commits.commits.empty() ? kNoStep : j.commits.commits.front().step;
  });
  each("everstep_job_verified_step", [](const JobStateView& j) {
    return j.commits.verified_at.ns == 0 ? kNoStep : j.commits.verified.step;
  });
  each("everstep_job_shards_damaged_total",
       [](const JobStateView& j) { return j.record.shards_damaged; });
  each("everstep_job_shards_repaired_total",
       [](const JobStateView& j) { return j.record.shards_repaired; });
  each("everstep_job_restarts_total", [](const JobStateView& j) { return j.record.restarts; });
  each("everstep_job_lost_capacity_total",
       [](const JobStateView& j) { return j.record.lost_capacity; });
  page->Begin("everstep_job_faults_total");
  for (const JobStateView* job : open) {
    std::map<std::string_view, std::size_t> reasons;
    for (const Fault& fault : job->record.faults) ++reasons[ReasonName(fault.reason)];
    for (const auto& [reason, count] : reasons) {
      page->Sample({{"job", job->record.spec.job}, {"reason", reason}}, count);
    }
  }
  each("everstep_job_recovery_seconds_total", [](const JobStateView& j) {
    double seconds = 0;
    for (const Fault& fault : j.record.faults) {
      if (fault.recovered.ns != 0) seconds += ToSeconds(fault.recovered - fault.detected);
    }
    return seconds;
  });
}

}  // namespace

void Histogram::Observe(Duration d) {
  const std::int64_t micros = (d.count() + 999) / 1000;  // up: a bound is never understated
  std::size_t i = 0;
  while (i < kBoundsMicros.size() && micros > kBoundsMicros[i]) ++i;
  buckets_[i].fetch_add(1, std::memory_order_relaxed);
  nanos_.fetch_add(static_cast<std::uint64_t>(d.count() < 0 ? 0 : d.count()),
                   std::memory_order_relaxed);
}

std::array<std::uint64_t, Histogram::kBoundsMicros.size() + 1> Histogram::Cumulative() const {
  std::array<std::uint64_t, kBoundsMicros.size() + 1> out{};
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    sum += buckets_[i].load(std::memory_order_relaxed);
    out[i] = sum;
  }
  return out;
}

std::uint64_t Histogram::count() const {
  return Cumulative().back();
}

std::string MetricsText(const ClusterState& state, const Counters& counters, const Figures& figures,
                        Timestamp now) {
  Page page;
  page.Begin("everstep_controller_info");
  page.Sample({{"cluster", figures.cluster}, {"version", figures.version}}, 1);
  page.Begin("everstep_controller_start_time_seconds");
  page.Sample({}, fmt::format("{:.3f}", static_cast<double>(figures.started.ns) / 1e9));
  page.One("everstep_store_starts_total", figures.store_starts);
  WriteNodes(state, now, &page);
  page.One("everstep_sessions", figures.sessions);
  page.One("everstep_agents_refused_total", counters.agents_refused.load());
  WriteJobs(state, &page);
  page.One("everstep_events_total", counters.events.load());
  page.One("everstep_stale_messages_total", state.stale_dropped);
  page.Durations("everstep_decision_duration_seconds", counters.decision);
  page.Durations("everstep_store_write_duration_seconds", counters.store_write);
  page.One("everstep_store_records_total", counters.records.load());
  page.One("everstep_mailbox_depth", figures.mailbox_depth);
  page.One("everstep_mailbox_refused_total", counters.mailbox_refused.load());
  page.One("everstep_admin_requests_total", counters.requests.load());
  page.One("everstep_admin_streams", figures.watchers);
  page.One("everstep_slow_readers_total", counters.slow_readers.load());
  page.One("everstep_log_bytes_relayed_total", counters.log_bytes_relayed.load());
  page.One("process_resident_memory_bytes", ResidentBytes());
  page.One("process_cpu_seconds_total", CpuSeconds());
  page.One("process_open_fds", OpenDescriptors());
  return page.Take();
}

std::string MetricsMarkdown() {
  std::string out = "| metric | type | labels | meaning |\n|---|---|---|---|\n";
  for (const Family& family : kFamilies) {
    out += fmt::format("| `{}` | {} | {} | {} |\n", family.name, family.type,
                       *family.labels == '\0' ? "-" : family.labels, family.help);
  }
  return out;
}

}  // namespace everstep::controller
