// The data plane's wire: fixed little-endian structs over TCP (docs/internals/transfer.md). One
// connection carries one slot, or a part of one beside others.
//
//   client                                    server
//   Hello{nonce}                   ->
//                                  <-         Hello{nonce}
//   Request{op, slot, mac}         ->                          mac over both nonces and the request
//                                  <-         Response{status, slots held, mac}
//   push:  Table, CRCs, bits       ->                          what did not change since a slot
//   held
//                                  <-         Want, bits       the chunks that are lacking
//          Chunk, bytes ... Chunk{end} ->
//                                  <-         Ack{mac}
//   join:  Chunk, bytes ... Chunk{end} ->                      a further stream of a push that runs
//                                  <-         Ack{mac}
//   ahead: Chunk, bytes ... Chunk{end} ->                      of a capture that is not finished
//                                  <-         Ack{mac}
//   fetch:                         <-         Table, CRCs; Chunk, bytes ...
//   pick:                          <-         Table, CRCs(, bits)
//          Want, bits              ->                          the chunks that are wanted
//                                  <-         Chunk, bytes ... Chunk{end}
//
// The macs prove that both know the job's key. Bytes are checked by CRC32C, not hidden.
#pragma once

#include <cstdint>

#include "checkpoint/store/arena_layout.h"

namespace everstep::checkpoint {

inline constexpr std::uint32_t kFrameMagic = 0x52545645;  // "EVTR"
inline constexpr std::uint32_t kWantMagic = 0x57545645;   // "EVTW": an ack may come in its place
inline constexpr std::uint32_t kTransferVersion = 2;
inline constexpr std::uint32_t kNoBase = 0xFFFFFFFF;
inline constexpr std::uint32_t kEndOfChunks = 0xFFFFFFFF;

enum class Op : std::uint32_t {
  kPush = 1,
  kFetch = 2,
  kJoin = 3,
  kPick = 4,
  kFetchChecked = 5,  // once a chunk came damaged: was it the wire, or the source's memory?
  kFetchRelay = 6,    // as fetch, of what may be on its way to the source itself: it waits
  kAhead = 7,         // whole chunks of a capture under way; the push that follows says what counts
  kPickChanged = 8,   // as pick; its table says what is the same in the other slot that is held
};
constexpr bool IsOp(Op op) {
  return op >= Op::kPush && op <= Op::kPickChanged;
}

// 0: go on. Others end the connection.
enum class Status : std::uint32_t {
  kOk = 0,
  kHave = 1,     // push: these very bytes are here and verified already
  kStale = 2,    // an older generation or step than the receiver knows
  kUnknown = 3,  // no such job (yet), slot, or push to join
  kKey = 4,      // the mac is wrong
  kNoMemory = 5,
  kCorrupt = 6,  // a chunk or the root fails its CRC
  kBusy = 7,     // too many connections, overtaken by a newer one, or chunks are lacking still
  kInvalid = 8,
  kInternal = 9,
};

struct HelloFrame {
  std::uint32_t magic = kFrameMagic;
  std::uint32_t version = kTransferVersion;
  std::uint64_t nonce = 0;  // fresh random
};
static_assert(sizeof(HelloFrame) == 16);

struct RequestFrame {
  std::uint32_t magic = kFrameMagic;
  Op op = Op::kPush;
  char job[136] = {};                      // NUL-terminated
  std::uint64_t generation = 0;            // the sender's newest: the fence
  std::uint64_t committed_generation = 0;  // newest commit that the sender knows
  std::int64_t committed_step = -1;
  std::uint64_t first_chunk = 0;  // fetch: from here ...
  std::uint64_t end_chunk = 0;    // ... to before here; 0: to the last
  SlotFields fields;              // push: what comes; fetch: rank, generation, step wanted
  std::uint32_t crc_root = 0;
  std::uint32_t traffic = 0;  // TrafficClass; informs
  std::uint64_t mac = 0;
};
static_assert(sizeof(RequestFrame) == 272);

// A whole slot that the receiver of a push holds of the same rank.
struct HeldFrame {
  std::uint64_t generation = 0;
  std::int64_t step = -1;  // -1: none
  std::uint64_t captured_ns = 0;
  std::uint64_t payload_bytes = 0;
  std::uint32_t crc_root = 0;
  std::uint32_t reserved = 0;
};
static_assert(sizeof(HeldFrame) == 40);

struct ResponseFrame {
  std::uint32_t magic = kFrameMagic;
  Status status = Status::kOk;
  SlotFields fields;  // fetch: what comes
  std::uint32_t crc_root = 0;
  std::uint32_t reserved = 0;
  HeldFrame held[kSlots];  // push; pick of what changed: the first, beside what is picked from
  char message[152] = {};  // who, what, limit, when status is an error
  std::uint64_t mac = 0;
};
static_assert(sizeof(ResponseFrame) == 328);

// Then `chunks` CRCs of 4 bytes, which with the fields give crc_root; then, with a base, one bit
// for each chunk (BitmapBytes), the lowest of a byte first: this chunk is the same there.
struct TableFrame {
  std::uint32_t magic = kFrameMagic;
  std::uint32_t chunks = 0;
  std::uint32_t base = kNoBase;  // index into ResponseFrame::held
  std::uint32_t reserved = 0;
};
static_assert(sizeof(TableFrame) == 16);

// Then one bit for each chunk: it is to be sent.
struct WantFrame {
  std::uint32_t magic = kWantMagic;
  std::uint32_t chunks = 0;   // in all
  std::uint32_t wanted = 0;   // bits that are set
  std::uint32_t resumed = 0;  // arrived and verified on an earlier connection
};
static_assert(sizeof(WantFrame) == 16);

struct ChunkFrame {
  std::uint32_t magic = kFrameMagic;
  std::uint32_t index = 0;  // kEndOfChunks: nothing follows
  std::uint32_t bytes = 0;
  std::uint32_t crc = 0;  // as in the table
};
static_assert(sizeof(ChunkFrame) == 16);

struct AckFrame {
  std::uint32_t magic = kFrameMagic;
  Status status = Status::kOk;
  std::uint32_t chunk = 0;  // kCorrupt: which
  std::uint32_t crc_root = 0;
  char message[112] = {};
  std::uint64_t mac = 0;
};
static_assert(sizeof(AckFrame) == 136);

constexpr std::uint64_t BitmapBytes(std::uint64_t chunks) {
  return (chunks + 7) / 8;
}

}  // namespace everstep::checkpoint
