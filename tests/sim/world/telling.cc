// What workers of a simulated node tell their controller: each keeps its words until they are
// acknowledged, keeper and agent pass on what comes while they are there. After
// everstep/_told.py and worker/keeper/workers_park.cc.
#include "tests/sim/world/node.h"

namespace everstep::sim {
namespace {

constexpr Duration kSayAgain = Milliseconds(700);
constexpr std::size_t kMostWords = 8;  // that go together

}  // namespace

std::uint64_t SimNode::TellController(const JobId& job, ProcessKey key, const std::string& word) {
  Process* process = FindProcess(job, key);
  if (process == nullptr) return 0;
  process->words.push_back({++process->told, ToldKind::kLedger, word});
  if (!process->saying) SayWords(job, key, process->pid);
  return process->told;
}

void SimNode::SayWords(const JobId& job, ProcessKey key, std::int32_t pid) {
  Process* process = FindProcess(job, key);
  if (process == nullptr || process->pid != pid) return;
  process->saying = !process->words.empty() && !process->stopped;
  if (process->words.empty()) return;
  AfterKeeper(kSayAgain, "says again", [this, job, key, pid] { SayWords(job, key, pid); });
  if (process->stopped) return;
  const std::size_t count = std::min(process->words.size(), kMostWords);
  const std::vector<ToldWord> words(process->words.begin(),
                                    process->words.begin() + static_cast<std::ptrdiff_t>(count));
  AfterKeeper(Draw(0, 3), "tells", [this, job, key, pid, words] {
    const Process* p = FindProcess(job, key);
    const KeeperJob* j = FindJob(job);
    if (p == nullptr || p->pid != pid || j->killed >= key.first) return;
    Tell(agent::WorkerTold{job, key.first, key.second, EncodeTold(words)});
  });
}

void SimNode::HearWords(const agent::ToldAck& ack) {
  const ProcessKey key{ack.generation, ack.rank};
  Process* process = FindProcess(ack.job, key);
  if (process == nullptr || ack.sequence > process->told) return;
  while (!process->words.empty() && process->words.front().sequence <= ack.sequence) {
    env_.training->Acknowledged(ack.job, process->words.front().body);
    process->words.pop_front();
  }
  process->acknowledged = std::max(process->acknowledged, ack.sequence);
}

}  // namespace everstep::sim
