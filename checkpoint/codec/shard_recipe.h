// How a shard is made out of others: which chunks of which of them, times what, to which place. A
// parity out of its codeword's shards; a lost shard out of what is left of its codewords. Pure.
//
//   parity p of a row   = sum over its members' pieces          payload: the sum, then a table
//   lost shard, piece j = sum over what is left of j's row      payload: as it was captured
//
// The table of a parity tells what each member's slot was besides its bytes, so that a lost one
// comes back with the very header, and so with the checksum that was committed
// (docs/internals/arena.md draws it). Which rows there are: checkpoint/core/parity_ranks.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "checkpoint/codec/parity_code.h"
#include "checkpoint/store/arena_layout.h"
#include "checkpoint/store/result.h"
#include "proto/base/plan.h"

namespace everstep::checkpoint {

// What a parity's table says of each shard under it, by column.
struct ParityMember {
  SlotFields fields;
  std::uint32_t crc_root = 0;
  std::uint32_t reserved = 0;
};
static_assert(sizeof(ParityMember) == 80);
std::vector<unsigned char> PrintParityTable(const std::vector<ParityMember>& members);
// kInvalid: it is no such table. Takes bytes from anywhere.
Result<std::vector<ParityMember>> ReadParityTable(std::span<const unsigned char> table);

class ShardRecipe {
 public:
  struct Source {
    CutShard shard;
    std::vector<std::uint32_t> chunks;  // that are added, ascending
  };

  // kInvalid: the order makes no sense. kNotFound: what is left does not suffice.
  static Result<ShardRecipe> Of(const ShardBuild& build);

  bool makes_parity() const { return code_.has_value(); }
  const std::vector<Source>& sources() const { return sources_; }
  // Of the shard that is made; behind data_bytes lies a parity's table, aligned.
  std::uint64_t payload_bytes() const { return payload_bytes_; }
  std::uint64_t data_bytes() const { return data_bytes_; }
  // A lost shard: index into sources() of a parity whose table has it.
  std::size_t table_source() const { return table_source_; }

  // The chunk of the payload that a chunk of a source, one of its `chunks`, is added to.
  std::uint64_t PayloadChunk(std::size_t source, std::uint32_t chunk) const;
  // Adds a chunk of a source, one of its `chunks`, to the payload that is made, which was zeros in
  // the beginning. Once each, in any order; several at a time if they go to different chunks.
  void Add(std::size_t source, std::uint32_t chunk, std::span<const std::byte> from,
           std::byte* payload) const;

 private:
  // Chunks [first, first + count) of a source go to chunks [to, ...) of the payload.
  struct Term {
    std::uint64_t first = 0, count = 0, to = 0;
    std::size_t word = 0;     // a lost shard: index into words_
    std::uint32_t index = 0;  // column, or number of the parity
    bool parity = false;
  };
  struct Word {
    ParityDecoder decoder;
    std::uint32_t lost = 0;  // index of the shard into decoder.lost()
  };

  static Result<ShardRecipe> OfParity(const ShardBuild& build);
  static Result<ShardRecipe> OfLost(const ShardBuild& build);
  const Term& TermOf(std::size_t source, std::uint32_t chunk) const;
  std::size_t SourceOf(const CutShard& shard);  // made when it is not there
  void AddTerm(const CutShard& shard, const Term& term);

  std::optional<ParityCode> code_;  // a parity
  std::uint32_t number_ = 0;        // ... which
  std::vector<Word> words_;         // a lost shard
  std::vector<Source> sources_;
  std::vector<std::vector<Term>> terms_;  // by source
  std::uint64_t payload_bytes_ = 0;
  std::uint64_t data_bytes_ = 0;
  std::size_t table_source_ = 0;
};

}  // namespace everstep::checkpoint
