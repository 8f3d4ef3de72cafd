#include "checkpoint/core/range_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace everstep::checkpoint {
namespace {

// [first, first + (count - 1) * stride + bytes) lies within `limit`.
bool Within(std::uint64_t first, std::uint64_t count, std::uint64_t stride, std::uint64_t bytes,
            std::uint64_t limit) {
  std::uint64_t last = 0;
  return bytes <= limit && !__builtin_mul_overflow(count - 1, stride, &last) &&
         !__builtin_add_overflow(last, first, &last) && last <= limit - bytes;
}

std::string Wrong(const WantedRange& w, std::span<const RangeShard> shards,
                  std::uint64_t dest_bytes) {
  if (w.rank < 0 || static_cast<std::size_t>(w.rank) >= shards.size()) {
    return fmt::format("a range of rank {}'s shard, there are {}", w.rank, shards.size());
  }
  if (w.count == 0 || w.bytes == 0) {
    return fmt::format("{} ranges of {} bytes", w.count, w.bytes);
  }
  const std::uint64_t size = shards[static_cast<std::size_t>(w.rank)].payload_bytes;
  if (!Within(w.source, w.count, w.source_stride, w.bytes, size)) {
    return fmt::format("{} x {} bytes at {} (every {}) end beyond the {} of rank {}'s shard",
                       w.count, w.bytes, w.source, w.source_stride, size, w.rank);
  }
  if (!Within(w.dest, w.count, w.dest_stride, w.bytes, dest_bytes)) {
    return fmt::format("{} x {} bytes for {} (every {}) end beyond the {} of the new state",
                       w.count, w.bytes, w.dest, w.dest_stride, dest_bytes);
  }
  return "";
}

}  // namespace

RangePlan PlanRanges(std::span<const WantedRange> wanted, std::span<const RangeShard> shards,
                     std::uint64_t dest_bytes, std::uint32_t chunk_bytes, Rank reader) {
  RangePlan plan;
  std::uint64_t count = 0;
  for (const WantedRange& w : wanted) {
    plan.error = Wrong(w, shards, dest_bytes);
    if (!plan.error.empty()) return plan;
    count += w.count * (w.bytes / chunk_bytes + 2);  // at most so many, cut at chunks
    if (count > kMaxRangePieces) {
      plan.error = fmt::format("more than {} pieces", kMaxRangePieces);
      return plan;
    }
  }
  std::vector<std::vector<RangePiece>> pieces(shards.size());
  std::vector<std::pair<std::uint64_t, std::uint64_t>> filled;  // runs of the new payload
  filled.reserve(wanted.size());
  for (const WantedRange& w : wanted) {
    std::vector<RangePiece>& of = pieces[static_cast<std::size_t>(w.rank)];
    for (std::uint64_t run = 0; run < w.count; ++run) {
      const std::uint64_t source = w.source + run * w.source_stride;
      const std::uint64_t dest = w.dest + run * w.dest_stride;
      filled.emplace_back(dest, dest + w.bytes);
      for (std::uint64_t at = 0; at < w.bytes;) {
        const std::uint64_t room = chunk_bytes - (source + at) % chunk_bytes;
        const std::uint64_t n = std::min(room, w.bytes - at);
        of.push_back({source + at, dest + at, static_cast<std::uint32_t>(n)});
        at += n;
      }
      plan.bytes += w.bytes;
    }
  }
  std::sort(filled.begin(), filled.end());
  std::uint64_t at = 0;
  for (const auto& [from, to] : filled) {
    if (from < at) {
      plan.error = fmt::format("byte {} of the new state is wanted from two places", from);
      return plan;
    }
    if (from > at) plan.gaps.emplace_back(at, from);
    at = to;
  }
  if (at < dest_bytes) plan.gaps.emplace_back(at, dest_bytes);
  for (std::size_t rank = 0; rank < shards.size(); ++rank) {
    if (pieces[rank].empty()) continue;
    ShardReads reads{
        .rank = static_cast<Rank>(rank), .pieces = std::move(pieces[rank]), .chunks = {}};
    std::sort(reads.pieces.begin(), reads.pieces.end(),
              [](const RangePiece& a, const RangePiece& b) {
                return std::pair(a.source, a.dest) < std::pair(b.source, b.dest);
              });
    for (const RangePiece& piece : reads.pieces) {
      const auto chunk = static_cast<std::uint32_t>(piece.source / chunk_bytes);
      if (reads.chunks.empty() || reads.chunks.back() != chunk) reads.chunks.push_back(chunk);
    }
    plan.shards.push_back(std::move(reads));
  }
  const auto world = static_cast<Rank>(shards.size());
  const auto turn = [&](const ShardReads& reads) {
    const ShardTier tier = shards[static_cast<std::size_t>(reads.rank)].tier;
    return std::pair(tier, (reads.rank - reader % world + world) % world);
  };
  std::sort(plan.shards.begin(), plan.shards.end(),
            [&](const ShardReads& a, const ShardReads& b) { return turn(a) < turn(b); });
  return plan;
}

std::span<const RangePiece> PiecesOf(const ShardReads& reads, std::uint32_t chunk,
                                     std::uint32_t chunk_bytes) {
  const auto before = [&](std::uint64_t source) {
    return std::lower_bound(
        reads.pieces.begin(), reads.pieces.end(), source,
        [](const RangePiece& piece, std::uint64_t at) { return piece.source < at; });
  };
  const std::uint64_t from = std::uint64_t{chunk} * chunk_bytes;
  return {before(from), before(from + chunk_bytes)};
}

}  // namespace everstep::checkpoint
