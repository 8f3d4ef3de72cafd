#include "checkpoint/codec/shard_recipe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "checkpoint/core/parity_ranks.h"
#include "checkpoint/core/redundancy.h"
#include "proto/base/check.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint32_t kTableMagic = 0x54505645;  // "EVPT"

struct TableHeader {
  std::uint32_t magic = kTableMagic;
  std::uint32_t members = 0;
};
static_assert(sizeof(TableHeader) == 8);

constexpr std::uint64_t TableBytes(std::uint64_t members) {
  return sizeof(TableHeader) + members * sizeof(ParityMember);
}

Error Senseless(const ShardBuild& build, const std::string& what) {
  return {ErrorCode::kInvalid, fmt::format("the order to make rank {} of step {}: {}",
                                           build.shard.rank, build.shard.step, what)};
}

const CutShard* Find(const ShardBuild& build, Rank rank) {
  const auto it = std::find_if(build.sources.begin(), build.sources.end(),
                               [rank](const CutShard& s) { return s.rank == rank; });
  return it == build.sources.end() ? nullptr : &*it;
}

// Of the piece itself, which is shorter than its chunks when it ends the shard.
std::uint64_t PieceBytes(std::uint64_t bytes, const Piece& piece) {
  return std::min(piece.end * kChunkBytes, bytes) - std::min(piece.first * kChunkBytes, bytes);
}

std::optional<std::uint32_t> IndexOf(const std::vector<Rank>& ranks, Rank rank) {
  const auto it = std::find(ranks.begin(), ranks.end(), rank);
  if (it == ranks.end()) return std::nullopt;
  return static_cast<std::uint32_t>(it - ranks.begin());
}

}  // namespace

std::vector<unsigned char> PrintParityTable(const std::vector<ParityMember>& members) {
  const TableHeader header{.members = static_cast<std::uint32_t>(members.size())};
  std::vector<unsigned char> out(TableBytes(members.size()));
  std::memcpy(out.data(), &header, sizeof header);
  if (!members.empty()) {
    std::memcpy(out.data() + sizeof header, members.data(), members.size() * sizeof members[0]);
  }
  return out;
}

Result<std::vector<ParityMember>> ReadParityTable(std::span<const unsigned char> table) {
  TableHeader header;
  if (table.size() < sizeof header) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("a parity's table of {} bytes has no header", table.size())};
  }
  std::memcpy(&header, table.data(), sizeof header);
  if (header.magic != kTableMagic || header.members > kMostShards * 2 + kMostParity ||
      table.size() != TableBytes(header.members)) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("{} bytes are no parity's table of {} shards (magic {:08x})",
                             table.size(), header.members, header.magic)};
  }
  std::vector<ParityMember> members(header.members);
  if (!members.empty()) {
    std::memcpy(members.data(), table.data() + sizeof header, members.size() * sizeof members[0]);
  }
  return members;
}

Result<ShardRecipe> ShardRecipe::Of(const ShardBuild& build) {
  const HeldShard& shard = build.shard;
  const std::int32_t world = shard.world_size;
  if (build.parity == 0 || build.parity >= build.group.size() || build.group.size() > 256 ||
      world <= 0 || world > INT32_MAX / static_cast<std::int32_t>(build.parity + 2) ||
      shard.rank < 0) {
    return Senseless(build, fmt::format("{} parities in a group of {}, a world of {}", build.parity,
                                        build.group.size(), world));
  }
  for (const Rank rank : build.group) {
    if (rank < 0 || rank >= world || std::count(build.group.begin(), build.group.end(), rank) > 1) {
      return Senseless(build, fmt::format("rank {} in its group, of a world of {}", rank, world));
    }
  }
  for (const CutShard& source : build.sources) {
    if (source.holders.empty() || source.bytes > kMaxPayloadBytes || source.rank == shard.rank) {
      return Senseless(build, fmt::format("rank {} with {} bytes and {} holders as a source",
                                          source.rank, source.bytes, source.holders.size()));
    }
  }
  return IsParity(shard.rank, world) ? OfParity(build) : OfLost(build);
}

Result<ShardRecipe> ShardRecipe::OfParity(const ShardBuild& build) {
  const Rank wanted = build.shard.rank;
  for (const Codeword& word : CodewordsOf(build.group, build.parity, build.shard.world_size)) {
    const auto number = IndexOf(word.parities, wanted);
    if (!number) continue;
    const auto k = static_cast<std::uint32_t>(word.members.size());
    ShardRecipe out;
    out.code_.emplace(k, build.parity);
    out.number_ = *number;
    for (std::uint32_t j = 0; j < k; ++j) {
      const CutShard* source = Find(build, word.members[j]);
      if (source == nullptr) {
        return Error{ErrorCode::kNotFound, fmt::format("parity {} of step {}: nobody offers rank "
                                                       "{}, which it covers",
                                                       wanted, build.shard.step, word.members[j])};
      }
      const Piece piece = PieceOf(ChunkCount(source->bytes), k, j);
      out.data_bytes_ = std::max(out.data_bytes_, PieceBytes(source->bytes, piece));
      out.AddTerm(*source, {.first = piece.first, .count = piece.end - piece.first, .index = j});
    }
    out.payload_bytes_ = RoundUp(out.data_bytes_, kTensorAlignment) + TableBytes(k);
    return out;
  }
  return Senseless(build, "no row of the group has that parity");
}

Result<ShardRecipe> ShardRecipe::OfLost(const ShardBuild& build) {
  const HeldShard& shard = build.shard;
  ShardRecipe out;
  out.payload_bytes_ = out.data_bytes_ = shard.bytes;
  if (shard.bytes > kMaxPayloadBytes) {
    return Senseless(build, fmt::format("{} bytes are to come", shard.bytes));
  }
  const CutShard* table = nullptr;
  for (const Codeword& word : CodewordsOf(build.group, build.parity, shard.world_size)) {
    const auto column = IndexOf(word.members, shard.rank);
    if (!column) continue;
    const auto k = static_cast<std::uint32_t>(word.members.size());
    std::vector<std::uint32_t> lost, parities;
    for (std::uint32_t j = 0; j < k; ++j) {
      if (Find(build, word.members[j]) == nullptr) lost.push_back(j);
    }
    for (std::uint32_t p = 0; p < build.parity; ++p) {
      if (Find(build, word.parities[p]) != nullptr) parities.push_back(p);
    }
    const auto lacking = lost.size();
    const auto at_hand = parities.size();
    auto decoder =
        ParityDecoder::Make(ParityCode(k, build.parity), std::move(lost), std::move(parities));
    if (!decoder) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("rank {} of step {} cannot be made anew: {} shards of its row are "
                               "lost, {} parities are left",
                               shard.rank, shard.step, lacking, at_hand)};
    }
    if (table == nullptr) table = Find(build, word.parities[decoder->parities().front()]);
    const Piece piece = PieceOf(ChunkCount(shard.bytes), k, *column);
    const std::uint64_t chunks = piece.end - piece.first;
    if (chunks == 0) continue;
    const std::size_t number = out.words_.size();
    for (std::uint32_t j = 0; j < k; ++j) {
      const CutShard* source = Find(build, word.members[j]);
      if (source == nullptr) continue;
      const Piece theirs = PieceOf(ChunkCount(source->bytes), k, j);
      out.AddTerm(*source, {.first = theirs.first,
                            .count = std::min(chunks, theirs.end - theirs.first),
                            .to = piece.first,
                            .word = number,
                            .index = j});
    }
    for (const std::uint32_t p : decoder->parities()) {
      const CutShard* source = Find(build, word.parities[p]);
      const std::uint64_t theirs = ChunkCount(source->bytes);
      out.AddTerm(*source, {.first = 0,
                            .count = std::min(chunks, theirs),
                            .to = piece.first,
                            .word = number,
                            .index = p,
                            .parity = true});
    }
    const auto at = std::find(decoder->lost().begin(), decoder->lost().end(), *column);
    EVERSTEP_CHECK(at != decoder->lost().end());
    const auto index = static_cast<std::uint32_t>(at - decoder->lost().begin());
    out.words_.push_back({std::move(*decoder), index});
  }
  if (table == nullptr) return Senseless(build, "no row of the group covers that rank");
  out.table_source_ = out.SourceOf(*table);
  return out;
}

std::size_t ShardRecipe::SourceOf(const CutShard& shard) {
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    if (sources_[i].shard.rank == shard.rank) return i;
  }
  sources_.push_back({shard, {}});
  terms_.emplace_back();
  return sources_.size() - 1;
}

void ShardRecipe::AddTerm(const CutShard& shard, const Term& term) {
  const std::size_t source = SourceOf(shard);
  if (term.count == 0) return;
  terms_[source].push_back(term);
  std::vector<std::uint32_t>& chunks = sources_[source].chunks;
  chunks.reserve(chunks.size() + term.count);
  for (std::uint64_t i = 0; i < term.count; ++i) {
    chunks.push_back(static_cast<std::uint32_t>(term.first + i));
  }
  std::sort(chunks.begin(), chunks.end());
}

const ShardRecipe::Term& ShardRecipe::TermOf(std::size_t source, std::uint32_t chunk) const {
  EVERSTEP_CHECK(source < terms_.size());
  const auto term = std::find_if(terms_[source].begin(), terms_[source].end(), [&](const Term& t) {
    return chunk >= t.first && chunk - t.first < t.count;
  });
  EVERSTEP_CHECK(term != terms_[source].end());  // a chunk that was not asked for
  return *term;
}

std::uint64_t ShardRecipe::PayloadChunk(std::size_t source, std::uint32_t chunk) const {
  const Term& term = TermOf(source, chunk);
  return term.to + chunk - term.first;
}

void ShardRecipe::Add(std::size_t source, std::uint32_t chunk, std::span<const std::byte> from,
                      std::byte* payload) const {
  const Term& term = TermOf(source, chunk);
  const std::uint64_t at = (term.to + chunk - term.first) * kChunkBytes;
  EVERSTEP_CHECK(at < data_bytes_);
  // What comes beyond a shard that is shorter than its parity is zeros, or the parity's table.
  const auto piece = from.first(std::min<std::uint64_t>(from.size(), data_bytes_ - at));
  if (code_) {
    code_->Add(number_, term.index, piece, payload + at);
  } else if (term.parity) {
    words_[term.word].decoder.AddParity(words_[term.word].lost, term.index, piece, payload + at);
  } else {
    words_[term.word].decoder.AddShard(words_[term.word].lost, term.index, piece, payload + at);
  }
}

}  // namespace everstep::checkpoint
