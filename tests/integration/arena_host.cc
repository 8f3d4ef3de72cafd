// everstep_arena_host SOCKET JOB: the checkpoint plane of one node for tests written in Python.
// Reads a command a line, answers each with one line of JSON:
//
//   activate GENERATION WORLD STEP RANK...   as an agent at Activate; STEP -1: from nothing
//   commit on|off                            commit what is captured, as a controller of one node
//   (on) away on|off                              the controller is away survey what lies verified
//   in memory flip RANK STEP OFFSET                    flips a bit of a slot's payload
#include <fmt/format.h>

#include <atomic>
#include <iostream>
#include <sstream>

#include "tests/integration/arena_host.h"

namespace everstep::testing {
namespace {

class Commits final : public checkpoint::Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId& job, const HeldShard& shard) override {
    auto* s = service.load();
    if (s != nullptr && on) s->MarkCommitted(job, shard.generation, shard.step);
  }
  void OnTrouble(const JobId&, const std::string& what) override { std::cerr << what << std::endl; }
  std::atomic<checkpoint::TransferService*> service{nullptr};
  std::atomic<bool> on{true};
};

std::string Activate(std::istringstream* words, const JobId& job,
                     checkpoint::TransferService* service) {
  checkpoint::Part part{.job = job, .data_key = "key", .workers = {}, .peers = {}};
  Step step = kNoStep;
  Rank rank = 0;
  *words >> part.generation >> part.world_size >> step;
  const std::vector<HeldShard> held = service->Survey(job);
  while (*words >> rank) {
    checkpoint::WorkerPart worker{.rank = rank, .restore = {}};
    for (const HeldShard& s : held) {
      if (step == kNoStep || s.step != step) continue;
      if (worker.restore.step != kNoStep && s.rank != rank) continue;
      worker.restore = {.step = s.step,
                        .shard_rank = s.rank,
                        .shard_generation = s.generation,
                        .crc_root = s.crc_root,
                        .bytes = s.bytes};
    }
    if (step != kNoStep && worker.restore.step == kNoStep)
      return fmt::format("step {} is not here", step);
    part.workers.push_back(worker);
  }
  std::string error;
  service->Begin(job, part.generation, part.data_key);
  return service->Activate(part, &error) ? "" : error;
}

std::string Flip(std::istringstream* words, const JobId& job, ArenaHost* host) {
  Rank rank = 0;
  Step step = 0;
  std::uint64_t offset = 0;
  *words >> rank >> step >> offset;
  auto fds = host->Open(job, {rank, false}, 0);
  if (!fds.ok()) return fds.error().message;
  close(fds.value().eventfd);
  auto arena = checkpoint::Arena::Open(fds.value().memfd);
  if (!arena.ok()) return arena.error().message;
  for (std::uint32_t i = 0; i < checkpoint::kSlots; ++i) {
    const auto view = arena.value().Look(i);
    if (!view || view->step() != step || offset >= view->fields.payload_bytes) continue;
    const_cast<unsigned char*>(arena.value().Payload(*view))[offset] ^= 0x20;
    return "";
  }
  return "no such slot";
}

int Main(const std::string& socket, const JobId& job) {
  ArenaHost host(socket);
  Commits commits;
  auto service = checkpoint::TransferService::Start({}, &host, &commits);
  if (!host.ok() || !service.ok()) {
    std::cerr << "cannot listen at " << socket << std::endl;
    return 1;
  }
  commits.service = service.value().get();
  std::cout << "{\"ready\": true}" << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string verb, value, error, more;
    words >> verb;
    if (verb == "activate") {
      error = Activate(&words, job, service.value().get());
    } else if (verb == "flip") {
      error = Flip(&words, job, &host);
    } else if (verb == "commit" && words >> value) {
      commits.on = value == "on";
    } else if (verb == "away" && words >> value) {
      service.value()->SetControllerAway(value == "on");
    } else if (verb == "survey") {
      for (const HeldShard& s : service.value()->Survey(job)) {
        more += fmt::format(
            "{}{{\"rank\": {}, \"step\": {}, \"generation\": {}, \"bytes\": {}, \"replicated\": "
            "{}}}",
            more.empty() ? "" : ", ", s.rank, s.step, s.generation, s.bytes, s.replicated_layout);
      }
      more = fmt::format(", \"shards\": [{}]", more);
    } else {
      error = "unknown command";
    }
    std::cout << fmt::format("{{\"ok\": {}, \"error\": \"{}\"{}}}", error.empty(), error, more)
              << std::endl;
  }
  commits.service = nullptr;
  service.value()->Stop();
  return 0;
}

}  // namespace
}  // namespace everstep::testing

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: everstep_arena_host SOCKET JOB\n";
    return 2;
  }
  return everstep::testing::Main(argv[1], argv[2]);
}
