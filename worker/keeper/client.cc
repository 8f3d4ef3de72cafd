#include "worker/keeper/client.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "worker/keeper/framing.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

OwnedFd ConnectTo(const std::string& path, int* error) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    *error = ENAMETOOLONG;
    return OwnedFd();
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket ||
      ::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    *error = errno;
    return OwnedFd();
  }
  return socket;
}

// Milliseconds until `deadline` (monotonic ns), at least 0, for poll().
int Left(std::int64_t deadline) {
  const std::int64_t ms = (deadline - MonotonicNanos()) / 1'000'000;
  return ms < 0 ? 0 : static_cast<int>(std::min<std::int64_t>(ms, 60'000));
}

}  // namespace

// The reader thread owns reading; writers share a mutex. Held by the Client and by the thread.
class Client::Impl : public std::enable_shared_from_this<Client::Impl> {
 public:
  explicit Impl(ClientOptions options)
      : options_(std::move(options)), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  bool Begin(v1::KeeperState* state, ConnectError* error);
  void StartReader() {
    reader_ = std::thread([this] { ReadLoop(); });
  }
  void Stop();
  void Send(v1::KeeperRequest request, std::function<void(Reply)> done);

 private:
  bool WriteAll(const std::string& bytes, std::int64_t deadline);
  // Pops one reply; false: more bytes are needed. *bad: the stream makes no sense.
  bool PopReply(Reply* reply, bool* bad);
  // false: end of stream or error.
  bool ReadMore();
  void ReadLoop();
  void Lose(const std::string& why);

  ClientOptions options_;
  OwnedFd socket_;
  OwnedFd wake_;
  FrameReader frames_{kMaxReplyBytes};
  std::vector<OwnedFd> descriptors_;  // arrived, not yet claimed by a reply
  std::mutex write_mutex_;
  std::mutex mutex_;
  bool lost_ = false;  // guarded by mutex_, as the next two
  std::uint64_t next_id_ = 2;
  std::map<std::uint64_t, std::function<void(Reply)>> waiting_;
  std::atomic<bool> stopping_{false};
  std::thread reader_;
};

bool Client::Impl::WriteAll(const std::string& bytes, std::int64_t deadline) {
  std::string_view rest = bytes;
  while (!rest.empty()) {
    const std::ptrdiff_t n = keeper::Send(socket_.get(), rest, {});
    if (n > 0) {
      rest.remove_prefix(static_cast<std::size_t>(n));
      continue;
    }
    if (n != -EAGAIN) return false;
    const int left = Left(deadline);
    pollfd p{socket_.get(), POLLOUT, 0};
    if (left == 0 || ::poll(&p, 1, left) <= 0) return false;
  }
  return true;
}

bool Client::Impl::PopReply(Reply* reply, bool* bad) {
  std::string frame;
  *bad = false;
  switch (frames_.Pop(&frame)) {
    case FrameReader::Result::kMore: return false;
    case FrameReader::Result::kTooLong: *bad = true; return false;
    case FrameReader::Result::kFrame: break;
  }
  reply->descriptors.clear();
  if (!reply->message.ParseFromString(frame)) {
    *bad = true;
    return false;
  }
  if (reply->message.has_arena() && reply->message.arena().total_bytes() > 0) {
    if (descriptors_.size() < 2) {
      *bad = true;
      return false;
    }
    reply->descriptors.push_back(std::move(descriptors_[0]));
    reply->descriptors.push_back(std::move(descriptors_[1]));
    descriptors_.erase(descriptors_.begin(), descriptors_.begin() + 2);
  }
  return true;
}

bool Client::Impl::ReadMore() {
  char buffer[64 * 1024];
  const std::ptrdiff_t n = Receive(socket_.get(), buffer, sizeof(buffer), &descriptors_);
  if (n == -EAGAIN) return true;
  if (n <= 0) return false;
  frames_.Append(std::string_view(buffer, static_cast<std::size_t>(n)));
  return true;
}

bool Client::Impl::Begin(v1::KeeperState* state, ConnectError* error) {
  const std::int64_t deadline = MonotonicNanos() + options_.timeout.count();
  int problem = 0;
  socket_ = ConnectTo(options_.socket_path, &problem);
  if (!socket_) {
    const bool nobody = problem == ENOENT || problem == ECONNREFUSED;
    *error = {nobody ? ConnectError::kNoKeeper : ConnectError::kBroken,
              fmt::format("no keeper at {}: {}", options_.socket_path, ErrnoText(problem))};
    return false;
  }
  v1::KeeperRequest request;
  request.set_id(1);
  request.mutable_hello()->set_owner(options_.owner);
  request.mutable_hello()->set_protocol_version(kKeeperProtocolVersion);
  *error = {ConnectError::kBroken,
            fmt::format("the keeper at {} does not answer within {} ms", options_.socket_path,
                        ToMilliseconds(options_.timeout))};
  if (!WriteAll(EncodeFrame(request), deadline)) return false;
  Reply reply;
  bool bad = false;
  while (!PopReply(&reply, &bad)) {
    if (bad) {
      error->message = fmt::format("what answers at {} is no keeper", options_.socket_path);
      return false;
    }
    pollfd p{socket_.get(), POLLIN, 0};
    const int left = Left(deadline);
    if (left == 0 || ::poll(&p, 1, left) <= 0) return false;
    if (!ReadMore()) {
      // It ends while we greet it: the next one will have to be started.
      *error = {ConnectError::kNoKeeper,
                fmt::format("the keeper at {} ended while it was greeted", options_.socket_path)};
      return false;
    }
  }
  if (reply.message.error() != 0 || !reply.message.has_state()) {
    *error = {ConnectError::kRefused, reply.message.message()};
    return false;
  }
  *state = reply.message.state();
  *error = {};
  return true;
}

void Client::Impl::ReadLoop() {
  Reply reply;
  while (!stopping_) {
    bool bad = false;
    while (!stopping_ && PopReply(&reply, &bad)) {
      if (reply.message.id() == 0) {
        if (reply.message.error() != 0) {
          Lose(reply.message.message());
          return;
        }
        if (options_.on_event) options_.on_event(std::move(reply));
      } else {
        std::function<void(Reply)> done;
        {
          std::lock_guard<std::mutex> lock(mutex_);
          if (const auto it = waiting_.find(reply.message.id()); it != waiting_.end()) {
            done = std::move(it->second);
            waiting_.erase(it);
          }
        }
        if (done) done(std::move(reply));
      }
      reply = Reply();
    }
    if (bad) {
      Lose("the keeper sent what is no reply");
      return;
    }
    pollfd p[2] = {{socket_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    if (::poll(p, 2, -1) < 0 && errno != EINTR) break;
    if (stopping_) break;
    if (p[0].revents != 0 && !ReadMore()) {
      Lose("the keeper closed the connection");
      return;
    }
  }
  Lose("the client was closed");
}

void Client::Impl::Lose(const std::string& why) {
  std::map<std::uint64_t, std::function<void(Reply)>> waiting;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    lost_ = true;
    waiting.swap(waiting_);
  }
  ::shutdown(socket_.get(), SHUT_RDWR);
  for (auto& [id, done] : waiting) {
    Reply reply;
    reply.message.set_id(id);
    reply.message.set_error(ENOTCONN);
    reply.message.set_message("the keeper is gone: " + why);
    if (done) done(std::move(reply));
  }
  if (!stopping_ && options_.on_lost) options_.on_lost(why);
}

void Client::Impl::Send(v1::KeeperRequest request, std::function<void(Reply)> done) {
  const auto refuse = [&](int error, std::string text) {
    Reply reply;
    reply.message.set_id(request.id());
    reply.message.set_error(error);
    reply.message.set_message(std::move(text));
    if (done) done(std::move(reply));
  };
  if (request.ByteSizeLong() + 16 > kMaxFrameBytes) {
    refuse(EMSGSIZE,
           fmt::format("a request of {} bytes to the keeper is over its limit of {}; make the "
                       "job's environment smaller",
                       request.ByteSizeLong(), kMaxFrameBytes));
    return;
  }
  std::unique_lock<std::mutex> write(write_mutex_);
  bool lost = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    lost = lost_;
    if (!lost) {
      request.set_id(next_id_++);
      waiting_[request.id()] = done;
    }
  }
  if (lost) {
    write.unlock();
    refuse(ENOTCONN, "the keeper is gone");
    return;
  }
  // What cannot be written breaks the stream: the reader sees it end and answers everyone.
  if (!WriteAll(EncodeFrame(request), MonotonicNanos() + options_.timeout.count())) {
    ::shutdown(socket_.get(), SHUT_RDWR);
  }
}

void Client::Impl::Stop() {
  stopping_ = true;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(wake_.get(), &one, sizeof(one));
  if (reader_.joinable()) reader_.join();
}

Client::Client(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() {
  impl_->Stop();
}

std::unique_ptr<Client> Client::Connect(ClientOptions options, v1::KeeperState* state,
                                        ConnectError* error) {
  auto impl = std::make_shared<Impl>(std::move(options));
  if (!impl->Begin(state, error)) return nullptr;
  impl->StartReader();
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

void Client::Send(v1::KeeperRequest request, std::function<void(Reply)> done) {
  impl_->Send(std::move(request), std::move(done));
}

Reply Client::Call(v1::KeeperRequest request, Duration timeout) {
  struct Slot {
    std::mutex mutex;
    std::condition_variable ready;
    bool done = false;
    Reply reply;
  };
  const auto slot = std::make_shared<Slot>();
  Send(std::move(request), [slot](Reply reply) {
    std::lock_guard<std::mutex> lock(slot->mutex);
    slot->reply = std::move(reply);
    slot->done = true;
    slot->ready.notify_all();
  });
  std::unique_lock<std::mutex> lock(slot->mutex);
  if (!slot->ready.wait_for(lock, timeout, [&] { return slot->done; })) {
    Reply late;
    late.message.set_error(ETIMEDOUT);
    late.message.set_message(
        fmt::format("the keeper did not answer within {} ms", ToMilliseconds(timeout)));
    return late;
  }
  return std::move(slot->reply);
}

}  // namespace everstep::keeper
