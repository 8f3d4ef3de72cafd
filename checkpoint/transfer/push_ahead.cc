// Chunks of a capture to a peer while the trainer still writes it.
//
// Nothing that is sent here counts by itself: the peer keeps the chunks in a torn slot, and of them
// those count whose CRC the finished slot's table names. So whatever becomes of the capture, it may
// be read here without a lock: a chunk that was overwritten meanwhile arrives with a wrong CRC, or
// is not in the table.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <optional>

#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

constexpr timespec kLook{0, 100'000};  // how often, while the next chunk is written
// The capture waits for something, or its trainer died.
constexpr std::chrono::milliseconds kStill{50};
// The peer has no place for it yet.
constexpr std::chrono::milliseconds kAskWithin{1000};
constexpr long kAskAgainNs = 2'000'000;  // doubled each time, up to kMostBetweenNs
constexpr long kMostBetweenNs = 32'000'000;

std::optional<std::uint32_t> CrcOf(const Arena& arena, const SlotView& view, std::uint64_t chunk) {
  std::uint32_t crc = 0;
  const std::uint64_t at = view.extent_offset + ExtentCapacity(view.extent_bytes) + 4 * chunk;
  if (pread(arena.fd(), &crc, sizeof crc, static_cast<off_t>(at)) != sizeof crc) {
    return std::nullopt;
  }
  return crc;
}

class Follower {
 public:
  Follower(const PeerTask& task, Arena* arena, const CaptureUnderWay& capture)
      : task_(task), arena_(arena), capture_(capture), older_(arena->Look(1 - capture.view.slot)) {}

  Outcome Run();

 private:
  // kUnavailable is asked again while the capture goes on, for kAskWithin: the peer is at the end
  // of the push before, or has not heard yet that it is committed.
  Result<PeerConversation> Ask();
  // The next chunk is written. False: no more will be, or not soon, or the peer has spoken.
  bool Await(const Connection& connection, std::uint64_t chunk);
  // Likely as in the slot before: the push compares the bytes, and the peer copies them itself.
  bool Unchanged(std::uint64_t chunk, std::uint32_t crc) const {
    return older_ && chunk < older_->chunks() && older_->chunk_size(chunk) == kChunkBytes &&
           CrcOf(*arena_, *older_, chunk) == crc;
  }

  const PeerTask& task_;
  Arena* const arena_;
  const CaptureUnderWay& capture_;
  const std::optional<SlotView> older_;
};

Result<PeerConversation> Follower::Ask() {
  const SlotFields& fields = capture_.view.fields;
  const auto until = std::chrono::steady_clock::now() + kAskWithin;
  long pause = kAskAgainNs;
  for (;;) {
    auto talk = Converse(task_, {.op = Op::kAhead, .fields = fields},
                         DeadlineFor(task_.limits, fields.payload_bytes));
    const bool later = !talk.ok() && talk.error().code == ErrorCode::kUnavailable;
    if (!later || std::chrono::steady_clock::now() >= until ||
        (task_.cancel != nullptr && *task_.cancel) || !ChunksWritten(*arena_, capture_)) {
      return talk;
    }
    const timespec between{0, pause};
    nanosleep(&between, nullptr);
    pause = std::min(2 * pause, kMostBetweenNs);
  }
}

bool Follower::Await(const Connection& connection, std::uint64_t chunk) {
  const auto until = std::chrono::steady_clock::now() + kStill;
  for (;;) {
    const auto written = ChunksWritten(*arena_, capture_);
    if (!written || connection.Readable()) return false;
    if (chunk < *written) return true;
    if (std::chrono::steady_clock::now() >= until || (task_.cancel != nullptr && *task_.cancel)) {
      return false;
    }
    nanosleep(&kLook, nullptr);
  }
}

Outcome Follower::Run() {
  const SlotView& view = capture_.view;
  const std::uint64_t whole = view.fields.payload_bytes / kChunkBytes;
  auto talk = Ask();
  if (!talk.ok()) return talk.error();
  Connection& connection = talk.value().connection;
  std::optional<Traffic::Turn> turn;
  if (task_.traffic != nullptr) {
    turn.emplace(task_.traffic, task_.traffic_class);
    if (task_.traffic->in_flight_bytes() < kUsualInFlight) {
      connection.LimitInFlight(task_.traffic->in_flight_bytes());
    }
  }
  const unsigned char* data = MappingPays(connection, false) ? arena_->Payload(view) : nullptr;
  for (std::uint64_t i = 0; i < whole && Await(connection, i); ++i) {
    const auto crc = CrcOf(*arena_, view, i);
    if (!crc) break;
    if (Unchanged(i, *crc)) continue;
    if (task_.traffic != nullptr &&
        !task_.traffic->Admit(task_.traffic_class, kChunkBytes, task_.cancel)) {
      return Error{ErrorCode::kStale,
                   fmt::format("peer {}: sending: given up here", connection.peer())};
    }
    if (!ChunksWritten(*arena_, capture_)) break;  // what lies there now is another capture's
    if (auto ok = SendChunkBytes(&connection, *arena_, view, data, i, *crc); !ok.ok()) break;
    KillPoint("push.ahead_sent");
  }
  (void)SendEndOfChunks(&connection);
  return talk.value().Ack(task_.key);
}

}  // namespace

Outcome PushAhead(const PeerTask& task, Arena* arena, const CaptureUnderWay& capture) {
  return Follower(task, arena, capture).Run();
}

}  // namespace everstep::checkpoint
