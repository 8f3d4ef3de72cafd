// The middle of a connection, the same for push and fetch: a slot's chunks from a memfd to a
// socket, and from a socket into a slot, each checked against its CRC as it arrives.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/socket.h"

namespace everstep::checkpoint {

// A slot's chunk CRCs, read without mapping its memory. kStale: overwritten meanwhile.
Result<std::vector<std::uint32_t>> ReadChunkCrcs(const Arena& arena, const SlotView& view);

// Sends chunks [first, end). The bytes go out as they lie in memory at that moment: a slot that is
// overwritten meanwhile arrives with a wrong CRC and is refused there.
// kStale: noticed here. Stops early, without error, when the peer has spoken (it refuses).
Outcome SendChunks(Connection* connection, const Arena& arena, const SlotView& view,
                   const std::vector<std::uint32_t>& crcs, std::uint64_t first);

// Receives chunks [*next, end) into the writer's slot. *next moves behind each verified chunk, so
// that a later connection can resume there. kCorrupt: chunk *next failed its CRC.
Outcome ReceiveChunks(Connection* connection, const SlotFields& fields, SlotWriter* writer,
                      std::uint64_t* next);

// The part of `whole` that fits a fixed text field, NUL-terminated.
template <std::size_t N>
void PutText(char (&field)[N], const std::string& whole) {
  const std::size_t n = whole.size() < N - 1 ? whole.size() : N - 1;
  for (std::size_t i = 0; i < n; ++i) field[i] = whole[i];
  for (std::size_t i = n; i < N; ++i) field[i] = '\0';
}
template <std::size_t N>
std::string GetText(const char (&field)[N]) {
  std::size_t n = 0;
  while (n < N && field[n] != '\0') ++n;
  return std::string(field, n);
}

Status ToStatus(ErrorCode code);
Error FromStatus(Status status, const std::string& message);

}  // namespace everstep::checkpoint
