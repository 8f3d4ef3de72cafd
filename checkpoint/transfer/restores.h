// What each local rank of a generation starts from: brought into its arena, and said in the arena's
// restore word, from "pending" to "ready" or "failed". How bytes come: restorer.h, and by ranges,
// where the trainer is asked first, range_restorer.h. Owned by the transfer service; thread-safe.
//
//   Start --> it is here: ready
//         --> pool: BringRestore --> ready
//         --> pool: BringCatalog --> ask --> trainer --Answered--> pool: BringRanges --> ready
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/local_rank.h"
#include "checkpoint/transfer/relay.h"
#include "checkpoint/transfer/replicator.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/upkeep.h"

namespace everstep::checkpoint {

class Restores {
 public:
  // All must outlive it; `pool` runs the restores and is stopped first. `wake`: something may have
  // been captured.
  Restores(const TransferOptions& options, ArenaHost* host, Listener* listener, ShardFiles* files,
           const JobTable* jobs, RelayTable* relays, TaskPool* pool, Upkeep* upkeep,
           Replicator* replicator, std::function<void()> wake)
      : options_(options),
        host_(host),
        listener_(listener),
        files_(files),
        jobs_(jobs),
        relays_(relays),
        pool_(pool),
        upkeep_(upkeep),
        replicator_(replicator),
        wake_(std::move(wake)) {}

  // host:port of this node's data plane. Once, before Start.
  void SetOwn(std::string address, std::uint16_t port) {
    own_address_ = std::move(address);
    own_port_ = port;
  }
  // Blocks until no restore of an earlier generation writes into an arena of the part's ranks.
  // False with *error: one does not end.
  bool Await(const Part& part, std::string* error);
  void Start(const LocalPtr& local);
  // The trainer's answer to the catalog, if it is there now; said once.
  bool LookForAnswer(const LocalPtr& local);

 private:
  void BringWhole(const LocalPtr& local);
  void Ask(const LocalPtr& local);
  void Answer(const LocalPtr& local, const SlotView& request);
  std::optional<SlotView> Bring(
      const LocalPtr& local, RestoreState word,
      const std::function<Result<SlotView>(const JobFacts& facts)>& bring);
  bool InPlace(const LocalPtr& local, const SlotView& view);
  void Ready(const LocalPtr& local, const SlotView& view);
  void Holds(const LocalPtr& local, const std::optional<SlotView>& view);

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  ShardFiles* const files_;
  const JobTable* const jobs_;
  RelayTable* const relays_;
  TaskPool* const pool_;
  Upkeep* const upkeep_;
  Replicator* const replicator_;
  const std::function<void()> wake_;
  std::string own_address_;
  std::uint16_t own_port_ = 0;

  std::mutex mutex_;
  std::set<std::pair<JobId, Rank>> writing_;  // arenas that a restore writes to now
  std::condition_variable ended_;
};

}  // namespace everstep::checkpoint
