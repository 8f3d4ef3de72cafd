// The checkpoint plane of one agent: watches the local arenas, pushes captured slots to the plan's
// peer, receives peers' slots, fetches what a restore lacks, and tells the agent what happened.
//
// The agent's shell owns one. Every method is thread-safe and returns at once, but Survey (reads
// survey_bytes at most) and Stop. What happens is told through Listener, from the service's own
// threads: a listener only pushes to a mailbox.
//
//   trainer --slot, eventfd--> [watch] --Captured, Copied--> agent
//                                 |push
//                                 v
//                            peer's [serve] --Copied(replica)--> peer's agent
//
// It keeps no state that must outlive it: after a restart the agent calls Begin and Activate again
// with what the keeper remembered, and the arenas tell the rest.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/store/result.h"
#include "checkpoint/transfer/traffic.h"
#include "proto/base/ids.h"
#include "proto/base/plan.h"

namespace everstep::checkpoint {

struct ArenaFds {
  int memfd = -1;    // owned by the receiver of this struct
  int eventfd = -1;  // likewise; rung by the trainer after each capture
};
struct ArenaName {
  Rank rank = 0;
  bool replica = false;
  friend auto operator<=>(const ArenaName&, const ArenaName&) = default;
};

// The keeper's arenas (KeeperArena), as the agent can reach them. Called from the service's
// threads, also several at once; each call blocks for a bounded time (say 5 s).
class ArenaHost {
 public:
  virtual ~ArenaHost() = default;
  // What the keeper holds of the job.
  virtual Result<std::vector<ArenaName>> List(const JobId& job) = 0;
  // Opens the arena, making it with room for slot_bytes a slot when it is not there. An arena that
  // is there is handed out as it is, whatever its size: the service grows it itself. slot_bytes 0:
  // only when it is there, else kNotFound.
  virtual Result<ArenaFds> Open(const JobId& job, const ArenaName& name,
                                std::uint64_t slot_bytes) = 0;
  virtual void Drop(const JobId& job, const ArenaName& name) = 0;
};

class Listener {
 public:
  virtual ~Listener() = default;
  // A local rank captured a step (event StepCaptured of the agent's core).
  virtual void OnCaptured(const JobId& job, Generation generation, Rank rank, Step step) = 0;
  // This node verified and holds a copy: its own capture or a peer's (event ShardCopied).
  virtual void OnCopied(const JobId& job, const HeldShard& shard) = 0;
  // A copy here, its own capture or a peer's, fails its checksum (event ShardDamaged): the first
  // bad chunk, -1 for the table of checksums. Said each time it is found so. `by`: "scrub",
  // "survey" or "push".
  virtual void OnDamaged(const JobId& /*job*/, const HeldShard& /*shard*/, std::int64_t /*chunk*/,
                         const char* /*by*/) {}
  // A slot could not be pushed, fetched or verified; for the log. The service goes on by itself.
  virtual void OnTrouble(const JobId& job, const std::string& what) = 0;
};

struct RestorePart {
  Step step = kNoStep;  // kNoStep: starts from nothing
  Rank shard_rank = 0;
  Generation shard_generation = 0;
  std::uint32_t crc_root = 0;
  std::uint64_t bytes = 0;
  std::string source_address;  // host:port of a data plane; empty or this node's own: local memory
  // Takers between this rank and a holder: the source takes these bytes itself and passes them on,
  // and may be this very node. 0: it holds them.
  std::uint32_t relay = 0;
  std::vector<std::string> others = {};  // host:port of holders, when the source does not serve
  // By ranges of these shards, as the trainer asks for them; of the fields above only `step`
  // means something then. Null: a whole shard.
  std::shared_ptr<const RestoreCut> cut;
  std::int32_t world_size = 0;  // of the new generation
  std::string directory;        // the job's file tier; empty: none
};
struct WorkerPart {
  Rank rank = 0;
  RestorePart restore;
};
// This node's part of an activated generation.
struct Part {
  JobId job;
  Generation generation = 0;
  std::int32_t world_size = 0;
  std::string data_key;
  std::vector<WorkerPart> workers;
  std::vector<std::string> peers;  // host:port each; every capture goes to all of them
  bool kept_by_parity = false;     // other nodes make parities of every capture instead
  Step committed_step = kNoStep;
  std::vector<Cut> given_up;  // slots beyond are torn before anything else
};

// The scrubber (scrubber.h).
struct ScrubOptions {
  std::uint64_t bytes_per_s = 64u << 20;   // read at most so fast; 0: nothing is looked over
  std::chrono::milliseconds every{60000};  // one content is looked at once in this time
};
struct ScrubReport {  // since the service started
  std::uint64_t checked_bytes = 0;
  std::uint64_t checked_slots = 0;
  std::uint64_t damaged = 0;   // contents found damaged, whoever looked
  std::uint64_t repaired = 0;  // ... and put right
};

struct TransferOptions {
  std::string bind_address = "127.0.0.1";
  std::uint16_t port = 0;  // 0: any
  int push_threads = 2;
  int streams = 2;  // connections for one slot at most; small ones take fewer
  // A capture at least so large that says how far it is (capture_word.h) is sent as it is written.
  std::uint64_t ahead_bytes = 16 << 20;
  int max_connections = 64;  // beyond: refused, the peer tries again
  std::uint64_t max_payload_bytes = std::uint64_t{1} << 40;
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds io_timeout{
      5000};  // no byte moved for so long: the connection is given up
  std::chrono::milliseconds retry_first{50};  // doubles up to retry_last
  std::chrono::milliseconds retry_last{1000};
  // A source that receives itself is given so long without a byte, a quarter more for each taker
  // between it and a holder (who is nearest to what fails finds it first), and this least rate;
  // then another is asked for what lacks.
  std::chrono::milliseconds relay_timeout{1000};
  std::uint64_t relay_bytes_per_second = 8u << 20;
  // A fetch, all attempts together: so long, and RestoreMillis of its bytes.
  std::chrono::milliseconds restore_timeout{120000};
  // A survey reads the payloads of so many bytes of slots, in all; of what lies there beyond,
  // headers and tables of checksums alone, or gigabytes would outlast the controller's patience
  // with a node.
  std::uint64_t survey_bytes = 256u << 20;
  PacerOptions pacing;
  ScrubOptions scrub;
};

class ShardFiles;  // chunk_taker.h

class TransferService {
 public:
  // Binds and starts its threads. `host`, `listener` and `files` must outlive the service. `files`:
  // reads shards from the jobs' checkpoint directories; null: restores by ranges do without.
  static Result<std::unique_ptr<TransferService>> Start(const TransferOptions& options,
                                                        ArenaHost* host, Listener* listener,
                                                        ShardFiles* files = nullptr);
  virtual ~TransferService() = default;  // as Stop()

  virtual std::uint16_t port() const = 0;

  // At Prepare: from here on, pushes of older generations are refused and nothing of an older one
  // is pushed. data_key: what peers must prove to know.
  virtual void Begin(const JobId& job, Generation generation, const std::string& data_key) = 0;

  // What lies whole in this node's memory of the job (effect Survey). Payloads beyond survey_bytes
  // are not read: they were checked as they came, and whoever takes them checks them again. What
  // turns out damaged then is left out from then on.
  virtual std::vector<HeldShard> Survey(const JobId& job) = 0;

  // The rank's worker of this generation had no chance: what it was to start from could not be
  // brought here, or failed its check in its hands. False as well when that is not known.
  virtual bool RestoreFailed(const JobId& job, Generation generation, Rank rank) const = 0;

  // At Activate, before the workers are forked: marks each local rank's arena as "restore pending"
  // of this generation (so that a worker waits for its bytes), fetches in the background, then
  // watches the arenas and pushes what is captured. False with *error: an arena could not be made;
  // the workers must not be forked. After an agent's restart call it again with the same part: a
  // generation whose restore is done is only watched again. Blocks for the arenas of the local
  // ranks alone.
  virtual bool Activate(const Part& part, std::string* error) = 0;

  // Effect MendShard: a copy here is damaged, `source_address` (host:port of a data plane) has
  // these very bytes. Listener::OnCopied follows when it is whole again.
  virtual void Mend(const JobId& job, const HeldShard& shard,
                    const std::string& source_address) = 0;

  // Effect MakeShard: a parity of what other nodes captured, or a lost shard out of parities, is to
  // be made here and kept as a replica. Listener::OnCopied follows when it is there (again); the
  // order ends with `generation`.
  virtual void Make(const JobId& job, Generation generation, const ShardBuild& build) = 0;

  // Effect MarkCommitted, ControllerAway, ForgetJob (the keeper's arenas are the caller's to drop).
  virtual void MarkCommitted(const JobId& job, Generation generation, Step step) = 0;
  // The controller gave up steps up to `step` of `generation` (a restore's source: its own
  // generation) that are not committed: trainers may overwrite them.
  virtual void MarkReleased(const JobId& job, Generation generation, Step step) = 0;
  virtual void SetControllerAway(bool away) = 0;
  virtual void Forget(const JobId& job) = 0;

  // The keeper died: every descriptor is of a dead arena. As Forget for all jobs, keys are kept.
  virtual void KeeperGone() = 0;

  // Who else moves checkpoint bytes on this node asks it first; what was moved so far.
  virtual Traffic* traffic() = 0;
  virtual ScrubReport scrubbed() const = 0;

  // Ends every connection and joins every thread; at most a second or two.
  virtual void Stop() = 0;
};

}  // namespace everstep::checkpoint
