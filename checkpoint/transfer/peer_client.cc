#include "checkpoint/transfer/peer_client.h"

#include <fmt/format.h>

#include <cstring>
#include <utility>

#include "checkpoint/transfer/handshake.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {

SteadyTime DeadlineFor(const PeerLimits& limits, std::uint64_t bytes) {
  const std::uint64_t rate = limits.least_bytes_per_second == 0 ? 1 : limits.least_bytes_per_second;
  return std::chrono::steady_clock::now() + 2 * limits.io_timeout +
         std::chrono::milliseconds(bytes / rate * 1000 + bytes % rate * 1000 / rate);
}

Result<PeerConversation> Converse(const PeerTask& task, RequestFrame request, SteadyTime deadline) {
  auto dialled = Connection::Dial(task.address, task.limits.connect_timeout, task.limits.io_timeout,
                                  deadline, task.cancel);
  if (!dialled.ok()) return dialled.error();
  PeerConversation talk{.connection = std::move(dialled.value()), .my_nonce = RandomNonce()};
  Connection& connection = talk.connection;
  KillPoint("push.connected");
  const HelloFrame mine{.nonce = talk.my_nonce};
  if (auto ok = connection.Send(&mine, sizeof mine); !ok.ok()) return ok.error();
  HelloFrame theirs;
  if (auto ok = connection.Receive(&theirs, sizeof theirs); !ok.ok()) return ok.error();
  if (auto ok = CheckHello(theirs, connection.peer()); !ok.ok()) return ok.error();
  talk.their_nonce = theirs.nonce;
  PutText(request.job, task.job);
  request.generation = task.generation;
  request.committed_generation = task.committed_generation;
  request.committed_step = task.committed_step;
  request.traffic = static_cast<std::uint32_t>(task.traffic_class);
  request.mac = RequestMac(task.key, mine.nonce, theirs.nonce, request);
  if (auto ok = connection.Send(&request, sizeof request); !ok.ok()) return ok.error();
  KillPoint("push.asked");
  ResponseFrame& response = talk.response;
  if (auto ok = connection.Receive(&response, sizeof response); !ok.ok()) return ok.error();
  if (response.magic != kFrameMagic) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: its answer is none of the data plane's", connection.peer())};
  }
  // A peer that does not know the key cannot sign that it does not.
  const bool keyless = response.status == Status::kKey || response.status == Status::kUnknown ||
                       response.status == Status::kBusy;
  if (!keyless &&
      !SameTag(response.mac, ResponseMac(task.key, mine.nonce, theirs.nonce, response))) {
    return Error{ErrorCode::kRefused, fmt::format("peer {}: it does not know the key of job {}",
                                                  connection.peer(), task.job)};
  }
  if (response.status != Status::kOk && response.status != Status::kHave) {
    return FromStatus(response.status,
                      fmt::format("peer {}: {}", connection.peer(), GetText(response.message)));
  }
  KillPoint("push.answered");
  return talk;
}

Outcome PeerConversation::Ack(const SipKey& key) {
  return FinishAck(key, {}, 0);
}

Outcome PeerConversation::FinishAck(const SipKey& key, AckFrame ack, std::size_t got) {
  if (auto ok = connection.Receive(reinterpret_cast<char*>(&ack) + got, sizeof ack - got);
      !ok.ok()) {
    return ok;
  }
  if (ack.magic != kFrameMagic) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: a frame that is no answer", connection.peer())};
  }
  if (!SameTag(ack.mac, AckMac(key, my_nonce, their_nonce, ack))) {
    return Error{ErrorCode::kRefused,
                 fmt::format("peer {}: an answer that its key did not sign", connection.peer())};
  }
  if (ack.status != Status::kOk) {
    return FromStatus(ack.status,
                      fmt::format("peer {}: {}", connection.peer(), GetText(ack.message)));
  }
  return Done{};
}

}  // namespace everstep::checkpoint
