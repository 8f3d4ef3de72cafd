#include "checkpoint/transfer/arrival.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <cstring>
#include <utility>

#include "proto/base/kill_point.h"

namespace everstep::checkpoint {

Arrival::Arrival(const SlotFields& fields, std::uint32_t crc_root, const SlotWriter& writer)
    : fields_(fields),
      crc_root_(crc_root),
      writer_(writer),
      states_(ChunkCount(fields.payload_bytes), kLacking) {}

Arrival::Arrival(OfCapture, const SlotFields& fields, const SlotWriter& writer)
    : fields_(fields),
      crc_root_(0),
      ahead_(true),
      writer_(writer),
      states_(ChunkCount(fields.payload_bytes), kLacking) {}

std::shared_ptr<Arrival> Arrival::Ahead(const SlotFields& fields, const SlotWriter& writer) {
  return std::shared_ptr<Arrival>(new Arrival(OfCapture{}, fields, writer));
}

Arrival::Arrival(const SlotFields& fields, std::uint32_t crc_root, const Arrival& ahead)
    : Arrival(fields, crc_root, ahead.writer_) {
  came_ahead_ = ahead.states_;
}

bool Arrival::IsAheadOf(const SlotFields& fields) const {
  return ahead_ && fields_.generation == fields.generation && fields_.step == fields.step &&
         fields_.rank == fields.rank && fields_.world_size == fields.world_size &&
         fields_.captured_ns == fields.captured_ns && fields_.job_crc == fields.job_crc &&
         fields.payload_bytes <= writer_.capacity();
}

// Of what came ahead, chunks that the table names count, whole ones: the last one may have ended
// elsewhere then.
void Arrival::CountAhead() {
  for (std::uint64_t i = 0; i < came_ahead_.size() && i < crcs_.size(); ++i) {
    const bool whole = (i + 1) * kChunkBytes <= fields_.payload_bytes;
    if (came_ahead_[i] != kVerified || !whole || writer_.ChunkCrc(i) != crcs_[i]) continue;
    states_[i] = kVerified;
    ++verified_;
  }
  came_ahead_.clear();
}

bool Arrival::Is(const SlotFields& fields, std::uint32_t crc_root) const {
  return !ahead_ && crc_root_ == crc_root && std::memcmp(&fields_, &fields, sizeof fields) == 0;
}

void Arrival::SetTable(std::vector<std::uint32_t> crcs) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!crcs_.empty()) return;
  crcs_ = std::move(crcs);
  CountAhead();
}

bool Arrival::Claim(std::uint64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (states_[chunk] != kLacking) return false;
  states_[chunk] = kArriving;
  return true;
}

void Arrival::Verified(std::uint64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  states_[chunk] = kVerified;
  ++verified_;
}

void Arrival::Unclaim(std::uint64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  states_[chunk] = kLacking;
}

std::uint64_t Arrival::verified() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return verified_;
}

Bitmap Arrival::Lacking() const {
  std::lock_guard<std::mutex> lock(mutex_);
  Bitmap bits(BitmapBytes(states_.size()));
  for (std::uint64_t i = 0; i < states_.size(); ++i) {
    if (states_[i] == kLacking) SetBit(&bits, i);
  }
  return bits;
}

void Arrival::Open() {
  std::lock_guard<std::mutex> lock(mutex_);
  open_ = true;
}

bool Arrival::Join(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!open_) return false;
  streams_.insert(fd);
  return true;
}

void Arrival::Leave(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  streams_.erase(fd);
  if (streams_.empty()) left_.notify_all();
}

void Arrival::Break() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const int fd : streams_) shutdown(fd, SHUT_RDWR);
}

void Arrival::Close(bool broken) {
  std::unique_lock<std::mutex> lock(mutex_);
  open_ = false;
  if (broken) {
    for (const int fd : streams_) shutdown(fd, SHUT_RDWR);
  }
  left_.wait(lock, [this] { return streams_.empty(); });
}

namespace {

// Claims, receives, verifies one chunk. kInvalid: it is there, or another connection is at it.
Outcome TakeChunk(Connection* connection, Arrival* arrival, const ChunkFrame& frame) {
  if (!arrival->Claim(frame.index)) {
    return Error{ErrorCode::kInvalid,
                 fmt::format("peer {}: chunk {} of step {} of rank {} comes a second time",
                             connection->peer(), frame.index, arrival->fields().step,
                             arrival->fields().rank)};
  }
  if (auto ok = ReceiveChunk(connection, arrival->fields(), frame, arrival->writer()); !ok.ok()) {
    arrival->Unclaim(frame.index);
    return ok;
  }
  arrival->Verified(frame.index);
  return Done{};
}

}  // namespace

Outcome ReceiveAhead(Connection* connection, Arrival* arrival, std::uint64_t* chunk) {
  for (;;) {
    ChunkFrame frame;
    if (auto ok = connection->Receive(&frame, sizeof frame); !ok.ok()) return ok;
    if (frame.magic == kFrameMagic && frame.index == kEndOfChunks && frame.bytes == 0) {
      return Done{};
    }
    if (frame.magic != kFrameMagic || frame.bytes != kChunkBytes ||
        frame.index >= arrival->fields().payload_bytes / kChunkBytes) {
      return Error{ErrorCode::kInvalid,
                   fmt::format("peer {}: a frame for chunk {} of {} bytes ahead of the table, of a "
                               "capture of {} bytes",
                               connection->peer(), frame.index, frame.bytes,
                               arrival->fields().payload_bytes)};
    }
    *chunk = frame.index;
    if (auto ok = TakeChunk(connection, arrival, frame); !ok.ok()) return ok;
    KillPoint("arrive.ahead_verified");
  }
}

Outcome ReceiveInto(Connection* connection, Arrival* arrival, std::uint64_t* chunk) {
  for (;;) {
    const auto frame = ReceiveChunkFrame(connection, arrival->fields(), arrival->crcs());
    if (!frame.ok()) return frame.error();
    if (frame.value().index == kEndOfChunks) return Done{};
    *chunk = frame.value().index;
    if (auto ok = TakeChunk(connection, arrival, frame.value()); !ok.ok()) return ok;
    KillPoint("arrive.chunk_verified");
  }
}

}  // namespace everstep::checkpoint
