// What a trainer process (libeverstep.so) says to the keeper to get its arena: fixed-size plain
// structs over the keeper's unix socket, so that the library needs no protobuf.
//
// One request, one reply, on a connection of its own. The first four bytes tell it from a
// length-prefixed KeeperRequest (whose length is at most 4 MiB). The reply carries two descriptors
// by SCM_RIGHTS when error == 0: the arena's memfd, and an eventfd to ring after each capture.
#pragma once

#include <cstdint>

namespace everstep::keeper {

inline constexpr std::uint32_t kAttachMagic = 0xE57E9A11;  // > 4 MiB, never a frame length
inline constexpr std::uint32_t kAttachVersion = 1;

struct AttachRequest {
  std::uint32_t magic = kAttachMagic;
  std::uint32_t version = kAttachVersion;
  char job[132] = {};  // NUL-terminated
  std::int32_t rank = 0;
  std::uint64_t generation = 0;  // EVERSTEP_GENERATION
  std::uint64_t slot_bytes = 0;  // room wanted for one slot at first; 0: attach to what is there
};
static_assert(sizeof(AttachRequest) == 160);

struct AttachReply {
  std::uint32_t magic = kAttachMagic;
  std::int32_t error = 0;  // errno-like; 0 ok
  // What the arena was made with: the wish of whoever attached first. It may be less than this
  // wish; the writer grows the file when a state does not fit (checkpoint/store/arena.h).
  std::uint64_t slot_bytes = 0;
  std::uint64_t total_bytes = 0;  // of the memfd
  char message[232] = {};         // who, what, limit, what to do next
};
static_assert(sizeof(AttachReply) == 256);

}  // namespace everstep::keeper
