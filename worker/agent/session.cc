#include "worker/agent/session.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>
#include <iterator>
#include <utility>

#include "agent.grpc.pb.h"

namespace everstep::agent {
namespace {

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // A dial that gets no answer is given up after 2 s. Beats that a host does not acknowledge for 5
  // s end the stream (TCP_USER_TIMEOUT, which gRPC sets with keepalive); the pings themselves are
  // rare.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 600'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  args.SetMaxReceiveMessageSize(16 << 20);  // a Command with 1 MiB of environment, and room
  args.SetMaxSendMessageSize(16 << 20);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

}  // namespace

class SessionClient::Stream final
    : public grpc::ClientBidiReactor<everstep::v1::AgentMessage, everstep::v1::ControllerMessage> {
 public:
  Stream(SessionClient* owner, std::uint64_t number, const std::string& address,
         const std::shared_ptr<grpc::Channel>& channel)
      : owner_(owner),
        number_(number),
        address_(address),
        stub_(everstep::v1::AgentService::NewStub(channel)) {}

  void Start(std::shared_ptr<Stream> self) {
    self_ = std::move(self);
    stub_->async()->Session(&context_, this);
    AddHold();  // writes start outside of reactions
    StartRead(&incoming_);
    StartCall();
  }

  bool Write(everstep::v1::AgentMessage message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ended_) return false;
    const std::size_t bytes = message.ByteSizeLong();
    if (queue_.size() >= kMaxQueuedMessages || queued_bytes_ + bytes > kMaxQueuedBytes) {
      why_ = fmt::format("{} messages ({} bytes) wait, the controller does not read", queue_.size(),
                         queued_bytes_);
      context_.TryCancel();
      return false;
    }
    queued_bytes_ += bytes;
    queue_.emplace_back(std::move(message), bytes);
    if (queue_.size() == 1) StartWrite(&queue_.front().first);
    return true;
  }

  std::size_t waiting_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queued_bytes_;
  }

  void Cancel(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (why_.empty()) why_ = why;
    context_.TryCancel();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      std::lock_guard<std::mutex> lock(mutex_);
      EndLocked();
      return;
    }
    owner_->callbacks_.on_message(number_, std::move(incoming_));
    incoming_.Clear();
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    queued_bytes_ -= queue_.front().second;
    queue_.pop_front();
    if (ok && !ended_ && !queue_.empty()) StartWrite(&queue_.front().first);
  }

  void OnDone(const grpc::Status& status) override {
    std::string why;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      why = why_;
    }
    if (why.empty()) {
      why = status.ok() ? "the controller ended the session"
                        : fmt::format("{} (code {})", status.error_message(),
                                      static_cast<int>(status.error_code()));
    }
    owner_->callbacks_.on_lost(number_, fmt::format("{}: {}", address_, why));
    SessionClient* owner = owner_;
    // Under the lock to the end, this object's own included: the owner may be destroyed, and its
    // channels with it, as soon as it is released.
    std::lock_guard<std::mutex> lock(owner->mutex_);
    const std::shared_ptr<Stream> self = std::move(self_);
    if (owner->current_.get() == this) owner->current_.reset();
    --owner->live_;
    owner->idle_.notify_all();
  }

 private:
  void EndLocked() {
    if (ended_) return;
    ended_ = true;
    RemoveHold();
  }

  SessionClient* const owner_;
  const std::uint64_t number_;
  const std::string address_;
  const std::unique_ptr<everstep::v1::AgentService::Stub> stub_;
  grpc::ClientContext context_;
  everstep::v1::ControllerMessage incoming_;
  std::shared_ptr<Stream> self_;  // until OnDone

  std::mutex mutex_;
  std::deque<std::pair<everstep::v1::AgentMessage, std::size_t>> queue_;  // front is on its way
  std::size_t queued_bytes_ = 0;
  bool ended_ = false;  // no write may start any more
  std::string why_;
};

SessionClient::SessionClient(SessionCallbacks callbacks) : callbacks_(std::move(callbacks)) {}

SessionClient::~SessionClient() {
  Close("the agent ends");
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return live_ == 0; });
}

std::uint64_t SessionClient::Dial(const std::string& address) {
  Close("dialled anew");
  std::shared_ptr<grpc::Channel>& channel = channels_[address];
  if (channel == nullptr) {
    channel = MakeChannel(address);
    while (channels_.size() > kMaxChannels) {
      channels_.erase(channels_.begin()->first == address ? std::next(channels_.begin())
                                                          : channels_.begin());
    }
  } else {
    // Whatever wait the last refusal left behind: a controller that is back is reached at once.
    grpc::experimental::ChannelResetConnectionBackoff(channel.get());
  }
  std::shared_ptr<Stream> stream;
  std::uint64_t number = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    number = ++last_;
    stream = std::make_shared<Stream>(this, number, address, channel);
    current_ = stream;
    ++live_;
  }
  stream->Start(stream);
  return number;
}

bool SessionClient::Send(everstep::v1::AgentMessage message) {
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stream = current_;
  }
  return stream != nullptr && stream->Write(std::move(message));
}

std::size_t SessionClient::waiting_bytes() {
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stream = current_;
  }
  return stream == nullptr ? 0 : stream->waiting_bytes();
}

void SessionClient::Close(const std::string& why) {
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stream = current_;
  }
  if (stream != nullptr) stream->Cancel(why);
}

}  // namespace everstep::agent
