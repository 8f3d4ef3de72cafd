// What the agent knows of one job on its node, and how it says so. Plain values; no decision is
// taken here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/plan.h"
#include "proto/base/time.h"

namespace everstep::agent {

// One job on this node.
struct JobView {
  enum class Phase {
    kIdle,       // warm only, or stopped
    kDraining,   // prepare: workers of older generations are ending, or the store is starting
    kSurveying,  // ... they are gone; waits for what the memory holds
    kPrepared,
    kStarting,  // activate: workers are being forked
    kRunning,   // all forked (some may have exited)
    kStopping,
  };
  Phase phase = Phase::kIdle;
  Generation generation = 0;  // newest prepared or activated
  CommandSpec command;
  std::int32_t group_rank = 0;
  Step step = kNoStep;                // newest captured in `generation`
  std::vector<WorkerOnNode> workers;  // of `generation`
  // Workers that are ending, or whose start is still under way, of generations that are over.
  std::vector<std::pair<Generation, WorkerOnNode>> old_workers;
  // Of generations that are over; each waits for the Activate that resumes it.
  std::vector<std::pair<Generation, WorkerOnNode>> parked;
  // This node leaves: who has parked is to end, within this grace.
  std::optional<Duration> end_parked;
  bool host_store = false;
  std::uint32_t store_port = 0;
  bool fork_server_asked = false;
  bool fork_server_ready = false;
  std::string trouble;  // why the newest prepare or activate failed; empty: it did not
  bool trouble_in_activate = false;
  bool survey_done = false;
  std::vector<HeldShard> surveyed;
  std::vector<Cut> given_up;              // as of the newest Prepare
  std::optional<Timestamp> deadline;      // of draining, surveying, starting, stopping
  std::optional<Generation> stop_answer;  // Stopped is owed for this generation
  bool forget = false;                    // ... and then nothing of the job stays
  std::uint32_t persisting = 0;           // steps on their way to the disk; a stop waits for them
};
const char* PhaseName(JobView::Phase phase);

// pid 0: the keeper was asked to fork it and has not answered yet.
bool Starting(const WorkerOnNode& w);
bool AliveOrStarting(const WorkerOnNode& w);
std::vector<WorkerOnNode> Forked(const std::vector<WorkerOnNode>& workers);
WorkerOnNode* FindRank(std::vector<WorkerOnNode>* workers, Rank rank);  // null: not among them
// What waits for the end of `job`'s processes, in words.
std::string Lingering(const JobView& job);
// Workers of the current generation become old ones: their exits are awaited, no longer reported.
void RetireWorkers(JobView* job);
// Workers that are parked are to end as well: their exits are awaited, too.
void RetireParked(JobView* job);
// The job's part of a registration; without its shards.
JobOnNode Holds(const JobId& id, const JobView& job);

}  // namespace everstep::agent
