#include "checkpoint/transfer/relay.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "checkpoint/core/swarm.h"
#include "checkpoint/transfer/slot_stream.h"
#include "proto/base/kill_point.h"

namespace everstep::checkpoint {
namespace {

static_assert(kPassedOnBytes == kChunkBytes);
constexpr std::chrono::milliseconds kLookForPeer{50};  // while nothing is there to be sent

}  // namespace

Relay::Relay(Arena arena, const SlotView& view, std::vector<std::uint32_t> crcs,
             std::vector<std::uint8_t> have)
    : arena_(std::move(arena)), view_(view), crcs_(std::move(crcs)), have_(std::move(have)) {
  have_.resize(crcs_.size());
}

Result<Arena> Relay::Memory() const {
  const int fd = fcntl(arena_.fd(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return Error{ErrorCode::kInternal, arena_.Name() + ": no descriptor is free"};
  return Arena::Open(fd);
}

void Relay::Verified(std::uint64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  have_[chunk] = 1;
  changed_.notify_all();
}

void Relay::End(bool published) {
  std::lock_guard<std::mutex> lock(mutex_);
  over_ = !published;
  changed_.notify_all();
}

Relay::Chunk Relay::AwaitChunk(std::uint64_t chunk, SteadyTime until) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, until, [&] { return over_ || have_[chunk] != 0; });
  // Torn by this restore, or published by it and not touched since.
  const std::uint64_t seq = arena_.header()->slot[view_.slot].seq.load(std::memory_order_acquire);
  if (over_ || seq < view_.seq || seq > view_.seq + 1) return Chunk::kOver;
  return have_[chunk] != 0 ? Chunk::kHere : Chunk::kLacking;
}

bool RelayTable::Open(const RelayKey& key, const std::shared_ptr<Relay>& relay) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!relays_.try_emplace(key, relay).second) return false;
  changed_.notify_all();
  return true;
}

void RelayTable::Close(const RelayKey& key, const Relay* relay) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = relays_.find(key);
  if (it == relays_.end() || it->second.get() != relay) return;
  relays_.erase(it);
  ++closed_;
  changed_.notify_all();
}

std::shared_ptr<Relay> RelayTable::Await(const RelayKey& key, SteadyTime until) {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::uint64_t closed = closed_;
  auto it = relays_.end();
  changed_.wait_until(lock, until, [&] {
    it = relays_.find(key);
    return it != relays_.end() || closed_ != closed;
  });
  return it == relays_.end() ? nullptr : it->second;
}

Outcome ServeRelay(PeerSession* session, Relay* relay, SteadyTime deadline) {
  Connection* connection = session->connection();
  const SlotView& view = relay->view();
  const RequestFrame& request = session->request();
  auto memory = relay->Memory();
  if (!memory.ok()) return session->Refuse(Status::kInternal, memory.error().message);
  connection->set_deadline(deadline);
  if (auto ok = session->Respond({.fields = view.fields, .crc_root = view.crc_root}); !ok.ok()) {
    return ok;
  }
  KillPoint("serve.relay_responded");
  if (auto ok = SendTable(connection, relay->crcs()); !ok.ok()) return ok;
  const std::uint64_t chunks = relay->crcs().size();
  const std::uint64_t end =
      request.end_chunk == 0 ? chunks : std::min<std::uint64_t>(request.end_chunk, chunks);
  const bool part = request.first_chunk > 0 || end < chunks;
  const unsigned char* data =
      MappingPays(*connection, part) ? memory.value().Payload(view) : nullptr;
  for (std::uint64_t i = request.first_chunk; i < end;) {
    if (connection->Readable()) return Done{};  // it has left
    const SteadyTime now = std::chrono::steady_clock::now();
    switch (relay->AwaitChunk(i, std::min(now + kLookForPeer, deadline))) {
      case Relay::Chunk::kLacking:
        if (now < deadline) continue;
        return Error{ErrorCode::kTimedOut, "what it waits for does not come"};
      case Relay::Chunk::kOver:
        return Error{ErrorCode::kStale, "the restore that brought it was given up"};
      case Relay::Chunk::kHere: break;
    }
    if (auto ok = SendChunkBytes(connection, memory.value(), view, data, i, relay->crcs()[i]);
        !ok.ok()) {
      return ok;
    }
    KillPoint("serve.relay_chunk_sent");
    ++i;
  }
  return SendEndOfChunks(connection);
}

}  // namespace everstep::checkpoint
