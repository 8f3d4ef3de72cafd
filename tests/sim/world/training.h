// The training itself: processes of one generation that step together. A step is done when every
// rank took part; then each captures it, each in its own time. Knows no controller and no agent.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/sim/kernel/network.h"
#include "tests/sim/kernel/timeline.h"
#include "tests/sim/world/options.h"
#include "tests/sim/world/truth.h"

namespace everstep::sim {

class Training {
 public:
  // What a process of a group lets happen to it.
  struct Member {
    NodeId node;
    Lineage restored = kFromNothing;
    Step restored_step = 0;                        // 0: from nothing
    std::function<bool()> ready;                   // ... and not capturing
    std::function<bool()> runs;                    // alive and not stopped
    std::function<void(Lineage, Step)> capture;    // a step is done: keep it
    std::function<void(std::int32_t code)> leave;  // the process ends itself
    // Says a word of the ledger to the controller, again and again until it is acknowledged;
    // returns its number in this process's generation.
    std::function<std::uint64_t(const std::string& word)> tell;
    std::function<std::uint64_t()> acknowledged;  // the newest such number
  };

  Training(Timeline* timeline, Network* network, Truth* truth, const WorldOptions* options)
      : timeline_(timeline), network_(network), truth_(truth), options_(options) {}

  // A worker restored its state and waits for its peers. The group forms when all are there.
  void Join(const JobId& job, Generation generation, std::int32_t world_size, Rank rank,
            Member member);
  // The process is gone.
  void Leave(const JobId& job, Generation generation, Rank rank);

  bool Formed(const JobId& job, Generation generation) const;
  // Done by the group; kNoStep when it did not form.
  Step GroupStep(const JobId& job, Generation generation) const;
  bool Joined(const JobId& job, Generation generation, Rank rank) const;
  // The newest generation of the job that came to the script's end with every rank; 0: none.
  Generation Finished(const JobId& job) const {
    const auto it = finished_.find(job);
    return it == finished_.end() ? 0 : it->second;
  }
  Step best_step(const JobId& job) const;

  // The ledger that a job tells. A state comes with the words that whoever holds it cannot know to
  // be durable; a new rank 0 says them before its own.
  void Acknowledged(const JobId& job, const std::string& word);
  struct Told {
    std::pair<Generation, Step> acknowledged = {0, kNoStep};  // newest line, of its generation
    Generation generation = 0;      // newest that began; an older one may still train, cut off
    Lineage newest = kFromNothing;  // state of that group
    bool torn = false;              // a group went on from a state that another had left behind
    bool whole = false;             // its last group's rank 0 saw everything acknowledged
  };
  const std::map<JobId, Told>& told() const { return told_; }
  // Asked when a group forms; the checkers' window.
  std::function<void(const JobId&, Generation, Lineage, Step)> on_formed;

 private:
  struct Group {
    std::int32_t world_size = 0;
    std::map<Rank, Member> members;
    bool formed = false;
    bool broken = false;
    Lineage state = kFromNothing;
    Step step = 0;
    std::vector<std::string> words;  // not known to be durable
    std::uint64_t first_word = 1;    // number of the first of them, in this generation
  };
  using Key = std::pair<JobId, Generation>;

  void Form(const Key& key, Group* group);
  void Schedule(const Key& key);
  void DoStep(const Key& key);
  bool Connected(const Group& group) const;
  void Break(const Key& key);
  bool Tells(const JobId& job) const;
  void TellBegin(const Key& key, Group* group);
  void TellStep(const Key& key, Group* group);
  void Forget(Group* group);  // words that rank 0 knows to be durable: it says so with each step
  void Tell(Group* group, std::string word);
  void EndTelling(const Key& key, Timestamp give_up);

  Timeline* const timeline_;
  Network* const network_;
  Truth* const truth_;
  const WorldOptions* const options_;
  std::map<Key, Group> groups_;
  std::map<JobId, Generation> finished_;
  std::map<JobId, Step> best_;
  std::map<JobId, Told> told_;
  std::map<std::pair<JobId, Lineage>, std::vector<std::string>> words_;  // that a state comes with
};

}  // namespace everstep::sim
