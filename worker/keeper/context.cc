#include "worker/keeper/context.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include <cerrno>

namespace everstep::keeper {

std::int64_t WallNanos() {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

OwnedFd StatusPipe::Open(OnLine on_line) {
  Close();
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return OwnedFd();
  read_ = OwnedFd(ends[0]);
  ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  on_line_ = std::move(on_line);
  token_ = context_->loop.Add(ends[0], EPOLLIN, [this](std::uint32_t) { Read(); });
  return OwnedFd(ends[1]);
}

void StatusPipe::Close() {
  if (token_ != 0) context_->loop.Remove(token_);
  token_ = 0;
  read_.Close();
  buffer_.clear();
}

void StatusPipe::Finish() {
  if (token_ == 0) return;
  ::shutdown(read_.get(), SHUT_RD);
  // A handler may close or destroy this object.
  Loop* const loop = &context_->loop;
  for (const Loop::Token token = token_; loop->Has(token);) Read();
}

void StatusPipe::Read() {
  constexpr std::size_t kMaxLine = std::size_t{64} * 1024;
  char piece[4096];
  ssize_t n;
  do {
    n = ::read(read_.get(), piece, sizeof(piece));
  } while (n < 0 && errno == EINTR);
  if (n < 0 && errno == EAGAIN) return;
  if (n > 0) buffer_.append(piece, static_cast<std::size_t>(n));
  if (buffer_.size() > kMaxLine) buffer_.resize(kMaxLine);
  // A handler may close or destroy this object: no member is touched after the last call.
  const Loop::Token token = token_;
  const OnLine on_line = on_line_;
  std::size_t end;
  while ((end = buffer_.find('\n')) != std::string::npos) {
    const std::string line = buffer_.substr(0, end);
    buffer_.erase(0, end + 1);
    Context* context = context_;
    on_line(line, false);
    if (!context->loop.Has(token)) return;
  }
  if (n > 0) return;
  const std::string rest = buffer_;
  Close();
  on_line(rest, true);
}

}  // namespace everstep::keeper
