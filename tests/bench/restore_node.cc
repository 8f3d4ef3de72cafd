// One node's checkpoint plane, told what to do on standard input; tests/bench/restore.py is its
// caller, and may start it in a network namespace.
//
//   restore_node --address A [--streams 2]
//
// Says `port P`, then answers each line:
//   capture GENERATION STEP BYTES       -> captured CRC_ROOT BYTES
//   swarm TAKERS BYTES                  -> swarm SOURCE:DEPTH..., the controller's plan for them
//                                          with this node as holder; source -1: the holder
//   restore GENERATION STEP CRC_ROOT BYTES SHARD_GENERATION HOST:PORT [DEPTH HOLDER:PORT]
//                                       -> restored NANOSECONDS
// `restored` is said when the slot lies here with every chunk checked; the time is
// CLOCK_MONOTONIC's. Ends with its input.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "checkpoint/core/swarm.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/transfer_service.h"
#include "tests/unit/memory_host.h"

namespace everstep::bench {
namespace {

using namespace everstep::checkpoint;  // NOLINT: every line below is about it
const JobId kJob = "bench";
constexpr auto kPatience = std::chrono::seconds(120);

std::int64_t Now() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

class Quiet final : public Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId&, const HeldShard&) override {}
  void OnTrouble(const JobId&, const std::string& what) override {
    fmt::print(stderr, "{}\n", what);
  }
};

class Node {
 public:
  bool Start(const TransferOptions& options) {
    auto service = TransferService::Start(options, &host_, &listener_);
    if (!service.ok()) {
      fmt::print(stderr, "error: {}\n", service.error().message);
      return false;
    }
    service_ = std::move(service.value());
    return true;
  }
  std::uint16_t port() const { return service_->port(); }

  // Fills a slot of rank 0; empty: it could not.
  std::string Capture(Generation generation, Step step, std::uint64_t bytes) {
    service_->Begin(kJob, generation, "key");
    auto arena = Open(bytes);
    if (!arena.open()) return "";
    state_.resize(bytes, 7);
    for (std::uint64_t at = 0; at < bytes; at += kChunkBytes) {
      std::memcpy(&state_[at], &step, std::min<std::uint64_t>(sizeof step, bytes - at));
    }
    auto writer = SlotWriter::Begin(&arena, static_cast<std::uint32_t>(step % 2), bytes);
    if (!writer.ok() || !writer.value().Append(state_.data(), bytes).ok()) return "";
    const auto view =
        writer.value().Finish({.generation = generation, .step = step, .world_size = 1}, 0);
    if (!view.ok()) return "";
    return fmt::format("captured {} {}", view.value().crc_root, view.value().fields.payload_bytes);
  }

  static std::string Swarm(std::uint64_t takers, std::uint64_t bytes) {
    std::vector<std::uint64_t> sent{0};
    std::string text = "swarm";
    for (const SwarmSource& source : PlanSwarm(takers, bytes, &sent)) {
      const bool holder = source.taker == SwarmSource::kHolder;
      fmt::format_to(std::back_inserter(text), " {}:{}",
                     holder ? -1 : static_cast<std::int64_t>(source.taker), source.depth);
    }
    return text;
  }

  // Takes rank 0's slot from a peer; empty: not within kPatience.
  std::string Restore(Generation generation, const RestorePart& restore) {
    const Part part{.job = kJob,
                    .generation = generation,
                    .world_size = 1,
                    .data_key = "key",
                    .workers = {{0, restore}},
                    .peers = {}};
    std::string error;
    if (!service_->Activate(part, &error)) {
      fmt::print(stderr, "error: {}\n", error);
      return "";
    }
    const Arena arena = Open(restore.bytes);
    const std::int64_t deadline = Now() + std::chrono::nanoseconds(kPatience).count();
    while (arena.open() && Now() < deadline) {
      const RestoreView word = arena.Restore();
      const bool of_this = word.generation == generation;
      if (of_this && word.state == RestoreState::kReady) return fmt::format("restored {}", Now());
      if (of_this && word.state == RestoreState::kFailed) {
        fmt::print(stderr, "error: {}\n", word.message);
        return "";
      }
      const timespec pause{0, 100'000};
      nanosleep(&pause, nullptr);
    }
    return "";
  }

 private:
  Arena Open(std::uint64_t bytes) {
    auto fds = host_.Open(kJob, {0, false}, bytes);
    if (!fds.ok()) return {};
    close(fds.value().eventfd);
    auto arena = Arena::Open(fds.value().memfd);
    return arena.ok() ? std::move(arena.value()) : Arena{};
  }

  MemoryHost host_;
  Quiet listener_;
  std::unique_ptr<TransferService> service_;
  std::vector<unsigned char> state_;
};

int Main(int argc, char** argv) {
  TransferOptions options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--address") options.bind_address = argv[i + 1];
    if (flag == "--streams") options.streams = std::atoi(argv[i + 1]);
  }
  signal(SIGPIPE, SIG_IGN);
  Node node;
  if (!node.Start(options)) return 1;
  fmt::print("port {}\n", node.port());
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string word;
    Generation generation = 0;
    RestorePart part;
    words >> word;
    if (word == "swarm") {
      std::uint64_t takers = 0;
      if (words >> takers >> part.bytes) fmt::print("{}\n", Node::Swarm(takers, part.bytes));
      std::fflush(stdout);
      continue;
    }
    words >> generation >> part.step;
    std::string answer;
    if (word == "capture" && words >> part.bytes) {
      answer = node.Capture(generation, part.step, part.bytes);
    } else if (word == "restore" && words >> part.crc_root >> part.bytes >> part.shard_generation >>
                                        part.source_address) {
      std::string holder;
      if (words >> part.relay >> holder) part.others.push_back(holder);
      answer = node.Restore(generation, part);
    }
    if (answer.empty()) {
      fmt::print(stderr, "error: could not: {}\n", line);
      return 1;
    }
    fmt::print("{}\n", answer);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace everstep::bench

int main(int argc, char** argv) {
  return everstep::bench::Main(argc, argv);
}
