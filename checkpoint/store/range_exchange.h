// What agent and trainer say to each other through a slot while a restore by ranges runs: the
// payloads of a slot with kFlagCatalog or kFlagRequest. Little-endian. A library of the trainer and
// the agent's data plane write and read them; docs/internals/arena.md draws them.
//
//   agent    catalog: CatalogHead, CatalogEntry of each shard, their tables
//   trainer  request: RequestHead, WantedRange (range_plan.h) of each range, the new table
//   agent    the state that was asked for: a slot as any other
//
// Header only; every number is checked against the payload before it is used.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/core/range_plan.h"
#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

inline constexpr std::uint64_t kCatalogMagic = 0x474C544143535645;  // "EVSCATLG"
inline constexpr std::uint64_t kRequestMagic = 0x5453455551535645;  // "EVSQUEST"
inline constexpr std::uint32_t kExchangeVersion = 1;

struct CatalogHead {
  std::uint64_t magic = kCatalogMagic;
  std::uint32_t version = kExchangeVersion;
  std::uint32_t shards = 0;  // of the old world, all of them
  std::int64_t step = -1;
  std::uint64_t generation = 0;  // that captured them
};
static_assert(sizeof(CatalogHead) == 32);

struct CatalogEntry {
  std::int32_t rank = 0;
  ShardTier tier = ShardTier::kPeer;  // where its bytes will come from
  std::uint64_t payload_bytes = 0;
  std::uint64_t table_at = 0;  // in the catalog
  std::uint64_t table_bytes = 0;
};
static_assert(sizeof(CatalogEntry) == 32);

struct RequestHead {
  std::uint64_t magic = kRequestMagic;
  std::uint32_t version = kExchangeVersion;
  std::uint32_t ranges = 0;
  std::uint64_t data_bytes = 0;  // of the new payload, without its table; a multiple of 64
  std::uint64_t table_bytes = 0;
  std::uint64_t catalog_seq = 0;  // the answer is to this sequence of the slot
  std::uint32_t flags = 0;        // of the new slot: kFlagReplicatedLayout or kFlagAssembled
  std::uint32_t reserved = 0;
};
static_assert(sizeof(RequestHead) == 48);

struct RangeRequest {
  RequestHead head;
  std::vector<WantedRange> ranges;
  std::string table;
};

// kInvalid: the payload is none, or is cut short.
inline Result<RangeRequest> ReadRequest(const unsigned char* payload, std::uint64_t bytes) {
  RangeRequest request;
  RequestHead& head = request.head;
  if (bytes < sizeof head) return Error{ErrorCode::kInvalid, "a request for ranges without a head"};
  std::memcpy(&head, payload, sizeof head);
  const std::uint64_t left = bytes - sizeof head;
  const std::uint64_t ranges = std::uint64_t{head.ranges} * sizeof(WantedRange);
  if (head.magic != kRequestMagic || head.version != kExchangeVersion || ranges > left ||
      head.table_bytes != left - ranges || head.data_bytes % 64 != 0) {
    return Error{ErrorCode::kInvalid,
                 "a request for ranges that makes no sense; use the package "
                 "and the agent of one release"};
  }
  request.ranges.resize(head.ranges);
  if (ranges > 0) std::memcpy(request.ranges.data(), payload + sizeof head, ranges);
  request.table.assign(reinterpret_cast<const char*>(payload) + sizeof head + ranges,
                       head.table_bytes);
  return request;
}

}  // namespace everstep::checkpoint
