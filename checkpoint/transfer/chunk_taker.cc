#include "checkpoint/transfer/chunk_taker.h"

#include <fmt/format.h>
#include <unistd.h>

#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

using Buffer = std::unique_ptr<unsigned char[]>;

Result<Buffer> OneChunk() {
  Buffer buffer(new (std::nothrow) unsigned char[kChunkBytes]);
  if (buffer == nullptr) return Error{ErrorCode::kNoMemory, "no memory for one chunk"};
  return buffer;
}

}  // namespace

std::string SlotName::Text() const {
  return fmt::format("step {} of rank {} (generation {})", fields.step, fields.rank,
                     fields.generation);
}

Error GivenUp(const std::string& source) {
  return {ErrorCode::kStale, fmt::format("reading {}: given up here", source)};
}

Outcome CheckNamed(const SlotName& name, const SlotFields& fields, std::uint32_t crc_root,
                   const std::string& holder) {
  if (auto ok = CheckFields(fields); !ok.ok()) {
    return Error{ErrorCode::kInvalid, fmt::format("{}: {}", holder, ok.error().message)};
  }
  if (fields.step == name.fields.step && fields.rank == name.fields.rank &&
      fields.generation == name.fields.generation && crc_root == name.crc_root &&
      fields.payload_bytes == name.fields.payload_bytes) {
    return Done{};
  }
  return Error{
      ErrorCode::kInvalid,
      fmt::format("{}: offers step {} of rank {}, {} bytes with checksum {:08x}; asked was "
                  "{}, {} bytes with {:08x}",
                  holder, fields.step, fields.rank, fields.payload_bytes, crc_root, name.Text(),
                  name.fields.payload_bytes, name.crc_root)};
}

namespace {

struct HeldSlot {
  SlotView view;
  std::vector<std::uint32_t> crcs;
};
Result<HeldSlot> FindNamed(const Arena& arena, const SlotName& name) {
  std::optional<SlotView> view;
  for (std::uint32_t i = 0; i < kSlots && !view; ++i) {
    view = arena.Look(i);
    if (view && !CheckNamed(name, view->fields, view->crc_root, arena.Name()).ok()) view.reset();
  }
  if (!view) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("{} does not hold {} (any more)", arena.Name(), name.Text())};
  }
  auto crcs = ReadChunkCrcs(arena, *view);
  if (!crcs.ok()) return crcs.error();
  if (CrcRoot(view->fields, crcs.value().data()) != view->crc_root) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: {}: its header fails its checksum", arena.Name(), name.Text())};
  }
  return HeldSlot{*view, std::move(crcs.value())};
}

// A conversation with a peer that holds the slot, up to its table.
struct Picking {
  PeerConversation talk;
  ChunkTable table;
};
Result<Picking> BeginPick(const PeerTask& task, Op op, const SlotName& name) {
  auto talk = Converse(task, {.op = op, .fields = name.fields, .crc_root = name.crc_root},
                       DeadlineFor(task.limits, 0));
  if (!talk.ok()) return talk.error();
  const ResponseFrame& response = talk.value().response;
  Connection& connection = talk.value().connection;
  if (auto ok = CheckNamed(name, response.fields, response.crc_root,
                           fmt::format("peer {}", connection.peer()));
      !ok.ok()) {
    return ok.error();
  }
  auto table = ReceiveTable(&connection, response.fields, name.crc_root);
  if (!table.ok()) return table.error();
  return Picking{std::move(talk.value()), std::move(table.value())};
}

}  // namespace

Outcome ReadChunks(Arena* arena, const SlotName& name, ChunkTaker* taker) {
  const auto held = FindNamed(*arena, name);
  if (!held.ok()) return held.error();
  const SlotView& view = held.value().view;
  auto own = OneChunk();
  if (!own.ok()) return own.error();
  for (const std::uint32_t chunk : taker->Lacks(view.fields)) {
    const std::uint32_t bytes = view.chunk_size(chunk);
    // Its trainer may write this slot: the bytes that are checked are those that are taken. Read,
    // as to map the slot for one pass costs more than the pass.
    const std::uint64_t at = view.extent_offset + std::uint64_t{chunk} * kChunkBytes;
    if (pread(arena->fd(), own.value().get(), bytes, static_cast<off_t>(at)) !=
        static_cast<ssize_t>(bytes)) {
      return Error{ErrorCode::kInternal, fmt::format("{}: chunk {} of {} cannot be read",
                                                     arena->Name(), chunk, name.Text())};
    }
    if (Crc32c(own.value().get(), bytes) != held.value().crcs[chunk]) {
      if (!arena->Current(view)) {
        return Error{ErrorCode::kStale, fmt::format("{}: {} was overwritten while it was read",
                                                    arena->Name(), name.Text())};
      }
      return Error{ErrorCode::kCorrupt, fmt::format("{}: {}: chunk {} fails its checksum",
                                                    arena->Name(), name.Text(), chunk)};
    }
    if (!taker->Take(chunk, own.value().get(), bytes)) return GivenUp(arena->Name());
  }
  return Done{};
}

Outcome PickChunks(const PeerTask& task, const SlotName& name, ChunkTaker* taker) {
  auto picking = BeginPick(task, Op::kPick, name);
  if (!picking.ok()) return picking.error();
  Connection& connection = picking.value().talk.connection;
  const SlotFields& fields = picking.value().talk.response.fields;
  const std::vector<std::uint32_t>& crcs = picking.value().table.crcs;
  const std::vector<std::uint32_t> lacks = taker->Lacks(fields);
  connection.set_deadline(
      DeadlineFor(task.limits, std::uint64_t{kChunkBytes} * (lacks.size() + 1)));
  Bitmap bits(BitmapBytes(crcs.size()));
  for (const std::uint32_t chunk : lacks) SetBit(&bits, chunk);
  if (auto ok = SendWant(&connection, crcs.size(), bits); !ok.ok()) return ok;
  auto own = OneChunk();
  if (!own.ok()) return own.error();
  for (std::size_t next = 0;; ++next) {
    const auto frame = ReceiveChunkFrame(&connection, fields, crcs);
    if (!frame.ok()) return frame.error();
    const bool over = frame.value().index == kEndOfChunks;
    if (over ? next < lacks.size() : next >= lacks.size() || frame.value().index != lacks[next]) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("peer {}: sends chunk {} as number {} of the {} that were wanted",
                               connection.peer(), frame.value().index, next, lacks.size())};
    }
    if (over) return Done{};
    auto got = ReceiveChunkBytes(&connection, fields, frame.value(), own.value().get());
    if (!got.ok()) return got;
    if (!taker->Take(frame.value().index, own.value().get(), frame.value().bytes)) {
      return GivenUp(connection.peer());
    }
  }
}

Result<Bitmap> FindSame(Arena* arena, const SlotName& name, const SlotName& older) {
  const auto held = FindNamed(*arena, name);
  if (!held.ok()) return held.error();
  const SlotView& view = held.value().view;
  const auto other = arena->Look(1 - view.slot);
  if (!other || !IsHeld(ToHeld(*other), older.fields, older.crc_root)) return Bitmap{};
  return SameChunks(arena, view, held.value().crcs, *other, SteadyTime::max());
}

Result<Bitmap> PickSame(const PeerTask& task, const SlotName& name, const SlotName& older) {
  auto picking = BeginPick(task, Op::kPickChanged, name);
  if (!picking.ok()) return picking.error();
  Connection& connection = picking.value().talk.connection;
  const ResponseFrame& response = picking.value().talk.response;
  ChunkTable& table = picking.value().table;
  const Bitmap none(BitmapBytes(table.crcs.size()));
  if (auto ok = SendWant(&connection, table.crcs.size(), none); !ok.ok()) return ok.error();
  const auto end = ReceiveChunkFrame(&connection, response.fields, table.crcs);
  if (!end.ok()) return end.error();
  if (end.value().index != kEndOfChunks) {
    return Error{ErrorCode::kInvalid, fmt::format("peer {}: sends chunk {} where none was wanted",
                                                  connection.peer(), end.value().index)};
  }
  if (table.base != 0 || !IsHeld(response.held[0], older.fields, older.crc_root)) return Bitmap{};
  return std::move(table.same);
}

}  // namespace everstep::checkpoint
