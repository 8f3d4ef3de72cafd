// Frames of proto/keeper.proto over a unix stream socket: uint32 little-endian length, then the
// message. Both ends use this. Descriptors travel with the first byte of the frame that announces
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <google/protobuf/message_lite.h>

#include "worker/keeper/fd.h"

namespace everstep::keeper {

inline constexpr std::size_t kMaxFrameBytes = 4u << 20;  // a request
inline constexpr std::size_t kMaxReplyBytes = 16u
                                              << 20;  // a reply: KeeperState holds the memory too
inline constexpr std::size_t kMaxDescriptors = 4;     // in one frame

// Length and message. REQUIRES a message of at most kMaxReplyBytes.
std::string EncodeFrame(const google::protobuf::MessageLite& message);

// Reassembles frames from whatever pieces the socket gives. Holds at most one frame and one piece.
class FrameReader {
 public:
  enum class Result { kFrame, kMore, kTooLong };

  explicit FrameReader(std::size_t limit) : limit_(limit) {}

  void Append(std::string_view piece) { buffer_.append(piece); }
  // kTooLong: the peer announced more than the limit; announced() tells how much.
  Result Pop(std::string* frame);
  // Takes bytes that are pending: of messages that are no frames. REQUIRES as many of them.
  void Skip(std::size_t bytes);
  std::uint32_t announced() const { return announced_; }
  // First bytes that arrived and were not popped yet.
  std::string_view pending() const { return std::string_view(buffer_).substr(begin_); }

 private:
  std::size_t limit_;
  std::string buffer_;
  std::size_t begin_ = 0;
  std::uint32_t announced_ = 0;
};

// One recvmsg. Returns bytes, 0 at the end of the stream, or -errno. Descriptors come
// close-on-exec.
std::ptrdiff_t Receive(int socket, char* buffer, std::size_t size,
                       std::vector<OwnedFd>* descriptors);

// One sendmsg, never SIGPIPE. Returns bytes sent or -errno. `descriptors` (at most kMaxDescriptors)
// go with the first byte.
std::ptrdiff_t Send(int socket, std::string_view bytes, std::span<const int> descriptors);

}  // namespace everstep::keeper
