// The data plane's wire: fixed little-endian structs over TCP (docs/internals/transfer.md). One
// connection carries one slot.
//
//   client                              server
//   Hello{nonce}              ->
//                             <-        Hello{nonce}
//   Request{op, slot, mac}    ->                           mac over both nonces and the request
//                             <-        Response{status, first chunk, mac}
//   push:  Chunk, bytes ...   ->
//                             <-        Ack
//   fetch:                    <-        Chunk, bytes ...; Ack
//
// The macs prove that both know the job's key. Bytes are checked by CRC32C, not hidden.
#pragma once

#include <cstdint>

#include "checkpoint/store/arena_layout.h"

namespace everstep::checkpoint {

inline constexpr std::uint32_t kFrameMagic = 0x52545645;  // "EVTR"
inline constexpr std::uint32_t kTransferVersion = 1;

enum class Op : std::uint32_t { kPush = 1, kFetch = 2 };

// 0: go on. Others end the connection.
enum class Status : std::uint32_t {
  kOk = 0,
  kHave = 1,     // push: these very bytes are here and verified already
  kStale = 2,    // an older generation or step than the receiver knows
  kUnknown = 3,  // no such job (yet) or slot
  kKey = 4,      // the mac is wrong
  kNoMemory = 5,
  kCorrupt = 6,  // a chunk or the root fails its CRC
  kBusy = 7,     // too many connections, or overtaken by a newer one
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
  std::uint64_t first_chunk = 0;  // fetch: resume here
  SlotFields fields;              // push: what comes; fetch: rank, generation, step wanted
  std::uint32_t crc_root = 0;
  std::uint32_t reserved = 0;
  std::uint64_t mac = 0;
};
static_assert(sizeof(RequestFrame) == 264);

struct ResponseFrame {
  std::uint32_t magic = kFrameMagic;
  Status status = Status::kOk;
  std::uint64_t first_chunk = 0;  // push: resume here
  SlotFields fields;              // fetch: what comes
  std::uint32_t crc_root = 0;
  std::uint32_t reserved = 0;
  char message[152] = {};  // who, what, limit, when status is an error
  std::uint64_t mac = 0;
};
static_assert(sizeof(ResponseFrame) == 256);

struct ChunkFrame {
  std::uint32_t magic = kFrameMagic;
  std::uint32_t index = 0;
  std::uint32_t bytes = 0;
  std::uint32_t crc = 0;
};
static_assert(sizeof(ChunkFrame) == 16);

struct AckFrame {
  std::uint32_t magic = kFrameMagic;
  Status status = Status::kOk;
  std::uint32_t chunk = 0;  // kCorrupt: which
  std::uint32_t crc_root = 0;
  char message[112] = {};
};
static_assert(sizeof(AckFrame) == 128);

}  // namespace everstep::checkpoint
