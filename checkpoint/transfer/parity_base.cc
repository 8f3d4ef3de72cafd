#include "checkpoint/transfer/parity_base.h"

#include <algorithm>
#include <utility>

#include "checkpoint/store/fence.h"
#include "checkpoint/transfer/held_arenas.h"
#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

bool SameShape(const ShardRecipe& recipe, const std::vector<ParityMember>& members) {
  return std::equal(recipe.sources().begin(), recipe.sources().end(), members.begin(),
                    members.end(), [](const ShardRecipe::Source& source, const ParityMember& m) {
                      return source.shard.rank == m.fields.rank &&
                             source.shard.bytes == m.fields.payload_bytes;
                    });
}

}  // namespace

std::optional<ParityBase> ParityBase::Find(ArenaHost* host, const JobId& job,
                                           const ShardBuild& build, const ShardRecipe& recipe) {
  const HeldShard& wanted = build.shard;
  auto opened = OpenHeld(host, job, {.rank = wanted.rank, .replica = true});
  if (!opened.ok()) return std::nullopt;
  ParityBase base;
  base.arena_ = std::move(opened.value());
  const auto view = base.arena_.Newest();
  if (!view || view->fields.rank != wanted.rank || view->fields.built != wanted.built ||
      view->fields.generation != wanted.generation ||
      view->fields.payload_bytes != recipe.payload_bytes() || base.arena_.Damaged(*view)) {
    return std::nullopt;
  }
  auto crcs = ReadChunkCrcs(base.arena_, *view);
  const unsigned char* data = base.arena_.Payload(*view);
  if (!crcs.ok() || CrcRoot(view->fields, crcs.value().data()) != view->crc_root ||
      data == nullptr) {
    return std::nullopt;
  }
  auto table = ReadParityTable({data + view->fields.table_offset, view->fields.table_bytes});
  if (!table.ok() || !SameShape(recipe, table.value())) return std::nullopt;
  base.view_ = *view;
  base.crcs_ = std::move(crcs.value());
  base.members_ = std::move(table.value());
  return base;
}

SlotName ParityBase::Older(const JobId& job, std::size_t s) const {
  return {.job = job, .fields = members_[s].fields, .crc_root = members_[s].crc_root};
}

std::vector<std::uint64_t> ParityBase::Copy(const ShardRecipe& recipe,
                                            const std::vector<Bitmap>& same, SlotWriter* writer) {
  std::vector<bool> unchanged(ChunkCount(recipe.data_bytes()), true);
  for (std::size_t s = 0; s < recipe.sources().size(); ++s) {
    for (const std::uint32_t chunk : recipe.sources()[s].chunks) {
      if (same[s].empty() || !BitOf(same[s], chunk)) {
        unchanged[recipe.PayloadChunk(s, chunk)] = false;
      }
    }
  }
  std::vector<std::uint64_t> copied;
  const unsigned char* data = arena_.Payload(view_);
  if (data == nullptr) return copied;
  for (std::uint64_t i = 0; i < unchanged.size(); ++i) {
    if (!unchanged[i]) continue;
    const std::uint32_t crc =
        Crc32cCopy(0, writer->Chunk(i), data + i * kChunkBytes, view_.chunk_size(i));
    if (crc == crcs_[i] && arena_.Current(view_)) copied.push_back(i);
  }
  StoreFence();
  return copied;
}

}  // namespace everstep::checkpoint
