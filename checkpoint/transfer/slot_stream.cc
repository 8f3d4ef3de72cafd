#include "checkpoint/transfer/slot_stream.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>

#include "checkpoint/store/fence.h"
#include "proto/base/crc32c.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

// Bytes rest here between the socket and the slot. It stays in the core's own cache, so that the
// one pass that checks them can store past the cache: memory sees each byte once, not three times
// (read for ownership, write, read to check).
constexpr std::size_t kPiece = 128u << 10;
unsigned char* Bounce() {
  static thread_local std::unique_ptr<unsigned char[]> bytes;  // once for a connection's thread
  if (bytes == nullptr) bytes.reset(new unsigned char[kPiece]);
  return bytes.get();
}

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

Bitmap SameChunks(Arena* arena, const SlotView& view, const std::vector<std::uint32_t>& crcs,
                  const SlotView& older, SteadyTime until) {
  const auto older_crcs = ReadChunkCrcs(*arena, older);
  if (!older_crcs.ok()) return {};
  Bitmap same;
  const unsigned char* data = nullptr;
  const unsigned char* older_data = nullptr;
  for (std::uint64_t i = 0; i < crcs.size() && i < older.chunks(); ++i) {
    const std::uint32_t size = view.chunk_size(i);
    if (crcs[i] != older_crcs.value()[i] || size != older.chunk_size(i)) continue;
    if (data == nullptr) {
      data = arena->Payload(view);
      older_data = arena->Payload(older);
      if (data == nullptr || older_data == nullptr) return {};
    }
    if (std::chrono::steady_clock::now() >= until) break;
    const std::uint64_t at = i * kChunkBytes;
    if (std::memcmp(data + at, older_data + at, size) != 0) continue;
    if (same.empty()) same.resize(BitmapBytes(crcs.size()));
    SetBit(&same, i);
  }
  if (!arena->Current(older) || !arena->Current(view)) return {};
  return same;
}

HeldFrame ToHeld(const SlotView& view) {
  return {.generation = view.fields.generation,
          .step = view.fields.step,
          .captured_ns = view.fields.captured_ns,
          .payload_bytes = view.fields.payload_bytes,
          .crc_root = view.crc_root};
}

bool IsHeld(const HeldFrame& held, const SlotFields& fields, std::uint32_t crc_root) {
  return held.step == fields.step && held.generation == fields.generation &&
         held.captured_ns == fields.captured_ns && held.payload_bytes == fields.payload_bytes &&
         held.crc_root == crc_root;
}

Outcome SendTable(Connection* connection, const std::vector<std::uint32_t>& crcs,
                  std::uint32_t base, const Bitmap& same) {
  const TableFrame frame{.chunks = static_cast<std::uint32_t>(crcs.size()),
                         .base = same.empty() ? kNoBase : base};
  if (auto ok = connection->Send(&frame, sizeof frame, true); !ok.ok()) return ok;
  if (auto ok = connection->Send(crcs.data(), 4 * crcs.size(), !same.empty()); !ok.ok()) return ok;
  return connection->Send(same.data(), same.size());
}

Result<ChunkTable> ReceiveTable(Connection* connection, const SlotFields& fields,
                                std::uint32_t crc_root) {
  TableFrame frame;
  if (auto ok = connection->Receive(&frame, sizeof frame); !ok.ok()) return ok.error();
  const std::uint64_t chunks = ChunkCount(fields.payload_bytes);
  if (frame.magic != kFrameMagic || frame.chunks != chunks ||
      (frame.base != kNoBase && frame.base >= kSlots)) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: a table of {} chunks where one of {} was due",
                             connection->peer(), frame.chunks, chunks)};
  }
  ChunkTable table{.base = frame.base};
  table.crcs.resize(chunks);
  if (auto ok = connection->Receive(table.crcs.data(), 4 * chunks); !ok.ok()) return ok.error();
  if (table.base != kNoBase) {
    table.same.resize(BitmapBytes(chunks));
    if (auto ok = connection->Receive(table.same.data(), table.same.size()); !ok.ok()) {
      return ok.error();
    }
  }
  const std::uint32_t root = CrcRoot(fields, table.crcs.data());
  if (root != crc_root) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("peer {}: the chunk checksums of step {} of rank {} give {:08x}, not "
                             "{:08x} as announced",
                             connection->peer(), fields.step, fields.rank, root, crc_root)};
  }
  return table;
}

Outcome SendWant(Connection* connection, std::uint64_t chunks, const Bitmap& wanted,
                 std::uint64_t resumed) {
  WantFrame want{.chunks = static_cast<std::uint32_t>(chunks),
                 .resumed = static_cast<std::uint32_t>(resumed)};
  for (const std::uint8_t bits : wanted) want.wanted += static_cast<unsigned>(std::popcount(bits));
  if (auto ok = connection->Send(&want, sizeof want, true); !ok.ok()) return ok;
  return connection->Send(wanted.data(), wanted.size());
}

Result<std::vector<std::uint32_t>> ReceiveWanted(Connection* connection, const WantFrame& want,
                                                 std::uint64_t chunks) {
  if (want.magic != kWantMagic || want.chunks != chunks || want.wanted > chunks ||
      want.resumed > chunks) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: wants {} of {} chunks of a slot of {}", connection->peer(),
                             want.wanted, want.chunks, chunks)};
  }
  Bitmap bits(BitmapBytes(chunks));
  if (auto ok = connection->Receive(bits.data(), bits.size()); !ok.ok()) return ok.error();
  std::vector<std::uint32_t> wanted;
  wanted.reserve(want.wanted);
  for (std::uint32_t i = 0; i < chunks; ++i) {
    if (BitOf(bits, i)) wanted.push_back(i);
  }
  return wanted;
}

Outcome SendChunk(Connection* connection, const Arena& arena, const SlotView& view,
                  const unsigned char* data, std::uint64_t chunk, std::uint32_t crc) {
  if (!arena.Current(view)) return Overwritten(arena, view);
  return SendChunkBytes(connection, arena, view, data, chunk, crc);
}

Outcome SendChunkBytes(Connection* connection, const Arena& arena, const SlotView& view,
                       const unsigned char* data, std::uint64_t chunk, std::uint32_t crc) {
  const ChunkFrame frame{
      .index = static_cast<std::uint32_t>(chunk), .bytes = view.chunk_size(chunk), .crc = crc};
  if (auto ok = connection->Send(&frame, sizeof frame, true); !ok.ok()) return ok;
  if (data != nullptr) return connection->Send(data + chunk * kChunkBytes, frame.bytes);
  return connection->SendFile(arena.fd(), view.extent_offset + chunk * kChunkBytes, frame.bytes);
}

Outcome SendEndOfChunks(Connection* connection) {
  const ChunkFrame frame{.index = kEndOfChunks};
  return connection->Send(&frame, sizeof frame);
}

bool MappingPays(const Connection& connection, bool one_of_several) {
  constexpr unsigned kThreads = 4;  // two streams, both ends
  static const unsigned cores = std::thread::hardware_concurrency();
  return connection.SameHost() && (!one_of_several || cores >= kThreads);
}

Result<ChunkFrame> ReceiveChunkFrame(Connection* connection, const SlotFields& fields,
                                     const std::vector<std::uint32_t>& crcs) {
  ChunkFrame frame;
  if (auto ok = connection->Receive(&frame, sizeof frame); !ok.ok()) return ok.error();
  if (frame.magic == kFrameMagic && frame.index == kEndOfChunks && frame.bytes == 0) return frame;
  SlotView shape;
  shape.fields = fields;
  if (frame.magic != kFrameMagic || frame.index >= crcs.size() ||
      frame.bytes != shape.chunk_size(frame.index) || frame.crc != crcs[frame.index]) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: a frame for chunk {} of {} bytes with CRC {:08x}, which is "
                             "none of the {} chunks of step {} of rank {}",
                             connection->peer(), frame.index, frame.bytes, frame.crc, crcs.size(),
                             fields.step, fields.rank)};
  }
  return frame;
}

Outcome ReceiveChunkBytes(Connection* connection, const SlotFields& fields, const ChunkFrame& frame,
                          unsigned char* to) {
  unsigned char* bounce = Bounce();
  std::uint32_t crc = 0;
  for (std::size_t at = 0; at < frame.bytes;) {
    const std::size_t n = std::min<std::size_t>(kPiece, frame.bytes - at);
    if (auto ok = connection->Receive(bounce, n); !ok.ok()) return ok;
    crc = Crc32cCopy(crc, to + at, bounce, n);
    at += n;
  }
  KillPoint("arrive.chunk_unchecked");
  StoreFence();  // other threads publish what this one wrote past the cache
  if (crc != frame.crc) {
    return Error{
        ErrorCode::kCorrupt,
        fmt::format("peer {}: chunk {} of step {} of rank {} arrived with CRC {:08x}, not "
                    "{:08x}",
                    connection->peer(), frame.index, fields.step, fields.rank, crc, frame.crc)};
  }
  return Done{};
}

Outcome ReceiveChunk(Connection* connection, const SlotFields& fields, const ChunkFrame& frame,
                     SlotWriter* writer) {
  auto ok = ReceiveChunkBytes(connection, fields, frame, writer->Chunk(frame.index));
  if (ok.ok()) writer->SetChunkCrc(frame.index, frame.crc);
  return ok;
}

Outcome SkipChunk(Connection* connection, const ChunkFrame& frame) {
  for (std::size_t at = 0; at < frame.bytes; at += kPiece) {
    const std::size_t n = std::min<std::size_t>(kPiece, frame.bytes - at);
    if (auto ok = connection->Receive(Bounce(), n); !ok.ok()) return ok;
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
