#include "controller/server/agent_service.h"

#include <fmt/format.h>

#include <memory>
#include <string>
#include <utility>

#include "controller/server/convert.h"
#include "controller/server/queued_writes.h"
#include "proto/base/log.h"
#include "proto/base/version.h"

namespace everstep::controller {

class AgentService::Stream final
    : public QueuedWrites<grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>,
                          v1::ControllerMessage>,
      public AgentStream {
 public:
  Stream(AgentService* service, grpc::CallbackServerContext* context, std::uint64_t number)
      : QueuedWrites(context, {.messages = 4096,
                               .bytes = 32u << 20,
                               .slow_readers = &service->brain_->counters().slow_readers}),
        service_(service),
        number_(number),
        peer_(context->peer()) {}

  void Start() {
    Hold();
    register_by_.Set(std::chrono::system_clock::now() + kRegisterWithin,
                     [self = std::static_pointer_cast<Stream>(shared_from_this())](bool in_time) {
                       if (in_time && !self->registered_) {
                         self->Refuse(
                             grpc::StatusCode::DEADLINE_EXCEEDED,
                             fmt::format("{}: no Register within {} s of the session's start",
                                         self->peer_, kRegisterWithin.count()));
                       }
                     });
    StartRead(&incoming_);
  }
  void Refuse(grpc::StatusCode code, const std::string& text) {
    ++service_->brain_->counters().agents_refused;
    LogWarning("agent_refused", {{"peer", peer_}, {"message", text}});
    Cut({code, text});
  }

  // --- from the brain ---
  void Send(v1::ControllerMessage message) override {
    if (over()) return;
    if (!Enqueue(std::move(message)))
      LogWarning("agent_cut_off", {{"node", node_}, {"reason", "slow_reader"}});
  }
  void Close(Why why, const std::string& text) override {
    switch (why) {
      case Why::kFenced: return Cut({grpc::StatusCode::ABORTED, text});
      case Why::kTaken: return Cut({grpc::StatusCode::ALREADY_EXISTS, text});
      case Why::kTooMany: return Cut({grpc::StatusCode::RESOURCE_EXHAUSTED, text});
      case Why::kShutdown: return End({grpc::StatusCode::UNAVAILABLE, text});
    }
  }
  void Handled() override {
    std::lock_guard<std::mutex> lock(read_mutex_);
    --unhandled_;
    if (!paused_ || unhandled_ > kMaxUnhandled / 2) return;
    paused_ = false;
    IfOpen([this] { StartRead(&incoming_); });
  }

  // --- from gRPC ---
  void OnReadDone(bool ok) override {
    if (!ok) {
      // An agent that ends resets its stream; what is left is bytes that do not parse, or half a
      // close.
      const bool broken = context_->IsCancelled();
      Broken(broken ? "connection broken" : "no message of this version, or closed by the agent");
      End(broken ? grpc::Status::CANCELLED
                 : grpc::Status(
                       grpc::StatusCode::INVALID_ARGUMENT,
                       fmt::format("{}: the agent closed the session, or sent bytes that are no "
                                   "AgentMessage of version {}",
                                   peer_, kVersion)));
      return;
    }
    if (over()) return;  // fenced or refused: what still comes is not heard
    if (!registered_) {
      if (!TakeRegister()) return;
    } else if (incoming_.has_log_lines()) {
      if (!service_->brain_->relay().Deliver(node_, incoming_.log_lines())) CancelTail();
    } else if (incoming_.has_register_()) {
      Broken("registered twice on one session");
      Refuse(grpc::StatusCode::FAILED_PRECONDITION,
             fmt::format(
                 "{} registered twice on one session; a registration takes a stream of its own",
                 node_));
      return;
    } else {
      {
        std::lock_guard<std::mutex> lock(read_mutex_);
        ++unhandled_;
      }
      if (!service_->brain_->PostReport(number_, std::move(incoming_))) return Behind();
    }
    incoming_.Clear();
    std::lock_guard<std::mutex> lock(read_mutex_);
    paused_ = unhandled_ >= kMaxUnhandled;
    if (!paused_) StartRead(&incoming_);
  }

  void OnCancel() override {
    Broken("connection broken");
    End(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    register_by_.Cancel();
    Broken("stream ended");
    --service_->streams_;
    Done();  // may delete this
  }

 private:
  bool TakeRegister() {
    if (!incoming_.has_register_()) {
      Refuse(grpc::StatusCode::FAILED_PRECONDITION,
             fmt::format("{}: the first message of a session must be Register", peer_));
      return false;
    }
    const std::string wrong = CheckRegister(incoming_.register_());
    if (!wrong.empty()) {
      Refuse(grpc::StatusCode::FAILED_PRECONDITION, wrong);
      return false;
    }
    node_ = incoming_.register_().node();
    registered_ = true;
    told_ = false;
    register_by_.Cancel();
    if (service_->brain_->PostRegister(number_,
                                       std::static_pointer_cast<Stream>(shared_from_this()),
                                       std::move(*incoming_.mutable_register_()))) {
      return true;
    }
    Behind();
    return false;
  }

  void CancelTail() {
    v1::ControllerMessage message;
    v1::TailLogs* cancel = message.mutable_tail_logs();
    cancel->set_request(incoming_.log_lines().request());
    cancel->set_job(incoming_.log_lines().job());
    cancel->set_cancel(true);
    service_->brain_->Post(
        [brain = service_->brain_, node = node_, message = std::move(message)]() mutable {
          brain->SendTo(node, std::move(message));
        });
  }

  void Behind() {
    if (service_->brain_->stopping()) {
      End({grpc::StatusCode::UNAVAILABLE, "the controller ends"});
      return;
    }
    LogError("mailbox_full", {{"node", node_}});
    Cut({grpc::StatusCode::RESOURCE_EXHAUSTED,
         "the controller is behind with its work\nhint: the agent tries again by itself"});
  }

  // Once, whoever notices first.
  void Broken(const char* how) {
    if (told_.exchange(true)) return;
    // A full mailbox swallows it; then the lease finds the loss.
    if (!service_->brain_->PostClosed(number_, fmt::format("{} ({})", how, peer_)) &&
        !service_->brain_->stopping()) {
      LogError("mailbox_full", {{"node", node_}});
    }
  }

  AgentService* const service_;
  const std::uint64_t number_;
  const std::string peer_;
  grpc::Alarm register_by_;
  v1::AgentMessage incoming_;
  std::string node_;  // set before registered_
  std::atomic<bool> registered_{false};
  std::atomic<bool> told_{true};  // the brain knows of the end; nothing to tell before Register

  std::mutex read_mutex_;
  std::size_t unhandled_ = 0;  // reports in the mailbox
  bool paused_ = false;
};

grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>* AgentService::Session(
    grpc::CallbackServerContext* context) {
  const std::uint64_t number = ++last_;
  const std::size_t streams = ++streams_;
  auto stream = std::make_shared<Stream>(this, context, number);
  stream->Start();
  if (streams > max_streams_) {
    stream->Refuse(
        grpc::StatusCode::RESOURCE_EXHAUSTED,
        fmt::format(
            "this controller takes {} agents at once\nhint: start it with a larger --max-nodes",
            max_streams_));
  }
  return stream.get();
}

}  // namespace everstep::controller
