// everstep_arena_host SOCKET JOB: the checkpoint plane of one node for tests written in Python.
// Reads a command a line, answers each with one line of JSON:
//
//   activate GENERATION WORLD STEP RANK...   as an agent at Activate; STEP -1: from nothing; one
//   that
//                                            another number of ranks captured: by ranges
//   commit on|off                            commit what is captured, as a controller of one node
//   (on) away on|off                              the controller is away survey what lies verified
//   in memory flip RANK STEP OFFSET                    flips a bit of a slot's payload
#include <fmt/format.h>

#include <atomic>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <utility>

#include "tests/integration/arena_host.h"

namespace everstep::testing {
namespace {

class Commits final : public checkpoint::Listener {
 public:
  void OnCaptured(const JobId&, Generation, Rank, Step) override {}
  void OnCopied(const JobId& job, const HeldShard& shard) override {
    auto* s = service.load();
    std::size_t have = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::set<Rank>& ranks_of_step = copied_[{shard.generation, shard.step}];
      ranks_of_step.insert(shard.rank);
      have = ranks_of_step.size();
    }
    if (s != nullptr && on && have >= ranks) s->MarkCommitted(job, shard.generation, shard.step);
  }
  void OnTrouble(const JobId&, const std::string& what) override { std::cerr << what << std::endl; }
  std::atomic<checkpoint::TransferService*> service{nullptr};
  std::atomic<bool> on{true};
  std::atomic<std::size_t> ranks{1};  // of the generation: a step is committed when all have it

 private:
  std::mutex mutex_;
  std::map<std::pair<Generation, Step>, std::set<Rank>> copied_;
};

// Every shard of the step, when another number of ranks than `world` captured them, each its own,
// or each its share of one state.
std::shared_ptr<const RestoreCut> CutOf(const std::vector<HeldShard>& held, Step step,
                                        std::int32_t world) {
  std::map<Rank, const HeldShard*> shards;
  for (const HeldShard& s : held) {
    if (s.step != step || s.replicated_layout) continue;
    const HeldShard*& newest = shards[s.rank];
    if (newest == nullptr || newest->generation < s.generation) newest = &s;
  }
  if (shards.empty()) return nullptr;
  if (shards.begin()->second->world_size == world && !shards.begin()->second->share) return nullptr;
  auto cut = std::make_shared<RestoreCut>();
  cut->step = step;
  cut->generation = shards.begin()->second->generation;
  cut->world_size = shards.begin()->second->world_size;
  for (const auto& [rank, s] : shards) {
    cut->shards.push_back(
        {.rank = rank, .crc_root = s->crc_root, .bytes = s->bytes, .holders = {}});
  }
  return cut;
}

std::string Activate(std::istringstream* words, const JobId& job,
                     checkpoint::TransferService* service, Commits* commits) {
  checkpoint::Part part{.job = job, .data_key = "key", .workers = {}, .peers = {}};
  Step step = kNoStep;
  Rank rank = 0;
  *words >> part.generation >> part.world_size >> step;
  const std::vector<HeldShard> held = service->Survey(job);
  const auto cut = step == kNoStep ? nullptr : CutOf(held, step, part.world_size);
  while (*words >> rank) {
    checkpoint::WorkerPart worker{.rank = rank, .restore = {}};
    if (cut != nullptr) {
      worker.restore.step = step;
      worker.restore.cut = cut;
      worker.restore.world_size = part.world_size;
      part.workers.push_back(worker);
      continue;
    }
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
  // Of a step that one rank captured and others start from, there is one copy.
  std::set<Rank> sources;
  for (const checkpoint::WorkerPart& w : part.workers) {
    sources.insert(w.restore.step == kNoStep || cut != nullptr ? w.rank : w.restore.shard_rank);
  }
  commits->ranks = sources.size();
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
      error = Activate(&words, job, service.value().get(), &commits);
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
