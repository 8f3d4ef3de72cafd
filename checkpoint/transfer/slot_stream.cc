#include "checkpoint/transfer/slot_stream.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kPiece = 256u << 10;  // checksummed while it is in the cache

Error Overwritten(const Arena& arena, const SlotView& view) {
  return {ErrorCode::kStale,
          fmt::format("{}: step {} was overwritten while it was read", arena.Name(), view.step())};
}

}  // namespace

Result<std::vector<std::uint32_t>> ReadChunkCrcs(const Arena& arena, const SlotView& view) {
  std::vector<std::uint32_t> crcs(view.chunks());
  std::size_t got = 0;
  const std::size_t bytes = crcs.size() * 4;
  const std::uint64_t at = view.extent_offset + ExtentCapacity(view.extent_bytes);
  while (got < bytes) {
    const ssize_t n = pread(arena.fd(), reinterpret_cast<char*>(crcs.data()) + got, bytes - got,
                            static_cast<off_t>(at + got));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      return Error{ErrorCode::kInternal,
                   fmt::format("{}: reading chunk checksums: {}", arena.Name(),
                               n == 0 ? std::string("the file ends") : ErrnoText(errno))};
    }
    got += static_cast<std::size_t>(n);
  }
  if (!arena.Current(view)) return Overwritten(arena, view);
  return crcs;
}

Outcome SendChunks(Connection* connection, const Arena& arena, const SlotView& view,
                   const std::vector<std::uint32_t>& crcs, std::uint64_t first) {
  for (std::uint64_t i = first; i < view.chunks(); ++i) {
    if (!arena.Current(view)) return Overwritten(arena, view);
    if (connection->Readable()) return Done{};
    const ChunkFrame frame{
        .index = static_cast<std::uint32_t>(i), .bytes = view.chunk_size(i), .crc = crcs[i]};
    if (auto ok = connection->Send(&frame, sizeof frame, true); !ok.ok()) return ok;
    if (auto ok = connection->SendFile(arena.fd(), view.extent_offset + i * kChunkBytes,
                                       view.chunk_size(i));
        !ok.ok()) {
      return ok;
    }
  }
  return Done{};
}

Outcome ReceiveChunks(Connection* connection, const SlotFields& fields, SlotWriter* writer,
                      std::uint64_t* next) {
  SlotView shape;
  shape.fields = fields;
  for (; *next < shape.chunks(); ++*next) {
    ChunkFrame frame;
    if (auto ok = connection->Receive(&frame, sizeof frame); !ok.ok()) return ok;
    if (frame.magic != kFrameMagic || frame.index != *next ||
        frame.bytes != shape.chunk_size(*next)) {
      return Error{
          ErrorCode::kInvalid,
          fmt::format("peer {}: a frame for chunk {} of {} bytes where chunk {} of {} bytes "
                      "was due",
                      connection->peer(), frame.index, frame.bytes, *next,
                      shape.chunk_size(*next))};
    }
    std::uint32_t crc = 0;
    unsigned char* to = writer->Chunk(*next);
    for (std::size_t at = 0; at < frame.bytes;) {
      const std::size_t n = std::min<std::size_t>(kPiece, frame.bytes - at);
      if (auto ok = connection->Receive(to + at, n); !ok.ok()) return ok;
      crc = Crc32cExtend(crc, to + at, n);
      at += n;
    }
    if (crc != frame.crc) {
      return Error{
          ErrorCode::kCorrupt,
          fmt::format("peer {}: chunk {} of step {} of rank {} arrived with CRC {:08x}, not "
                      "{:08x}",
                      connection->peer(), *next, fields.step, fields.rank, crc, frame.crc)};
    }
    writer->SetChunkCrc(*next, crc);
  }
  return Done{};
}

Status ToStatus(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalid: return Status::kInvalid;
    case ErrorCode::kNotFound: return Status::kUnknown;
    case ErrorCode::kNoMemory: return Status::kNoMemory;
    case ErrorCode::kCorrupt: return Status::kCorrupt;
    case ErrorCode::kStale: return Status::kStale;
    case ErrorCode::kRefused: return Status::kKey;
    case ErrorCode::kUnavailable:
    case ErrorCode::kTimedOut: return Status::kBusy;
    case ErrorCode::kInternal: break;
  }
  return Status::kInternal;
}

Error FromStatus(Status status, const std::string& message) {
  switch (status) {
    case Status::kOk:
    case Status::kHave: break;
    case Status::kStale: return {ErrorCode::kStale, message};
    case Status::kUnknown: return {ErrorCode::kNotFound, message};
    case Status::kKey: return {ErrorCode::kRefused, message};
    case Status::kNoMemory: return {ErrorCode::kNoMemory, message};
    case Status::kCorrupt: return {ErrorCode::kCorrupt, message};
    case Status::kBusy: return {ErrorCode::kUnavailable, message};
    case Status::kInvalid: return {ErrorCode::kInvalid, message};
    case Status::kInternal: return {ErrorCode::kInternal, message};
  }
  return {ErrorCode::kInternal, fmt::format("an answer of unknown status {}: {}",
                                            static_cast<std::uint32_t>(status), message)};
}

}  // namespace everstep::checkpoint
