// The sending half of a gRPC reactor with a bounded queue: the brain says Enqueue and goes on, a peer that
// does not read is cut off.
//
// Base: grpc::ServerBidiReactor<...> or grpc::ServerWriteReactor<...>. Thread-safe. Own it by a
// shared_ptr that the reactor itself gives up in OnDone; callers hold one while they call.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include <grpcpp/grpcpp.h>

namespace everstep::controller {

template <typename Base, typename Message>
class QueuedWrites : public Base {
 public:
  QueuedWrites(grpc::CallbackServerContext* context, std::size_t max_messages, std::size_t max_bytes)
      : context_(context), max_messages_(max_messages), max_bytes_(max_bytes) {}

  // False: the stream is over, or its queue is full (then it ends with RESOURCE_EXHAUSTED).
  // replace: what waits and is not on its way is replaced (states, of which only the newest counts).
  bool Enqueue(Message message, bool replace = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (end_) return false;
    if (replace) {
      while (queue_.size() > 1) PopBack();
    }
    const std::size_t bytes = message.ByteSizeLong();
    if (queue_.size() >= max_messages_ || bytes_ + bytes > max_bytes_) {
      EndLocked(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                             "too much waits for this reader: it does not read\nhint: read faster, or "
                             "ask again from the last sequence seen"),
                true);
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

  // Ends the stream after what waits; with drop at once, whatever the peer does.
  void End(grpc::Status status, bool drop = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    EndLocked(std::move(status), drop);
  }

  bool over() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return end_.has_value();
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

 private:
  void PopBack() {
    bytes_ -= queue_.back().second;
    queue_.pop_back();
  }
  void EndLocked(grpc::Status status, bool drop) {
    if (!end_) end_ = std::move(status);
    if (drop && writing_) {
      while (queue_.size() > 1) PopBack();
      context_->TryCancel();  // a write to a peer that does not read ends only so
    }
    if (!writing_) FinishLocked();
  }
  void FinishLocked() {
    if (finished_) return;
    finished_ = true;
    this->Finish(*end_);
  }

  grpc::CallbackServerContext* const context_;
  const std::size_t max_messages_, max_bytes_;
  mutable std::mutex mutex_;
  std::deque<std::pair<Message, std::size_t>> queue_;  // the front is on its way while writing_
  std::size_t bytes_ = 0;
  bool writing_ = false;
  bool finished_ = false;
  std::optional<grpc::Status> end_;
};

}  // namespace everstep::controller
