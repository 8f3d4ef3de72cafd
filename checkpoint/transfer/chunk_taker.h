// Some chunks of a held slot, wherever it lies: each is handed on whole and verified, in memory
// that is the reader's own for as long as the call lasts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"

namespace everstep::checkpoint {

class ChunkTaker {
 public:
  virtual ~ChunkTaker() = default;
  // Once an attempt, when the slot's fields are known and checked: the chunks that lack still,
  // ascending.
  virtual std::vector<std::uint32_t> Lacks(const SlotFields& fields) = 0;
  // False: what it is for was given up; the reader ends with kStale.
  virtual bool Take(std::uint32_t chunk, const unsigned char* data, std::uint32_t bytes) = 0;
};
Error GivenUp(const std::string& source);

// What identifies a held slot: its fields (rank, generation, step; payload_bytes) and its checksum.
struct SlotName {
  JobId job;
  SlotFields fields;
  std::uint32_t crc_root = 0;
  std::string Text() const;  // "step 7 of rank 2"
};
// The fields that some holder answers with are those of `name`.
Outcome CheckNamed(const SlotName& name, const SlotFields& fields, std::uint32_t crc_root,
                   const std::string& holder);

// From an arena of this node. kNotFound: its slots hold something else. kStale: overwritten
// meanwhile; what was taken is right all the same.
Outcome ReadChunks(Arena* arena, const SlotName& name, ChunkTaker* taker);

// From a peer: one connection, one attempt. Maps nothing.
Outcome PickChunks(const PeerTask& task, const SlotName& name, ChunkTaker* taker);

// Which chunks of the named slot lie in `older` as well, another content of that rank which the
// same holder has: one bit each, compared there byte by byte. Empty: none, or it has `older` no
// more.
Result<Bitmap> FindSame(Arena* arena, const SlotName& name, const SlotName& older);
Result<Bitmap> PickSame(const PeerTask& task, const SlotName& name, const SlotName& older);

// The job's checkpoint directory as the data plane reads it. Thread-safe; blocks on the disk.
class ShardFiles {
 public:
  virtual ~ShardFiles() = default;
  virtual Outcome Read(const std::string& directory, const SlotName& name, ChunkTaker* taker) = 0;
};

}  // namespace everstep::checkpoint
