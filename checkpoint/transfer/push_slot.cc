// One slot to a peer: what it lacks of it, over as many connections as pay.
#include <fmt/format.h>

#include <bit>
#include <cstring>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr std::uint64_t kStreamPays = 32;  // chunks a stream must have to be worth its connection

// The chunks that the peer wants, in order. Shared by a push's streams.
class ChunkQueue {
 public:
  explicit ChunkQueue(std::vector<std::uint32_t> chunks) : chunks_(std::move(chunks)) {}
  std::optional<std::uint32_t> Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (next_ == chunks_.size()) return std::nullopt;
    return chunks_[next_++];
  }
  // A stream broke before this one was sent: another takes it.
  void GiveBack(std::uint32_t chunk) {
    std::lock_guard<std::mutex> lock(mutex_);
    chunks_.push_back(chunk);
  }

 private:
  std::mutex mutex_;
  std::vector<std::uint32_t> chunks_;
  std::size_t next_ = 0;
};

// The other slot of the sender, when the receiver has it too: its index there, and which chunks are
// the same.
struct Base {
  std::uint32_t held = kNoBase;
  Bitmap same;
};
Base FindBase(Arena* arena, const SlotView& view, const std::vector<std::uint32_t>& crcs,
              const ResponseFrame& response, SteadyTime until) {
  const auto older = arena->Look(1 - view.slot);
  if (!older) return {};
  for (std::uint32_t i = 0; i < kSlots; ++i) {
    if (!IsHeld(response.held[i], older->fields, older->crc_root)) continue;
    Bitmap same = SameChunks(arena, view, crcs, *older, until);
    if (same.empty()) return {};
    return {i, std::move(same)};
  }
  return {};
}

class Pusher {
 public:
  Pusher(const PeerTask& task, Arena* arena, const SlotView& view, PushReport* report)
      : task_(task), arena_(arena), view_(view), report_(report) {}

  Outcome Run();

 private:
  RequestFrame Request(Op op) const {
    return {.op = op, .fields = view_.fields, .crc_root = view_.crc_root};
  }
  SteadyTime Deadline() const { return DeadlineFor(task_.limits, view_.fields.payload_bytes); }
  Result<std::vector<std::uint32_t>> Agree(PeerConversation* lead);
  Outcome SendFrom(ChunkQueue* queue, PeerConversation* talk);
  void Further(ChunkQueue* queue);

  const PeerTask& task_;
  Arena* const arena_;
  const SlotView& view_;
  PushReport* const report_;
  std::vector<std::uint32_t> crcs_;
  std::mutex mutex_;  // guards the rest and report_ while further streams run
  std::optional<Error> corrupt_;
};

// Tells the table, hears which chunks the peer wants.
Result<std::vector<std::uint32_t>> Pusher::Agree(PeerConversation* lead) {
  Connection& connection = lead->connection;
  const Base base = FindBase(arena_, view_, crcs_, lead->response,
                             std::chrono::steady_clock::now() + task_.limits.io_timeout / 2);
  if (auto ok = SendTable(&connection, crcs_, base.held, base.same); !ok.ok()) return ok.error();
  KillPoint("push.table_sent");
  WantFrame want;
  if (auto ok = connection.Receive(&want, sizeof want); !ok.ok()) return ok.error();
  if (want.magic == kFrameMagic) {  // it refuses
    AckFrame ack;
    std::memcpy(static_cast<void*>(&ack), &want, sizeof want);
    auto refused = lead->FinishAck(task_.key, ack, sizeof want);
    if (!refused.ok()) return refused.error();
  }
  auto chunks = ReceiveWanted(&connection, want, crcs_.size());
  if (!chunks.ok()) return chunks;
  KillPoint("push.want_heard");
  const std::uint64_t spared = crcs_.size() - chunks.value().size();
  const std::uint64_t resumed = std::min<std::uint64_t>(want.resumed, spared);
  report_->resumed_bytes = resumed * kChunkBytes;
  report_->unchanged_bytes = (spared - resumed) * kChunkBytes;
  return chunks;
}

// kStale: the slot was overwritten. Stops early, without error, when the peer has spoken (it
// refuses: its ack says why).
Outcome Pusher::SendFrom(ChunkQueue* queue, PeerConversation* talk) {
  Connection& connection = talk->connection;
  if (task_.traffic != nullptr && task_.traffic->in_flight_bytes() < kUsualInFlight) {
    connection.LimitInFlight(task_.traffic->in_flight_bytes());
  }
  const unsigned char* data = nullptr;
  if (MappingPays(connection, false)) {
    std::lock_guard<std::mutex> lock(mutex_);
    data = arena_->Payload(view_);
  }
  while (const auto chunk = queue->Take()) {
    const bool spoken = connection.Readable();
    if (!spoken && task_.traffic != nullptr &&
        !task_.traffic->Admit(task_.traffic_class, view_.chunk_size(*chunk), task_.cancel)) {
      return Error{ErrorCode::kStale,
                   fmt::format("peer {}: sending: given up here", connection.peer())};
    }
    auto sent = spoken ? Outcome(Done{})
                       : SendChunk(&connection, *arena_, view_, data, *chunk, crcs_[*chunk]);
    if (spoken || !sent.ok()) {
      queue->GiveBack(*chunk);
      return sent;
    }
    KillPoint("push.chunk_sent");
    std::lock_guard<std::mutex> lock(mutex_);
    report_->sent_bytes += view_.chunk_size(*chunk);
  }
  return Done{};
}

// A further stream. What it cannot send others send; only wrong bytes matter to the caller.
void Pusher::Further(ChunkQueue* queue) {
  BlockSigpipe();
  auto talk = Converse(task_, Request(Op::kJoin), Deadline());
  if (!talk.ok()) return;
  KillPoint("push.stream_joined");
  auto done = SendFrom(queue, &talk.value());
  if (done.ok()) done = SendEndOfChunks(&talk.value().connection);
  if (done.ok()) done = talk.value().Ack(task_.key);
  std::lock_guard<std::mutex> lock(mutex_);
  ++report_->streams;
  if (!done.ok() && done.error().code == ErrorCode::kCorrupt) corrupt_ = done.error();
}

Outcome Pusher::Run() {
  auto crcs = ReadChunkCrcs(*arena_, view_);
  if (!crcs.ok()) return crcs.error();
  crcs_ = std::move(crcs.value());
  auto lead = Converse(task_, Request(Op::kPush), Deadline());
  if (!lead.ok()) return lead.error();
  report_->streams = 1;
  if (lead.value().response.status == Status::kHave) {
    report_->resumed_bytes = view_.fields.payload_bytes;
    return Done{};
  }
  auto wanted = Agree(&lead.value());
  if (!wanted.ok()) return wanted.error();
  const std::uint64_t pay = 1 + wanted.value().size() / kStreamPays;
  const auto streams = std::min<std::uint64_t>(pay, static_cast<std::uint64_t>(task_.streams));
  ChunkQueue queue(std::move(wanted.value()));
  std::optional<Traffic::Turn> turn;
  if (task_.traffic != nullptr) turn.emplace(task_.traffic, task_.traffic_class);
  std::vector<std::thread> further;
  for (std::uint64_t i = 1; i < streams; ++i) {
    try {
      further.emplace_back([this, &queue] { Further(&queue); });
    } catch (const std::system_error&) {
      break;  // no thread is free: in fewer streams
    }
  }
  auto sent = SendFrom(&queue, &lead.value());
  for (std::thread& t : further) t.join();
  if (sent.ok() && !further.empty()) sent = SendFrom(&queue, &lead.value());  // what others left
  if (!sent.ok() && sent.error().code == ErrorCode::kStale) return sent;
  if (sent.ok()) sent = SendEndOfChunks(&lead.value().connection);
  KillPoint("push.end_sent");
  // A peer that refuses says why and closes: its word is worth more than the broken pipe.
  auto ack = lead.value().Ack(task_.key);
  KillPoint("push.acknowledged");
  if (!ack.ok() && !arena_->Current(view_)) {
    return Error{ErrorCode::kStale, fmt::format("{}: step {} was overwritten while it was sent",
                                                arena_->Name(), view_.step())};
  }
  if (!ack.ok() && corrupt_) return *corrupt_;
  return ack;
}

}  // namespace

Outcome PushSlot(const PeerTask& task, Arena* arena, const SlotView& view, PushReport* report) {
  return Pusher(task, arena, view, report).Run();
}

}  // namespace everstep::checkpoint
