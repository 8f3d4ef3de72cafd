// The training itself: processes of one generation that step together. A step is done when every
// rank took part; then each captures it, each in its own time. Knows no controller and no agent.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <tuple>

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
  };
  using Key = std::pair<JobId, Generation>;

  void Form(const Key& key, Group* group);
  void Schedule(const Key& key);
  void DoStep(const Key& key);
  bool Connected(const Group& group) const;
  void Break(const Key& key);

  Timeline* const timeline_;
  Network* const network_;
  Truth* const truth_;
  const WorldOptions* const options_;
  std::map<Key, Group> groups_;
  std::map<JobId, Generation> finished_;
  std::map<JobId, Step> best_;
};

}  // namespace everstep::sim
