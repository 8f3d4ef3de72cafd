// Agent to agent: a captured slot to a peer's verified replica, beside iperf3.
//
//   transfer_bench [--runs 7] [--mib 1024] [--streams 1,2] [--address 127.0.0.1] [--realtime]
//                  [--json FILE]
//
// --realtime: both systems run before all other processes (SCHED_RR, needs root), for a machine on
// which others work; a figure is then of the code, not of the queue for a processor.
//
// Two processes, each with the agent's TransferService over real memfds: this one captures and
// pushes, a child of it receives. Both slots of both are warm before the first run counts, as after
// the first steps of a job. iperf3 moves the same bytes over the same address in as many streams;
// the systems take turns. For each:
//
//   throughput  payload over the time from the ring of the capture's bell to the peer's verified
//               slot (everstep, every byte checked by CRC32C); iperf3's own figure at its receiver
//   cpu         processor seconds of both ends for each GiB
//   replicated  from the begin of the capture to the peer's verified slot, over bytes / iperf3's
//               rate of the same turn
//   followed    the same of a capture whose chunks leave as they are written (overlapped ones)
//   unchanged   the same when 1 chunk in 10 changed since the slot before
#include <fmt/format.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/transfer_service.h"
#include "proto/base/errno_text.h"
#include "tests/bench/results.h"
#include "tests/unit/memory_host.h"

namespace everstep::bench {
namespace {

using namespace everstep::checkpoint;  // NOLINT: every line below is about it
const JobId kJob = "bench";
constexpr double kGiB = 1024.0 * 1024 * 1024;

std::int64_t Now() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Says each copy on standard output, with the time it was there.
class Teller final : public Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId&, const HeldShard& shard) override {
    if (!shard.replica) return;
    std::lock_guard<std::mutex> lock(mutex_);
    fmt::print("copied {} {} {}\n", shard.step, Now(), CpuSeconds());
    std::fflush(stdout);
  }
  void OnTrouble(const JobId&, const std::string& what) override {
    fmt::print(stderr, "{}\n", what);
  }

 private:
  std::mutex mutex_;
};

// The peer: reads "commit STEP" and "cpu"; ends with its input.
int Receive(const std::string& address) {
  MemoryHost host;
  Teller teller;
  TransferOptions options;
  options.bind_address = address;
  auto service = TransferService::Start(options, &host, &teller);
  if (!service.ok()) {
    fmt::print(stderr, "error: {}\n", service.error().message);
    return 1;
  }
  service.value()->Begin(kJob, 1, "key");
  fmt::print("port {}\n", service.value()->port());
  std::fflush(stdout);
  for (std::string word; std::cin >> word;) {
    if (word == "commit") {
      Step step = 0;
      std::cin >> step;
      service.value()->MarkCommitted(kJob, 1, step);
    } else if (word == "cpu") {
      fmt::print("cpu {}\n", CpuSeconds());
      std::fflush(stdout);
    }
  }
  service.value()->Stop();
  return 0;
}

// A child with its standard input and output as pipes.
class Child {
 public:
  explicit Child(const std::vector<std::string>& words) {
    int in[2], out[2];
    if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) return;
    std::vector<char*> argv;
    argv.reserve(words.size() + 1);
    for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    if (posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    to_ = in[1];
    from_ = out[0];
  }
  ~Child() {
    close(to_);
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
    close(from_);
  }
  bool started() const { return pid_ > 0; }
  void Say(const std::string& line) {
    [[maybe_unused]] const ssize_t n = write(to_, line.data(), line.size());
  }
  // None: it ended, or said nothing for a minute.
  std::optional<std::string> Line() {
    for (;;) {
      if (const auto end = said_.find('\n'); end != std::string::npos) {
        std::string line = said_.substr(0, end);
        said_.erase(0, end + 1);
        return line;
      }
      pollfd p{from_, POLLIN, 0};
      if (poll(&p, 1, 60'000) <= 0) return std::nullopt;
      char buffer[4096];
      const ssize_t n = read(from_, buffer, sizeof buffer);
      if (n <= 0) return std::nullopt;
      said_.append(buffer, static_cast<std::size_t>(n));
    }
  }
  std::string Rest() {
    std::string all;
    while (const auto line = Line()) all += *line + "\n";
    return all;
  }

 private:
  pid_t pid_ = -1;
  int to_ = -1, from_ = -1;
  std::string said_;
};

struct Rate {
  double gib_per_second = 0;
  double cpu_seconds_per_gib = 0;
};

// The number behind `"name":` after `from`; 0: not there.
double Field(const std::string& json, const std::string& name, std::size_t from) {
  const auto at = json.find('"' + name + "\":", from);
  return at == std::string::npos ? 0 : std::atof(json.c_str() + at + name.size() + 3);
}

std::optional<Rate> Iperf(const std::string& address, std::uint64_t bytes, int streams) {
  const std::string port = fmt::format("{}", 20'000 + getpid() % 20'000);
  Child server({"iperf3", "-s", "-1", "-B", address, "-p", port, "--forceflush"});
  if (!server.started()) return std::nullopt;
  while (const auto line = server.Line()) {
    if (line->find("listening on") != std::string::npos) break;
  }
  Child client({"iperf3", "-c", address, "-p", port, "-P", std::to_string(streams), "-n",
                std::to_string(bytes), "--json"});
  const std::string json = client.Rest();
  const auto end = json.find("\"end\":");
  if (end == std::string::npos) return std::nullopt;
  const auto received = json.find("\"sum_received\":", end);
  const auto cpu = json.find("\"cpu_utilization_percent\":", end);
  if (received == std::string::npos || cpu == std::string::npos) return std::nullopt;
  const double rate = Field(json, "bits_per_second", received) / 8 / kGiB;
  const double seconds = Field(json, "seconds", received);
  const double got = Field(json, "bytes", received) / kGiB;
  const double percent = Field(json, "host_total", cpu) + Field(json, "remote_total", cpu);
  if (rate <= 0 || got <= 0) return std::nullopt;
  return Rate{rate, percent / 100 * seconds / got};
}

class Sender {
 public:
  Sender(const std::string& self, const std::string& address, std::uint64_t bytes, int streams)
      : peer_({self, "--receive", address}), state_(bytes, 7) {
    TransferOptions options;
    options.bind_address = address;
    options.streams = streams;
    // What lies between two captures here is the push itself and iperf3, no training whose steps
    // would tell how much traffic it bears.
    options.pacing.limit.tolerance = std::numeric_limits<double>::infinity();
    const auto port = peer_.Line();
    auto service = TransferService::Start(options, &host_, &teller_);
    if (!port || !service.ok()) return;
    service_ = std::move(service.value());
    Part part{.job = kJob,
              .generation = 1,
              .world_size = 1,
              .data_key = "key",
              .workers = {{0, {}}},
              .peers = {fmt::format("{}:{}", address, port->substr(5))}};
    std::string error;
    if (!service_->Activate(part, &error)) {
      fmt::print(stderr, "error: {}\n", error);
      return;
    }
    auto fds = host_.Open(kJob, {0, false}, 4096);
    eventfd_ = fds.value().eventfd;
    arena_ = std::move(Arena::Open(fds.value().memfd).value());
  }
  ~Sender() {
    if (service_ != nullptr) service_->Stop();
    if (eventfd_ >= 0) close(eventfd_);
  }
  bool ready() const { return arena_.open(); }

  struct Sample {
    Rate rate;
    double replicated_seconds = 0;  // the capture with it
  };
  // One step: every `stride`-th chunk changes, then capture, bell, and the peer's word.
  // `followed`: the capture says how far it is, as an overlapped one does.
  std::optional<Sample> Step(std::uint64_t stride, bool followed = false) {
    ++step_;
    for (std::uint64_t at = 0; at < state_.size(); at += stride * kChunkBytes) {
      std::memcpy(&state_[at], &step_, sizeof step_);
    }
    const std::int64_t began = Now();
    auto writer = SlotWriter::Begin(&arena_, static_cast<std::uint32_t>(step_ % 2), state_.size());
    if (!writer.ok()) return std::nullopt;
    const std::uint64_t one = 1;
    const SlotFields fields{.generation = 1,
                            .step = step_,
                            .world_size = 1,
                            .captured_ns = static_cast<std::uint64_t>(began)};
    if (followed) {
      writer.value().Announce(fields, state_.size());
      if (write(eventfd_, &one, sizeof one) != sizeof one) return std::nullopt;
    }
    if (!writer.value().Append(state_.data(), state_.size()).ok() ||
        !writer.value().Finish(fields, 0).ok()) {
      return std::nullopt;
    }
    peer_.Say("cpu\n");
    const auto before = peer_.Line();
    if (!before) return std::nullopt;
    const double cpu_here = CpuSeconds();
    const double cpu_there = std::atof(before->c_str() + 4);
    const std::int64_t rung = Now();
    if (write(eventfd_, &one, sizeof one) != sizeof one) return std::nullopt;
    const auto line = peer_.Line();
    if (!line) return std::nullopt;
    const double here = CpuSeconds() - cpu_here;
    std::istringstream words(*line);
    std::string copied;
    everstep::Step step = 0;
    std::int64_t at = 0;
    double there = 0;
    words >> copied >> step >> at >> there;
    if (copied != "copied" || step != step_) return std::nullopt;
    service_->MarkCommitted(kJob, 1, step_);
    peer_.Say(fmt::format("commit {}\n", step_));
    const double gib = static_cast<double>(state_.size()) / kGiB;
    const double seconds = static_cast<double>(at - rung) / 1e9;
    return Sample{{gib / seconds, (here + there - cpu_there) / gib},
                  static_cast<double>(at - began) / 1e9};
  }

 private:
  MemoryHost host_;
  Teller teller_;
  Child peer_;
  std::vector<unsigned char> state_;
  std::unique_ptr<TransferService> service_;
  Arena arena_;
  int eventfd_ = -1;
  everstep::Step step_ = 0;
};

int Main(int argc, char** argv) {
  int runs = 7;
  std::uint64_t mib = 1024;
  std::string streams = "1,2", address = "127.0.0.1", json;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--realtime") {
      const sched_param first{.sched_priority = 5};
      if (sched_setscheduler(0, SCHED_RR, &first) == 0) continue;
      fmt::print(stderr, "error: --realtime needs root: {}\n", ErrnoText(errno));
      return 1;
    }
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (flag == "--receive" && value) return Receive(value);
    if (flag == "--runs" && value) {
      runs = std::atoi(value);
    } else if (flag == "--mib" && value) {
      mib = std::strtoull(value, nullptr, 10);
    } else if (flag == "--streams" && value) {
      streams = value;
    } else if (flag == "--address" && value) {
      address = value;
    } else if (flag == "--json" && value) {
      json = value;
    } else {
      fmt::print(stderr,
                 "usage: transfer_bench [--runs 7] [--mib 1024] [--streams 1,2] [--address "
                 "127.0.0.1] [--realtime] [--json FILE]\n");
      return 2;
    }
    ++i;
  }
  signal(SIGPIPE, SIG_IGN);
  Results results("transfer");
  const std::uint64_t bytes = mib << 20;
  std::istringstream list(streams);
  for (std::string word; std::getline(list, word, ',');) {
    const int n = std::atoi(word.c_str());
    if (n < 1) {
      fmt::print(stderr, "error: --streams wants numbers from 1 on, as in 1,2; got '{}'\n", word);
      return 2;
    }
    const std::string name = fmt::format("{}MiB-{}-stream{}", mib, n, n == 1 ? "" : "s");
    Sender sender("/proc/self/exe", address, bytes, n);
    if (!sender.ready()) return 1;
    for (int warm = 0; warm < 3; ++warm) {
      if (!sender.Step(1)) return 1;
    }
    for (int run = 0; run < runs; ++run) {
      const auto ours = sender.Step(1);
      const auto sparse = sender.Step(10);
      const auto followed = sender.Step(1, true);
      const auto theirs = Iperf(address, bytes, n);
      if (!ours || !sparse || !followed) {
        fmt::print(stderr, "error: the peer did not take the slot within a minute\n");
        return 1;
      }
      results.Add(name, "everstep", "throughput", "GiB/s", ours->rate.gib_per_second);
      results.Add(name, "everstep", "cpu", "s/GiB", ours->rate.cpu_seconds_per_gib);
      if (!theirs) {
        fmt::print(stderr, "iperf3 did not run: apt-get install iperf3 for the peer's rows\n");
        continue;
      }
      results.Add(name, "iperf3", "throughput", "GiB/s", theirs->gib_per_second);
      results.Add(name, "iperf3", "cpu", "s/GiB", theirs->cpu_seconds_per_gib);
      const double wire = static_cast<double>(bytes) / kGiB / theirs->gib_per_second;
      results.Add(name, "everstep", "replicated", "x", ours->replicated_seconds / wire);
      results.Add(name, "everstep", "replicated, followed", "x",
                  followed->replicated_seconds / wire);
      results.Add(name, "everstep", "replicated, 1 in 10 changed", "x",
                  sparse->replicated_seconds / wire);
    }
  }
  return results.Finish(json);
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
