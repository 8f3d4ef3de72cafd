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

bool Arrival::Is(const SlotFields& fields, std::uint32_t crc_root) const {
  return crc_root_ == crc_root && std::memcmp(&fields_, &fields, sizeof fields) == 0;
}

void Arrival::SetTable(std::vector<std::uint32_t> crcs) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (crcs_.empty()) crcs_ = std::move(crcs);
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

Outcome ReceiveInto(Connection* connection, Arrival* arrival, std::uint64_t* chunk) {
  for (;;) {
    const auto frame = ReceiveChunkFrame(connection, arrival->fields(), arrival->crcs());
    if (!frame.ok()) return frame.error();
    if (frame.value().index == kEndOfChunks) return Done{};
    *chunk = frame.value().index;
    if (!arrival->Claim(*chunk)) {
      return Error{
          ErrorCode::kInvalid,
          fmt::format("peer {}: chunk {} of step {} of rank {} comes a second time",
                      connection->peer(), *chunk, arrival->fields().step, arrival->fields().rank)};
    }
    if (auto ok = ReceiveChunk(connection, arrival->fields(), frame.value(), arrival->writer());
        !ok.ok()) {
      arrival->Unclaim(*chunk);
      return ok;
    }
    arrival->Verified(*chunk);
    KillPoint("arrive.chunk_verified");
  }
}

}  // namespace everstep::checkpoint
