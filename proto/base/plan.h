// What the controller and its agents speak of alike: what runs and lies on a node, and a node's
// part of a plan. Plain values, without behaviour; both cores use them, so a simulator can join the
// two without a wire. proto/agent.proto mirrors them one to one, proto/wire/convert.cc is the only
// place that knows both.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/time.h"

namespace everstep {

// What a worker process is. The core carries it, it does not look inside: `opaque` is a serialised
// everstep.v1.Command, made and read by shells only.
struct CommandSpec {
  std::string opaque;
  friend bool operator==(const CommandSpec&, const CommandSpec&) = default;
};

struct ExitInfo {
  std::int32_t code = 0;  // exit code, or -signal
  bool oom_killed = false;
  bool by_everstep = false;
  Timestamp occurred;  // the node's clock
  std::string error_json;
  std::string error_file;
  Timestamp error_time;  // from the error file; ns == 0: none
  Duration ran = {};
  std::string refused;  // why the worker refused its input: no restart helps; empty: it did not
  friend bool operator==(const ExitInfo&, const ExitInfo&) = default;
};

struct WorkerOnNode {
  Rank rank = 0;
  std::int32_t local_rank = 0;
  std::int32_t pid = 0;
  bool running = false;
  ExitInfo exit;  // meaningful when not running
  friend bool operator==(const WorkerOnNode&, const WorkerOnNode&) = default;
};

// A verified slot in some node's memory, or a file in the job's checkpoint directory.
struct HeldShard {
  Rank rank = 0;
  std::int32_t world_size = 0;
  Generation generation = 0;  // that captured it
  Step step = kNoStep;
  std::uint32_t crc_root = 0;
  std::uint64_t bytes = 0;
  bool replica = false;            // a peer's slot kept here
  bool replicated_layout = false;  // every rank's state is the same: any shard serves any rank
  bool file = false;               // this node sees it in the checkpoint directory; unverified
  bool share = false;    // of one state that is the same on every rank: restored from all shares
  Generation built = 0;  // a parity: the generation whose ParityPlan it is of; 0: none
  friend bool operator==(const HeldShard&, const HeldShard&) = default;
};

struct JobOnNode {
  JobId job;
  Generation generation = 0;
  bool activated = false;
  std::vector<WorkerOnNode> workers;
  std::vector<HeldShard> shards;
  friend bool operator==(const JobOnNode&, const JobOnNode&) = default;
};

// A roll-back's trace: what generations up to `generation` captured beyond `step` is never restored
// from again. Also names a checkpoint.
struct Cut {
  Generation generation = 0;
  Step step = kNoStep;
  friend bool operator==(const Cut&, const Cut&) = default;
};
inline bool Beyond(const Cut& cut, Generation generation, Step step) {
  return generation <= cut.generation && step > cut.step;
}

// Why a worker that is alive will not go on by itself. The numbers are the wire's.
enum class StallKind : std::uint8_t { kStopped = 1, kGroupNotFormed = 2 };

// --- a node's part of the plan of a generation ---

// A node that has a shard in its memory.
struct CutHolder {
  NodeId node;
  std::string address;  // host:port
  friend bool operator==(const CutHolder&, const CutHolder&) = default;
};

struct RestorePlan {
  Step step = kNoStep;
  Rank shard_rank = 0;
  Generation shard_generation = 0;
  std::uint32_t crc_root = 0;
  std::uint64_t bytes = 0;
  NodeId source_node;
  std::string source_address;  // host:port
  bool file = false;           // from the job's checkpoint directory
  // By byte ranges of the plan's RestoreCut; `bytes` is a guess then, and of the other fields only
  // step and shard_generation mean something.
  bool ranges = false;
  // 0: the source holds the bytes. Else it takes them itself and passes them on as they come, and
  // so many takers lie between this rank and a holder; it may run on this very node.
  std::uint32_t relay = 0;
  std::vector<CutHolder> others = {};  // holders to turn to when the source does not serve
  friend bool operator==(const RestorePlan&, const RestorePlan&) = default;
};

// Which ranks' shards share parities in a generation. Each group has one rank of each of its nodes,
// in the order of the code; a rank is in one group. checkpoint/core/parity_ranks.h: who holds what.
struct ParityPlan {
  std::uint32_t parity = 0;               // parities of a codeword: any so many nodes may go
  std::vector<std::vector<Rank>> groups;  // empty: shards are kept by copies
  friend bool operator==(const ParityPlan&, const ParityPlan&) = default;
};

// Every shard of one step: what a world of another size starts from.
struct CutShard {
  Rank rank = 0;  // that captured it
  std::uint32_t crc_root = 0;
  std::uint64_t bytes = 0;
  std::vector<CutHolder> holders;  // in memory
  bool file = false;               // in the job's checkpoint directory, for every member
  friend bool operator==(const CutShard&, const CutShard&) = default;
};
struct RestoreCut {
  Step step = kNoStep;
  Generation generation = 0;     // that captured it
  std::int32_t world_size = 0;   // likewise
  std::vector<CutShard> shards;  // by rank; empty: no restore is by ranges
  friend bool operator==(const RestoreCut&, const RestoreCut&) = default;
};

// A shard that a node makes out of others' bytes: a parity (its rank is of the world's size or
// beyond), or a lost one out of parities. It is kept as a replica.
struct ShardBuild {
  HeldShard shard;  // what is to come; crc_root 0: not known before it is there
  std::uint32_t parity = 0;
  std::vector<Rank> group;        // the code's ranks, in order
  std::vector<CutShard> sources;  // of the same step, shards and parities
  friend bool operator==(const ShardBuild&, const ShardBuild&) = default;
};

struct WorkerPlan {
  Rank rank = 0;
  std::int32_t local_rank = 0;
  RestorePlan restore;
  friend bool operator==(const WorkerPlan&, const WorkerPlan&) = default;
};

// A node that keeps copies of what another one's ranks capture.
struct PeerPlan {
  NodeId node;
  std::string address;  // host:port of its data plane
  friend bool operator==(const PeerPlan&, const PeerPlan&) = default;
};

struct NodePlan {
  NodeId node;
  std::int32_t group_rank = 0;
  std::string address;
  std::uint32_t data_port = 0;
  std::vector<WorkerPlan> workers;
  std::vector<PeerPlan> peers;  // one for each copy beside its own; empty: none
  friend bool operator==(const NodePlan&, const NodePlan&) = default;
};

// What the node reads from its checkpoint directory before its workers start, and how long that may
// take on a slow disk: 20 MB/s.
inline std::uint64_t FileRestoreBytes(const NodePlan& plan) {
  std::uint64_t bytes = 0;
  for (const WorkerPlan& w : plan.workers) bytes += w.restore.file ? w.restore.bytes : 0;
  return bytes;
}
inline Duration FileRestoreTime(std::uint64_t bytes) {
  return bytes == 0 ? Duration{}
                    : Seconds(30) + Milliseconds(static_cast<std::int64_t>(bytes / 20'000));
}

}  // namespace everstep
