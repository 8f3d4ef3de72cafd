// Makes shards out of others' bytes, as the controller orders: the parity of what other nodes
// captured, or a shard that was lost with its nodes, out of what is left and parities. Either is
// kept as a replica is (replica_store.h) and served to whoever restores.
//
//   order --> ShardRecipe: which chunks of whom --> ParityBase: which of them need not come
//        --> read from their nodes, four at a time, each chunk checked as it comes
//        --> ShardSum: added into a torn slot --> published, told as Copied
//
// Four chunks of memory beside the slot, whatever the group's size. A source that fails is asked
// again; one that does not have it any more is left out, and the others make it if they suffice. An
// order ends with its generation, with a newer one for the same shard, or when nothing is left to
// make it of; the controller orders anew what it still needs. Thread-safe.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/codec/shard_recipe.h"
#include "checkpoint/transfer/chunk_taker.h"
#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/replica_store.h"
#include "checkpoint/transfer/shard_sum.h"
#include "checkpoint/transfer/task_pool.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

class ShardMaker {
 public:
  // All must outlive it.
  ShardMaker(const TransferOptions& options, ArenaHost* host, Listener* listener,
             const JobTable* jobs, Traffic* traffic, ReplicaStore* replicas)
      : options_(options),
        host_(host),
        listener_(listener),
        jobs_(jobs),
        traffic_(traffic),
        replicas_(replicas) {}
  ~ShardMaker() { Stop(); }
  ShardMaker(const ShardMaker&) = delete;
  ShardMaker& operator=(const ShardMaker&) = delete;

  // TransferService::Make; `own`: host:port of this node's data plane, whose shards are read from
  // memory. The same order again while it is carried out changes nothing.
  void Make(const JobId& job, Generation generation, const ShardBuild& build,
            const std::string& own);
  // Orders of generations before `generation` end soon.
  void End(const JobId& job, Generation generation);
  void EndAll();
  void Stop();  // likewise, and waits for them

 private:
  struct Task {
    JobId job;
    Generation generation = 0;
    ShardBuild build;
    std::string own;
    std::atomic<bool> cancel{false};
  };
  using TaskPtr = std::shared_ptr<Task>;

  void Run(const TaskPtr& task);
  // It is here already: nothing is made anew that others count on.
  std::optional<SlotView> Held(const Task& task);
  Result<SlotView> Bring(Task* task);
  Result<ReplicaStore::Filled> Fill(Task* task, const ShardRecipe& recipe, SlotWriter* writer,
                                    Rank* failed);
  PeerTask Asking(const Task& task, const JobFacts& facts, const std::string& address,
                  TrafficClass of) const;
  static SlotName NameOf(const Task& task, const CutShard& shard);
  std::vector<bool> KeepUnchanged(const Task& task, const ShardRecipe& recipe, SlotWriter* writer,
                                  ShardSum* sum);
  Outcome BringSource(const Task& task, const ShardRecipe& recipe, std::size_t s,
                      SteadyTime deadline, const std::atomic<bool>& stop, ChunkTaker* taker,
                      bool* gone);
  Outcome Read(const Task& task, const JobFacts& facts, const SlotName& name,
               const std::string& address, TrafficClass of, ChunkTaker* taker);
  static Result<SlotFields> ParityFields(const Task& task, const ShardRecipe& recipe,
                                         const std::vector<ParityMember>& members,
                                         std::byte* payload);
  static Result<SlotFields> LostFields(const Task& task, const std::vector<unsigned char>& table);
  static Result<ReplicaStore::Filled> Seal(const SlotFields& fields, std::uint32_t wanted,
                                           SlotWriter* writer);

  const TransferOptions options_;
  ArenaHost* const host_;
  Listener* const listener_;
  const JobTable* const jobs_;
  Traffic* const traffic_;
  ReplicaStore* const replicas_;

  std::mutex mutex_;
  bool stopping_ = false;
  std::map<std::pair<JobId, Rank>, TaskPtr> tasks_;
  std::unique_ptr<TaskPool> pool_;  // made with the first order: most jobs are kept by copies
};

}  // namespace everstep::checkpoint
