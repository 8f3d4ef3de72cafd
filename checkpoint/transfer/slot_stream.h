// The middle of a connection, the same for push, join and fetch: a slot's chunk table and its
// chunks, from a memfd to a socket and from a socket into a slot, each chunk checked against the
// table as it arrives. No allocation for a chunk; the table is the only thing whose size follows
// the slot's (4 bytes and 2 bits for each MiB).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/store/arena.h"
#include "checkpoint/store/slot_writer.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/socket.h"

namespace everstep::checkpoint {

// One bit a chunk, the lowest of a byte first.
using Bitmap = std::vector<std::uint8_t>;
inline bool BitOf(const Bitmap& bits, std::uint64_t i) {
  return (bits[i / 8] >> (i % 8) & 1) != 0;
}
inline void SetBit(Bitmap* bits, std::uint64_t i) {
  (*bits)[i / 8] = static_cast<std::uint8_t>((*bits)[i / 8] | 1u << (i % 8));
}

// A slot's chunk CRCs, read without mapping its memory. kStale: overwritten meanwhile.
Result<std::vector<std::uint32_t>> ReadChunkCrcs(const Arena& arena, const SlotView& view);

// Which chunks of `view`, whose CRCs are `crcs`, lie in `older` as well, another content of the
// same arena: compared byte by byte where the CRCs agree (32 bits alone would not do for ever).
// Empty: none, or one of the two was overwritten meanwhile. What is not compared by `until` counts
// as changed: somebody waits. Maps the slots that it compares.
Bitmap SameChunks(Arena* arena, const SlotView& view, const std::vector<std::uint32_t>& crcs,
                  const SlotView& older, SteadyTime until);
// How a peer is told of a slot, and whether what it was told of is this one.
HeldFrame ToHeld(const SlotView& view);
bool IsHeld(const HeldFrame& held, const SlotFields& fields, std::uint32_t crc_root);

// `same` empty: no base.
Outcome SendTable(Connection* connection, const std::vector<std::uint32_t>& crcs,
                  std::uint32_t base = kNoBase, const Bitmap& same = {});
struct ChunkTable {
  std::vector<std::uint32_t> crcs;
  std::uint32_t base = kNoBase;
  Bitmap same;
};
// kCorrupt: the CRCs and `fields` do not give `crc_root`.
Result<ChunkTable> ReceiveTable(Connection* connection, const SlotFields& fields,
                                std::uint32_t crc_root);

// Which chunks are wanted, after a table: one bit each. `resumed`: arrived on an earlier
// connection.
Outcome SendWant(Connection* connection, std::uint64_t chunks, const Bitmap& wanted,
                 std::uint64_t resumed = 0);
// What follows a Want: the wanted chunks, ascending. kInvalid: it is of another slot than one of so
// many chunks.
Result<std::vector<std::uint32_t>> ReceiveWanted(Connection* connection, const WantFrame& want,
                                                 std::uint64_t chunks);

// One chunk, as it lies in memory at that moment: a slot that is overwritten meanwhile arrives with
// a wrong CRC and is refused there. `data`: the slot's mapped payload, copied into the socket;
// null: the pages go there by themselves (sendfile).
Outcome SendChunk(Connection* connection, const Arena& arena, const SlotView& view,
                  const unsigned char* data, std::uint64_t chunk, std::uint32_t crc);
// The same of a slot that need not be whole: the caller knows that this chunk is.
Outcome SendChunkBytes(Connection* connection, const Arena& arena, const SlotView& view,
                       const unsigned char* data, std::uint64_t chunk, std::uint32_t crc);
Outcome SendEndOfChunks(Connection* connection);
// On the same host a byte that is copied into the socket is read from the cache by its receiver,
// one that is lent to it from memory: mapping pays. Not for one of several streams when not each of
// their threads has a core: then the copy takes from the others. To another host the network card
// reads it.
bool MappingPays(const Connection& connection, bool one_of_several);

// The next chunk's frame, checked against the table; index kEndOfChunks ends the stream.
Result<ChunkFrame> ReceiveChunkFrame(Connection* connection, const SlotFields& fields,
                                     const std::vector<std::uint32_t>& crcs);
// Its bytes, into `to`. kCorrupt: not those of frame.crc.
Outcome ReceiveChunkBytes(Connection* connection, const SlotFields& fields, const ChunkFrame& frame,
                          unsigned char* to);
// Its bytes, into the writer's slot. kCorrupt: not those of frame.crc.
Outcome ReceiveChunk(Connection* connection, const SlotFields& fields, const ChunkFrame& frame,
                     SlotWriter* writer);
// ... or nowhere.
Outcome SkipChunk(Connection* connection, const ChunkFrame& frame);

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
