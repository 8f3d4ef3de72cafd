// The sending half of a gRPC reactor with a bounded queue: the brain says Enqueue and goes on, a
// peer that does not read is cut off.
//
// Base: grpc::ServerBidiReactor<...> or grpc::ServerWriteReactor<...>. Thread-safe. Owned by a
// shared_ptr that the reactor itself holds from Hold() to OnDone(); callers hold one while they
// call. Derived classes that override OnDone call Done() last.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include <fmt/format.h>
#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

namespace everstep::controller {

struct QueueLimits {
  std::size_t messages = 4096;
  std::size_t bytes = 16u << 20;
  // Counts the readers that were cut off; may be null. Outlives the stream.
  std::atomic<std::uint64_t>* slow_readers = nullptr;
};

template <typename Base, typename Message>
class QueuedWrites : public Base, public std::enable_shared_from_this<QueuedWrites<Base, Message>> {
 public:
  // A peer that was cut off gets this long to read why; then its stream is reset.
  static constexpr std::chrono::seconds kLastWords{3};

  QueuedWrites(grpc::CallbackServerContext* context, QueueLimits limits)
      : context_(context), limits_(limits) {}

  void Hold() { self_ = this->shared_from_this(); }

  // False: the stream is over, or its queue is full (then it ends with RESOURCE_EXHAUSTED and a
  // text).
  bool Enqueue(Message message) {
    std::lock_guard<std::mutex> lock(mutex_);
    return EnqueueLocked(std::move(message));
  }

  // The same for states, of which only the newest counts: what waits and is not on its way is
  // replaced, after merge(old, &message) took over what must not be lost. A slow reader is never
  // cut off.
  template <typename Merge>
  bool Replace(Message message, const Merge& merge) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (end_) return false;
    while (queue_.size() > 1) {
      merge(queue_.back().first, &message);
      PopBack();
    }
    return EnqueueLocked(std::move(message));
  }

  // Ends the stream after what waits.
  void End(grpc::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (end_) return;
    end_ = std::move(status);
    if (!writing_) FinishLocked();
  }

  // Ends the stream and drops what waits, whatever the peer does.
  void Cut(grpc::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    CutLocked(std::move(status));
  }

  bool over() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return end_.has_value();
  }

  // `start` starts an operation from outside a reaction: not when the stream may be finished
  // meanwhile.
  template <typename Start>
  void IfOpen(const Start& start) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!end_) start();
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= queue_.front().second;
    queue_.pop_front();
    if (!ok) {
      while (!queue_.empty()) PopBack();
      if (!end_) end_ = grpc::Status(grpc::StatusCode::UNAVAILABLE, "the stream broke");
    }
    if (!queue_.empty()) {
      this->StartWrite(&queue_.front().first);
      return;
    }
    writing_ = false;
    if (end_) FinishLocked();
  }

  void OnDone() override { Done(); }

 protected:
  void Done() {
    std::shared_ptr<QueuedWrites> self;  // outlives the lock
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    if (!end_) end_ = grpc::Status::CANCELLED;
    if (last_words_) last_words_->Cancel();
    self.swap(self_);
  }

  grpc::CallbackServerContext* const context_;  // valid until OnDone

 private:
  bool EnqueueLocked(Message message) {
    if (end_) return false;
    const std::size_t bytes = message.ByteSizeLong();
    // One message always fits: it is bounded by the server's limit on messages.
    if (!queue_.empty() && (queue_.size() >= limits_.messages || bytes_ + bytes > limits_.bytes)) {
      if (limits_.slow_readers != nullptr) ++*limits_.slow_readers;
      CutLocked(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                             fmt::format("slow_reader: {} messages ({} bytes) wait and are not "
                                         "read, the limit is {} ({} bytes)\n"
                                         "hint: read faster, or ask again from the last one seen",
                                         queue_.size(), bytes_, limits_.messages, limits_.bytes)));
      return false;
    }
    bytes_ += bytes;
    queue_.emplace_back(std::move(message), bytes);
    if (!writing_) {
      writing_ = true;
      this->StartWrite(&queue_.front().first);
    }
    return true;
  }
  void PopBack() {
    bytes_ -= queue_.back().second;
    queue_.pop_back();
  }
  void CutLocked(grpc::Status status) {
    if (end_) return;
    end_ = std::move(status);
    while (queue_.size() > (writing_ ? 1u : 0u)) PopBack();
    if (!writing_) FinishLocked();
    // The status waits behind a write that a peer which does not read may hold up for ever.
    last_words_.emplace();
    last_words_->Set(std::chrono::system_clock::now() + kLastWords,
                     [self = this->shared_from_this()](bool in_time) {
                       std::lock_guard<std::mutex> lock(self->mutex_);
                       if (in_time && !self->done_) self->context_->TryCancel();
                     });
  }
  void FinishLocked() {
    if (finished_) return;
    finished_ = true;
    this->Finish(*end_);
  }

  const QueueLimits limits_;
  mutable std::mutex mutex_;
  std::deque<std::pair<Message, std::size_t>> queue_;  // the front is on its way while writing_
  std::size_t bytes_ = 0;
  bool writing_ = false;
  bool finished_ = false;
  bool done_ = false;
  std::optional<grpc::Status> end_;
  std::optional<grpc::Alarm> last_words_;
  std::shared_ptr<QueuedWrites> self_;  // until OnDone
};

}  // namespace everstep::controller
