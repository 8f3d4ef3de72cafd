#include "checkpoint/transfer/peer_client.h"

#include <fmt/format.h>

#include <cstring>

#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/slot_stream.h"

namespace everstep::checkpoint {
namespace {

Result<ResponseFrame> Ask(Connection* connection, const PeerTask& task, RequestFrame request) {
  HelloFrame mine{.nonce = RandomNonce()};
  if (auto ok = connection->Send(&mine, sizeof mine); !ok.ok()) return ok.error();
  HelloFrame theirs;
  if (auto ok = connection->Receive(&theirs, sizeof theirs); !ok.ok()) return ok.error();
  if (auto ok = CheckHello(theirs, connection->peer()); !ok.ok()) return ok.error();
  PutText(request.job, task.job);
  request.generation = task.generation;
  request.committed_generation = task.committed_generation;
  request.committed_step = task.committed_step;
  request.mac = RequestMac(task.key, mine.nonce, theirs.nonce, request);
  if (auto ok = connection->Send(&request, sizeof request); !ok.ok()) return ok.error();
  ResponseFrame response;
  if (auto ok = connection->Receive(&response, sizeof response); !ok.ok()) return ok.error();
  if (response.magic != kFrameMagic) {
    return Error{ErrorCode::kInvalid, fmt::format("peer {}: its answer is none of the data plane's",
                                                  connection->peer())};
  }
  // A peer that does not know the key cannot sign that it does not.
  const bool keyless = response.status == Status::kKey || response.status == Status::kUnknown ||
                       response.status == Status::kBusy;
  if (!keyless &&
      !SameTag(response.mac, ResponseMac(task.key, mine.nonce, theirs.nonce, response))) {
    return Error{ErrorCode::kRefused, fmt::format("peer {}: it does not know the key of job {}",
                                                  connection->peer(), task.job)};
  }
  if (response.status != Status::kOk && response.status != Status::kHave) {
    return FromStatus(response.status,
                      fmt::format("peer {}: {}", connection->peer(), GetText(response.message)));
  }
  return response;
}

Result<AckFrame> Ack(Connection* connection) {
  AckFrame ack;
  if (auto ok = connection->Receive(&ack, sizeof ack); !ok.ok()) return ok.error();
  if (ack.magic != kFrameMagic) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: a frame that is no answer", connection->peer())};
  }
  if (ack.status != Status::kOk) {
    return FromStatus(ack.status,
                      fmt::format("peer {}: {}", connection->peer(), GetText(ack.message)));
  }
  return ack;
}

}  // namespace

SteadyTime DeadlineFor(const PeerLimits& limits, std::uint64_t bytes) {
  const std::uint64_t rate = limits.least_bytes_per_second == 0 ? 1 : limits.least_bytes_per_second;
  return std::chrono::steady_clock::now() + 2 * limits.io_timeout +
         std::chrono::milliseconds(bytes / rate * 1000 + bytes % rate * 1000 / rate);
}

Outcome PushSlot(const PeerTask& task, const Arena& arena, const SlotView& view) {
  auto crcs = ReadChunkCrcs(arena, view);
  if (!crcs.ok()) return crcs.error();
  auto dialled = Connection::Dial(task.address, task.limits.connect_timeout, task.limits.io_timeout,
                                  DeadlineFor(task.limits, view.fields.payload_bytes), task.cancel);
  if (!dialled.ok()) return dialled.error();
  Connection& connection = dialled.value();
  RequestFrame request{.op = Op::kPush, .fields = view.fields, .crc_root = view.crc_root};
  auto response = Ask(&connection, task, request);
  if (!response.ok()) return response.error();
  if (response.value().status == Status::kHave) return Done{};
  auto sent = SendChunks(&connection, arena, view, crcs.value(), response.value().first_chunk);
  if (!sent.ok() && sent.error().code == ErrorCode::kStale) return sent;
  auto ack = Ack(&connection);
  if (!ack.ok()) {
    if (!arena.Current(view)) {
      return Error{ErrorCode::kStale, fmt::format("{}: step {} was overwritten while it was sent",
                                                  arena.Name(), view.step())};
    }
    return sent.ok() || ack.error().code == ErrorCode::kCorrupt ? ack.error() : sent.error();
  }
  if (ack.value().crc_root != view.crc_root) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("peer {}: holds step {} with checksum {:08x}, not {:08x}",
                             connection.peer(), view.step(), ack.value().crc_root, view.crc_root)};
  }
  return Done{};
}

Result<SlotView> FetchSlot(const PeerTask& task, const SlotFields& wanted, std::uint32_t crc_root,
                           FetchSink* sink, FetchProgress* progress) {
  auto dialled = Connection::Dial(task.address, task.limits.connect_timeout, task.limits.io_timeout,
                                  DeadlineFor(task.limits, 0), task.cancel);
  if (!dialled.ok()) return dialled.error();
  Connection& connection = dialled.value();
  RequestFrame request{.op = Op::kFetch,
                       .first_chunk = progress->next_chunk,
                       .fields = wanted,
                       .crc_root = crc_root};
  auto response = Ask(&connection, task, request);
  if (!response.ok()) return response.error();
  const SlotFields& fields = response.value().fields;
  if (auto ok = CheckFields(fields); !ok.ok()) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: {}", connection.peer(), ok.error().message)};
  }
  if (fields.step != wanted.step || fields.rank != wanted.rank ||
      fields.generation != wanted.generation || response.value().crc_root != crc_root) {
    return Error{
        ErrorCode::kInvalid,
        fmt::format("peer {}: offers step {} of rank {}, asked was step {} of rank {}",
                    connection.peer(), fields.step, fields.rank, wanted.step, wanted.rank)};
  }
  SlotWriter* writer = sink->Begin(fields);
  if (writer == nullptr) return Error{ErrorCode::kNoMemory, sink->Why()};
  connection.set_deadline(DeadlineFor(task.limits, fields.payload_bytes));
  if (auto ok = ReceiveChunks(&connection, fields, writer, &progress->next_chunk); !ok.ok()) {
    return ok.error();
  }
  auto view = writer->Publish(fields, crc_root);
  if (!view.ok()) progress->next_chunk = 0;
  return view;
}

}  // namespace everstep::checkpoint
