// The bytes of an arena: one memfd per rank (docs/internals/arena.md draws it).
//
//   0            ArenaHeader      kArenaHeaderBytes, its two SlotHeaders included
//   extent 0     payload of slot 0, then its chunk CRCs
//   extent 1     payload of slot 1, then its chunk CRCs
//
// An extent may lie anywhere behind the header: a slot that must grow gets a new extent at the end
// of the file and the old one's memory is given back. The file never shrinks (sealed), so that no
// reader can be ended by SIGBUS.
//
// Little-endian, format version 1. Who writes what stands at each field. Words that two processes
// share are read and written through the atomics below or under a seqlock: an odd sequence means
// "being written", an even one names one finished content and never comes back.
#pragma once

#include <atomic>
#include <cstdint>

namespace everstep::checkpoint {

inline constexpr std::uint64_t kArenaMagic = 0x414E455241535645;  // "EVSARENA"
inline constexpr std::uint32_t kArenaVersion = 1;
inline constexpr std::uint64_t kArenaHeaderBytes = 8192;
inline constexpr std::uint32_t kSlots = 2;
inline constexpr std::uint32_t kChunkBytes = 1u << 20;  // one CRC each; the unit of transfer
inline constexpr std::uint64_t kTensorAlignment = 64;
inline constexpr std::uint64_t kPageBytes = 4096;
inline constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{1} << 44;  // 16 TiB; a sanity bound

// What a slot holds. Covered by crc_root and sent to peers as it is.
struct SlotFields {
  std::uint64_t generation = 0;  // that captured it
  std::int64_t step = -1;
  std::int32_t rank = 0;  // that captured it
  std::int32_t world_size = 0;
  std::uint32_t flags = 0;  // kFlag...
  std::uint32_t chunk_bytes = kChunkBytes;
  std::uint64_t payload_bytes = 0;  // tensors, then the table
  std::uint64_t table_offset = 0;   // in the payload; the table ends the payload
  std::uint64_t table_bytes = 0;
  std::uint64_t captured_ns = 0;  // wall clock of the node, when the capture began
  std::uint32_t job_crc = 0;      // CRC32C of the job's id
  // A parity over other ranks' states: the generation whose groups it is of. 0: a rank's state.
  std::uint32_t built = 0;
};
static_assert(sizeof(SlotFields) == 72);
inline constexpr std::uint32_t kFlagReplicatedLayout = 1;  // every rank's state is the same (DDP)
// Every rank's state is the same and this is its share of it: a rank is restored from the slots of
// all ranks, by ranges, also in a world of the same size.
inline constexpr std::uint32_t kFlagShare = 8;
// No state, but what agent and trainer say to each other in a slot while a restore by ranges runs
// (range_exchange.h). Nobody else sees such a slot: Arena::Look takes it for one that is not whole.
inline constexpr std::uint32_t kFlagCatalog = 2;  // agent: the shards there are, with their tables
inline constexpr std::uint32_t kFlagRequest = 4;  // trainer: the ranges it wants, and its table
// What came of a request that asked for it: the whole state, put together for this rank's trainer
// alone, who captures its own shard of it (kFlagShare) next.
inline constexpr std::uint32_t kFlagAssembled = 16;
inline constexpr std::uint32_t kFlagsExchange = kFlagCatalog | kFlagRequest | kFlagAssembled;

struct alignas(64) SlotHeader {
  // Writer: the trainer for its own arena, the agent while it fills one. 0: never written.
  std::atomic<std::uint64_t> seq;
  std::uint64_t extent_offset;  // in the file; moves only while seq is odd
  std::uint64_t extent_bytes;   // 0: no memory yet
  SlotFields fields;
  std::uint32_t crc_root;  // CRC32C of `fields`, then of the chunk CRCs as they lie
  std::uint32_t reserved;
  // Agent: equal to seq when this very content ...
  alignas(64) std::atomic<std::uint64_t> committed_seq;  // ... is committed
  std::atomic<std::uint64_t> replicated_seq;             // ... was verified by the peer
  std::atomic<std::uint64_t> pushing_seq;                // ... is on its way; cleared when it ends
  std::atomic<std::uint64_t> released_seq;               // ... will not be committed any more
  // ... is being put right in place: who tears the slot waits for it (checkpoint/store/mend.h).
  std::atomic<std::uint64_t> mending_seq;
  // Whoever checks it, trainer or agent: equal to seq when the bytes failed (Arena::Verify).
  std::atomic<std::uint64_t> damaged_seq;
};
static_assert(sizeof(SlotHeader) == 192);

enum class RestoreState : std::uint32_t {
  kNone = 0,     // no agent has spoken yet
  kPending = 1,  // bytes are on their way
  kReady = 2,    // in slot `slot` with sequence `slot_seq`
  kFresh = 3,    // start from nothing
  kFailed = 4,   // see message
  kAsk = 5,      // a catalog lies in slot `slot`: the trainer writes its request over it
};

struct alignas(64) RestoreWord {  // agent, under seq
  std::atomic<std::uint64_t> seq;
  std::uint64_t generation;  // that it is meant for; a worker of another one waits
  std::uint32_t state;       // RestoreState
  std::uint32_t slot;
  std::uint64_t slot_seq;  // kPending: payload bytes on their way
  std::int64_t step;
  char message[216];
};
static_assert(sizeof(RestoreWord) == 256);

struct alignas(64) AgentWord {                  // agent
  std::atomic<std::uint64_t> fence_generation;  // captures of older generations are refused
  std::atomic<std::int64_t> beat_ns;            // CLOCK_MONOTONIC of its newest look; 0: never
  std::atomic<std::int64_t> committed_step;     // newest known; informs only
  std::atomic<std::int64_t> released_step;  // up to it, what the fence's generation captured and is
                                            // not committed will not be any more; -1: none
  std::atomic<std::uint32_t> has_peer;      // captured slots are pushed to one
  std::atomic<std::uint32_t> controller_away;  // no commits can be had
};
static_assert(sizeof(AgentWord) == 64);

struct alignas(64) TrainerWord {  // trainer
  std::atomic<std::uint64_t> generation;
  std::atomic<std::int64_t> step;       // newest reported by step(n); -1: none
  std::atomic<std::uint64_t> captured;  // counts, since the process attached
  std::atomic<std::uint64_t> skipped;
  std::atomic<std::uint64_t> replaced;   // an uncommitted slot gave way to a newer step
  std::atomic<std::uint64_t> waited_ns;  // for commits
  std::atomic<std::uint64_t> copy_ns;
  std::atomic<std::int32_t> pid;
  std::int32_t reserved;
};
static_assert(sizeof(TrainerWord) == 64);

struct ArenaHeader {
  // Keeper, when it makes the arena.
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t header_bytes;
  char job[136];  // NUL-terminated
  std::int32_t rank;
  std::uint32_t replica;  // holds a peer's slots
  char reserved[32];

  AgentWord agent;
  TrainerWord trainer;
  RestoreWord restore;
  SlotHeader slot[kSlots];
};
static_assert(sizeof(ArenaHeader) == 192 + 64 + 64 + 256 + 2 * 192);
static_assert(sizeof(ArenaHeader) <= kArenaHeaderBytes);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// How much longer a restore may take than an empty one (120 s; TransferOptions, everstep_restore):
// 100 MB/s, what a slow network moves. Both the agent that fetches and the trainer that waits go by
// it.
constexpr std::uint64_t RestoreMillis(std::uint64_t payload_bytes) {
  return payload_bytes / 100'000;
}

constexpr std::uint64_t RoundUp(std::uint64_t n, std::uint64_t to) {
  return (n + to - 1) / to * to;
}
constexpr std::uint64_t ChunkCount(std::uint64_t payload_bytes) {
  return (payload_bytes + kChunkBytes - 1) / kChunkBytes;
}
// An extent: payload from its first byte (so that huge pages fit), chunk CRCs in its last pages.
constexpr std::uint64_t CrcAreaBytes(std::uint64_t extent_bytes) {
  return RoundUp(4 * ChunkCount(extent_bytes), kPageBytes);
}
constexpr std::uint64_t ExtentCapacity(std::uint64_t extent_bytes) {
  return extent_bytes < 2 * kPageBytes ? 0 : extent_bytes - CrcAreaBytes(extent_bytes);
}
// The smallest extent whose capacity is at least `payload_bytes`.
constexpr std::uint64_t ExtentBytes(std::uint64_t payload_bytes) {
  std::uint64_t bytes = RoundUp(payload_bytes == 0 ? 1 : payload_bytes, kPageBytes);
  bytes += CrcAreaBytes(bytes);
  while (ExtentCapacity(bytes) < payload_bytes) bytes += kPageBytes;
  return bytes;
}

}  // namespace everstep::checkpoint
