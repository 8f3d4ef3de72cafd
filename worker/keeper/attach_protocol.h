// What a trainer process says to the keeper: fixed-size plain structs over the keeper's unix
// socket, so that the trainer needs no protobuf. libeverstep.so attaches to an arena; a worker that
// can be parked (everstep.Session) opens a session.
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

// A session: a connection that a worker keeps open as long as it may be parked. It begins with one
// SessionRequest, answered by an AttachReply without descriptors. From then on:
//
//   keeper:  SessionWord kPark                      leave the collective, end the capture, detach
//            ... milliseconds, in decimal           nobody is lost: in them the step may end
//                                                   first. May come again, with less time
//   worker:  SessionWord kParked                    it holds nothing of that generation any more
//   keeper:  SessionWord kResume, then `bytes` of   the stdout and stderr files, then NAME=VALUE of
//            NUL-terminated texts                   the environment of the new generation
//
// and, at any time while it is not parked:
//
//   worker:  SessionWord kTold, then `bytes`        words for the controller (proto/base/told.h)
//   keeper:  SessionWord kToldAck, then a uint64    its words up to that sequence are durable there
//
// The keeper keeps no word: the worker says again, after a while, what is not acknowledged.
//
// Only the worker itself may ask (its process id, by SO_PEERCRED). A worker that closes its session
// is ended at the next change as one that never opened it.
inline constexpr std::uint32_t kSessionMagic = 0xE57E9A12;
inline constexpr std::uint32_t kSessionVersion = 2;

struct SessionRequest {
  std::uint32_t magic = kSessionMagic;
  std::uint32_t version = kSessionVersion;
  char job[132] = {};  // NUL-terminated
  std::int32_t rank = 0;
  std::uint64_t generation = 0;
};
static_assert(sizeof(SessionRequest) == 152);

enum class SessionWordKind : std::uint32_t {
  kPark = 1,
  kParked = 2,
  kResume = 3,
  kTold = 4,
  kToldAck = 5
};

struct SessionWord {
  std::uint32_t magic = kSessionMagic;
  SessionWordKind kind = SessionWordKind::kPark;
  // kPark: that ends; kParked: that ended; kResume: that begins; kTold, kToldAck: of the worker
  std::uint64_t generation = 0;
  std::uint32_t bytes = 0;  // that follow
  std::uint32_t reserved = 0;
};
static_assert(sizeof(SessionWord) == 24);

}  // namespace everstep::keeper
