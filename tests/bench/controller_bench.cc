// What a controller carries: beats a second on one core, the time of a decision, resident memory.
//
//   controller_bench [--agents 1000,10000] [--job-nodes 1000] [--seconds 10] [--runs 3] [--json
//   FILE]
//
// The program everstep-controller runs as a process of its own on a fresh state directory; this
// process plays the agents, one TCP connection and stream each, and offers 10,000 beats a second in
// all. Two of the figures need no agents: decisions are timed inside this process on the same
// Controller, with a job over all nodes.
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <thread>
#include <tuple>

#include "controller/core/controller.h"
#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "tests/bench/agent_swarm.h"
#include "tests/integration/controller_process.h"

namespace everstep::bench {
namespace {

using controller::Controller;
using controller::Decisions;
using controller::Event;

constexpr int kBeatsASecond = 10'000;
constexpr const char* kBudgets[][3] = {{"heartbeats_per_second", "10000", "at least"},
                                       {"decision_p99", "0.001", "at most"},
                                       {"resident_memory", "60", "at most"},
                                       {"resident_memory_with_job", "60", "at most"}};

struct Samples {
  // case, metric, unit
  std::map<std::tuple<std::string, std::string, std::string>, std::vector<double>> values;
  void Add(const std::string& name, const std::string& metric, const std::string& unit,
           double value) {
    values[{name, metric, unit}].push_back(value);
  }
};

double CpuSeconds(pid_t pid) {
  std::string stat = test::ReadAll(fmt::format("/proc/{}/stat", pid));
  std::istringstream fields(stat.substr(stat.rfind(')') + 2));
  std::string field;
  long ticks = 0;
  for (int i = 3; i <= 15 && fields >> field; ++i) {
    if (i >= 14) ticks += std::stol(field);  // utime, stime
  }
  return static_cast<double>(ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

double ResidentMiB(pid_t pid) {
  std::ifstream in(fmt::format("/proc/{}/status", pid));
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

// Real streams: throughput and memory. False: it could not be measured.
bool Streams(int agents, int job_nodes, int seconds, Samples* samples) {
  const std::string name = fmt::format("{}_agents", agents);
  test::TempDir dir;
  test::ControllerProcess process(dir.path() + "/state");
  if (!process.Start(
          {"--lease-ms", "300000", "--heartbeat-ms", "1000", "--log-file", dir.path() + "/log"})) {
    fmt::print(stderr, "controller_bench: {}\n", process.output());
    return false;
  }
  AgentSwarm swarm(process.address(), agents);
  if (!swarm.WaitRegistered(std::chrono::seconds(120))) {
    fmt::print(stderr, "controller_bench: {} of {} agents registered within 120 s\n",
               swarm.registered(), agents);
    return false;
  }
  const double before = CpuSeconds(process.pid());
  const std::uint64_t sent = swarm.Beat(kBeatsASecond, std::chrono::seconds(seconds));
  const double cpu = CpuSeconds(process.pid()) - before;
  samples->Add(name, "heartbeats_per_second", "1/s of one core",
               static_cast<double>(sent) / std::max(cpu, 0.01));
  samples->Add(name, "resident_memory", "MiB", ResidentMiB(process.pid()));
  // One job over many of them: from its submission until every node said that its workers run.
  const auto began = std::chrono::steady_clock::now();
  const auto nodes = static_cast<std::uint32_t>(std::min(agents, job_nodes));
  if (!process.Submit("job", nodes, nodes, 1, 8 << 10).ok() || !process.JobIs("job", "RUNNING")) {
    fmt::print(stderr, "controller_bench: a job over {} nodes did not start\n", nodes);
    return false;
  }
  samples->Add(name, "job_start", "s",
               std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  swarm.Beat(kBeatsASecond, std::chrono::seconds(4));
  samples->Add(name, "resident_memory_with_job", "MiB", ResidentMiB(process.pid()));
  if (swarm.lost() > 0) {
    fmt::print(stderr, "controller_bench: {} of {} agents lost their stream\n", swarm.lost(),
               agents);
    return false;
  }
  return true;
}

// The core alone: every decision of a job over all nodes that fails, recovers and commits steps.
void DecideAll(int nodes, Samples* samples) {
  Controller core(controller::Options{});
  Timestamp now{1};
  std::vector<double> beats, others;
  Decisions out;
  const auto step = [&](const Event& event) {
    now = now + std::chrono::microseconds(100);
    const std::int64_t began = MonotonicNanos();
    core.Step(now, event, &out);
    const double took = static_cast<double>(MonotonicNanos() - began) / 1e9;
    (std::holds_alternative<controller::Heartbeat>(event) ? beats : others).push_back(took);
  };
  const auto node = [](int i) { return fmt::format("n{:05}", i); };
  for (int i = 0; i < nodes; ++i) {
    controller::NodeRegistered e;
    e.node = node(i);
    e.keeper_id = static_cast<std::uint64_t>(i) + 1;
    e.facts = {"10.0.0.1", 4000, 0, {}};
    step(e);
  }
  controller::SubmitJob submit;
  submit.spec.job = "job";
  submit.spec.min_nodes = static_cast<std::uint32_t>(nodes) / 2;
  submit.spec.max_nodes = static_cast<std::uint32_t>(nodes);
  step(submit);
  for (Generation g = 1; g <= 5; ++g) {
    for (int i = 0; i < nodes; ++i) {
      controller::Prepared e{node(i), 1, {}, 29500, false, ""};
      e.holds.job = "job";
      e.holds.generation = g;
      step(e);
    }
    for (int i = 0; i < nodes; ++i)
      step(controller::Activated{node(i), 1, "job", g, {{i, 0, 1, true, {}}}, false, ""});
    for (int beat = 0; beat < 20 * nodes; ++beat) {
      controller::Heartbeat e{node(beat % nodes), 1, 0, {}, {{"job", g, static_cast<Step>(g), 1}}};
      step(e);
    }
    for (const bool replica : {false, true}) {
      for (int i = 0; i < nodes; ++i) {
        step(controller::ShardCopied{node((i + replica) % nodes),
                                     1,
                                     "job",
                                     {i, nodes, g, static_cast<Step>(g), 7, 100, replica, true}});
      }
    }
    step(controller::WorkerExited{node(1), 1, "job", g, 1, 0, 1, {.code = -9}});
    out.Clear();
  }
  const auto p99 = [](std::vector<double>& v) {
    std::sort(v.begin(), v.end());
    return v[v.size() * 99 / 100];
  };
  const std::string name = fmt::format("{}_nodes", nodes);
  samples->Add(name, "decision_p99", "s", p99(others));
  samples->Add(name, "decision_max", "s", others.back());
  samples->Add(name, "heartbeat_p99", "s", p99(beats));
}

double Median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.size() % 2 == 1 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

std::string Machine() {
  std::string model = "unknown processor";
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("model name", 0) == 0) {
      model = line.substr(line.find(':') + 2);
      break;
    }
  }
  return fmt::format("{} cores, {}", std::thread::hardware_concurrency(), model);
}

void Print(const Samples& samples) {
  fmt::print("\ncontroller: {}\n{:<14}{:<24}{:>12}{:>12}{:>12}  {:<17}{:>4}  {}\n", Machine(),
             "CASE", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT", "RUNS", "LIMIT");
  for (const auto& [key, values] : samples.values) {
    const auto& [name, metric, unit] = key;
    std::string limit = "-";
    for (const auto& budget : kBudgets) {
      const bool here = metric.rfind("resident", 0) != 0 || name == "1000_agents";
      if (metric == budget[0] && here) limit = fmt::format("{} {}", budget[2], budget[1]);
    }
    const auto number = [](double v) {
      return v >= 1000 ? fmt::format("{:.0f}", v) : fmt::format("{:.3g}", v);
    };
    fmt::print("{:<14}{:<24}{:>12}{:>12}{:>12}  {:<17}{:>4}  {}\n", name, metric,
               number(Median(values)), number(*std::min_element(values.begin(), values.end())),
               number(*std::max_element(values.begin(), values.end())), unit, values.size(), limit);
  }
}

bool WriteJson(const Samples& samples, const std::string& path) {
  std::string rows;
  for (const auto& [key, values] : samples.values) {
    const auto& [name, metric, unit] = key;
    rows += fmt::format(
        "{}\n  {{\"case\": \"{}\", \"system\": \"everstep\", \"metric\": \"{}\", \"unit\": \"{}\", "
        "\"median\": {}, "
        "\"min\": {}, \"max\": {}, \"runs\": {}}}",
        rows.empty() ? "" : ",", name, metric, unit, Median(values),
        *std::min_element(values.begin(), values.end()),
        *std::max_element(values.begin(), values.end()), values.size());
  }
  std::ofstream out(path);
  out << fmt::format("{{\"benchmark\": \"controller\", \"machine\": \"{}\", \"rows\": [{}]}}\n",
                     Machine(), rows);
  return static_cast<bool>(out.flush());
}

int Usage(const std::string& wrong) {
  fmt::print(stderr,
             "controller_bench: {}\nusage: controller_bench [--agents N,N...] [--job-nodes N] "
             "[--seconds N] [--runs N] "
             "[--json FILE]\n",
             wrong);
  return 2;
}

}  // namespace

int Main(int argc, char** argv) {
  std::vector<int> agents = {1000, 10'000};
  int seconds = 10, runs = 3, job_nodes = 1000;
  std::string json;
  for (int i = 1; i < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--help" || i + 1 >= argc)
      return Usage(flag == "--help" ? "" : flag + " needs a value");
    if (flag == "--agents") {
      agents.clear();
      std::istringstream list(argv[i + 1]);
      for (std::string one; std::getline(list, one, ',');) agents.push_back(std::atoi(one.c_str()));
    } else if (flag == "--seconds") {
      seconds = std::atoi(argv[i + 1]);
    } else if (flag == "--job-nodes") {
      job_nodes = std::atoi(argv[i + 1]);
    } else if (flag == "--runs") {
      runs = std::atoi(argv[i + 1]);
    } else if (flag == "--json") {
      json = argv[i + 1];
    } else {
      return Usage("unknown flag " + flag);
    }
  }
  if (seconds < 1 || runs < 1 || job_nodes < 1 || agents.empty() ||
      *std::min_element(agents.begin(), agents.end()) < 1) {
    return Usage("numbers start at 1");
  }
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  Samples samples;
  bool all = true;
  for (int run = 0; run < runs; ++run) {
    for (const int count : agents) {
      if (files.rlim_cur < static_cast<rlim_t>(count) + 200) {
        fmt::print(stderr,
                   "controller_bench: {} agents need {} descriptors, this process may have {} "
                   "(ulimit -n)\n",
                   count, count + 200, files.rlim_cur);
        all = false;
        continue;
      }
      all = Streams(count, job_nodes, seconds, &samples) && all;
    }
    DecideAll(1000, &samples);
  }
  Print(samples);
  if (!json.empty() && !WriteJson(samples, json)) {
    fmt::print(stderr, "controller_bench: cannot write {}: {}\n", json, ErrnoText(errno));
    return 1;
  }
  return all ? 0 : 1;
}

}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
