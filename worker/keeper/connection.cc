#include "worker/keeper/connection.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

namespace everstep::keeper {

bool Connection::Read() {
  char buffer[64 * 1024];
  // Nobody may hand descriptors to the keeper: what comes is closed.
  const std::ptrdiff_t n = Receive(socket_.get(), buffer, sizeof(buffer), nullptr);
  if (n == -EAGAIN) return true;
  if (n <= 0) return false;
  reader_.Append(std::string_view(buffer, static_cast<std::size_t>(n)));
  return true;
}

void Connection::Send(const everstep::v1::KeeperReply& reply, const std::vector<int>& descriptors) {
  if (reply.ByteSizeLong() <= kMaxReplyBytes) {
    SendRaw(EncodeFrame(reply), descriptors);
    return;
  }
  everstep::v1::KeeperReply refusal;
  refusal.set_id(reply.id());
  refusal.set_error(EMSGSIZE);
  refusal.set_message("the keeper's answer is over 16 MiB; forget ended jobs to make it smaller");
  SendRaw(EncodeFrame(refusal));
}

void Connection::SendRaw(std::string bytes, const std::vector<int>& descriptors) {
  if (broken) return;
  if (queued_ + bytes.size() > kMaxQueuedBytes) {
    broken = true;
    return;
  }
  queued_ += bytes.size();
  Pending pending{std::move(bytes), 0, {}};
  for (const int fd : descriptors)
    pending.descriptors.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
  out_.push_back(std::move(pending));
  if (!Flush()) broken = true;
}

bool Connection::Flush() {
  while (!out_.empty()) {
    Pending& next = out_.front();
    std::vector<int> numbers;
    for (const OwnedFd& fd : next.descriptors) numbers.push_back(fd.get());
    const std::ptrdiff_t n =
        keeper::Send(socket_.get(), std::string_view(next.bytes).substr(next.sent), numbers);
    if (n == -EAGAIN) return true;
    if (n < 0) return false;
    next.descriptors.clear();
    next.sent += static_cast<std::size_t>(n);
    queued_ -= static_cast<std::size_t>(n);
    if (next.sent == next.bytes.size()) out_.pop_front();
  }
  return true;
}

}  // namespace everstep::keeper
