#include "worker/keeper/framing.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "proto/base/check.h"

namespace everstep::keeper {

std::string EncodeFrame(const google::protobuf::MessageLite& message) {
  const std::size_t size = message.ByteSizeLong();
  EVERSTEP_CHECK(size <= kMaxReplyBytes, "a frame of the keeper's protocol is over 16 MiB");
  std::string out(4, '\0');
  for (int i = 0; i < 4; ++i) out[static_cast<std::size_t>(i)] = static_cast<char>(size >> (8 * i));
  message.AppendToString(&out);
  return out;
}

FrameReader::Result FrameReader::Pop(std::string* frame) {
  const std::string_view rest = pending();
  if (rest.size() < 4) return Result::kMore;
  announced_ = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    announced_ |= static_cast<std::uint32_t>(static_cast<unsigned char>(rest[i])) << (8 * i);
  }
  if (announced_ > limit_) return Result::kTooLong;
  if (rest.size() < 4 + announced_) return Result::kMore;
  frame->assign(rest.substr(4, announced_));
  Skip(4 + announced_);
  return Result::kFrame;
}

void FrameReader::Skip(std::size_t bytes) {
  begin_ += bytes;
  if (begin_ == buffer_.size()) {
    buffer_.clear();
    begin_ = 0;
  } else if (begin_ > std::size_t{64} * 1024) {
    buffer_.erase(0, begin_);
    begin_ = 0;
  }
}

std::ptrdiff_t Receive(int socket, char* buffer, std::size_t size,
                       std::vector<OwnedFd>* descriptors) {
  iovec io{buffer, size};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
  msghdr message{};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t n;
  do {
    n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return -errno;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      if (descriptors != nullptr) {
        descriptors->emplace_back(fd);
      } else {
        ::close(fd);
      }
    }
  }
  return n;
}

std::ptrdiff_t Send(int socket, std::string_view bytes, std::span<const int> descriptors) {
  EVERSTEP_CHECK(descriptors.size() <= kMaxDescriptors);
  iovec io{const_cast<char*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(c), descriptors.data(), descriptors.size_bytes());
  }
  ssize_t n;
  do {
    n = ::sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  return n < 0 ? -errno : n;
}

}  // namespace everstep::keeper
