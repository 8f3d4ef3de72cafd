#include "checkpoint/transfer/mender.h"

#include <fmt/format.h>

#include <optional>
#include <vector>

#include "checkpoint/store/mend.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/crc32c.h"

namespace everstep::checkpoint {
namespace {

// One chunk and the table of the source's slot.
struct Brought {
  std::vector<std::uint32_t> crcs;
  std::vector<unsigned char> bytes;
};

Result<Brought> FetchChunk(const PeerTask& task, const SlotView& view, std::uint64_t chunk) {
  auto talk = Converse(task,
                       {.op = Op::kFetch,
                        .first_chunk = chunk,
                        .end_chunk = chunk + 1,
                        .fields = view.fields,
                        .crc_root = view.crc_root},
                       DeadlineFor(task.limits, kChunkBytes));
  if (!talk.ok()) return talk.error();
  Connection& connection = talk.value().connection;
  connection.set_deadline(DeadlineFor(task.limits, kChunkBytes));
  // The fields are the source's: with them its table gives the root that is wanted, or it is not
  // believed.
  const SlotFields fields = talk.value().response.fields;
  if (auto ok = CheckFields(fields); !ok.ok()) return ok.error();
  if (fields.payload_bytes != view.fields.payload_bytes) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: offers {} bytes where {} were asked for", connection.peer(),
                             fields.payload_bytes, view.fields.payload_bytes)};
  }
  auto table = ReceiveTable(&connection, fields, view.crc_root);
  if (!table.ok()) return table.error();
  const auto frame = ReceiveChunkFrame(&connection, fields, table.value().crcs);
  if (!frame.ok()) return frame.error();
  if (frame.value().index != chunk) {
    return Error{ErrorCode::kInvalid, fmt::format("peer {}: sends chunk {} where {} was due",
                                                  connection.peer(), frame.value().index, chunk)};
  }
  Brought brought{.crcs = std::move(table.value().crcs), .bytes = {}};
  brought.bytes.resize(frame.value().bytes);
  if (auto ok = connection.Receive(brought.bytes.data(), brought.bytes.size()); !ok.ok()) {
    return ok.error();
  }
  const std::uint32_t crc = Crc32c(brought.bytes.data(), brought.bytes.size());
  if (crc != brought.crcs[chunk]) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("peer {}: chunk {} of step {} of rank {} arrived with CRC {:08x}, not "
                             "{:08x}",
                             connection.peer(), chunk, view.step(), view.fields.rank, crc,
                             brought.crcs[chunk])};
  }
  return brought;
}

bool Corrupt(const Outcome& outcome) {
  return !outcome.ok() && outcome.error().code == ErrorCode::kCorrupt;
}

}  // namespace

Outcome MendSlot(const PeerTask& task, Arena* arena, const SlotView& view, MendReport* report) {
  const auto overwritten = [&] {
    return Error{ErrorCode::kStale, fmt::format("{}: step {} was overwritten before it was mended",
                                                arena->Name(), view.step())};
  };
  std::optional<Traffic::Turn> turn;
  if (task.traffic != nullptr) turn.emplace(task.traffic, task.traffic_class);
  if (Corrupt(CheckTable(arena, view))) {
    auto brought = FetchChunk(task, view, 0);
    if (!brought.ok()) return brought.error();
    if (CrcRoot(view.fields, brought.value().crcs.data()) != view.crc_root) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("{}: the header of step {} is damaged itself; the next capture "
                               "takes its place",
                               arena->Name(), view.step())};
    }
    if (!MendTable(arena, view, brought.value().crcs)) return overwritten();
  }
  for (std::uint64_t i = 0; i < view.chunks(); ++i) {
    auto looked = CheckChunk(arena, view, i);
    if (looked.ok()) continue;
    if (!Corrupt(looked)) return looked;
    if (task.traffic != nullptr &&
        !task.traffic->Admit(task.traffic_class, view.chunk_size(i), task.cancel)) {
      return Error{ErrorCode::kStale, "mending was given up here"};
    }
    auto brought = FetchChunk(task, view, i);
    if (!brought.ok()) return brought.error();
    if (!MendChunk(arena, view, i, brought.value().bytes.data())) return overwritten();
    ++report->chunks;
    report->bytes += view.chunk_size(i);
  }
  return arena->Verify(view);
}

}  // namespace everstep::checkpoint
