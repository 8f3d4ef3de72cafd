#include "controller/server/agent_service.h"

#include <fmt/format.h>

#include <memory>
#include <string>
#include <utility>

#include "controller/server/convert.h"
#include "controller/server/queued_writes.h"
#include "proto/base/log.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kMaxQueuedMessages = 4096;
constexpr std::size_t kMaxQueuedBytes = 64u << 20;

}  // namespace

class AgentService::Stream final
    : public QueuedWrites<grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>,
                          v1::ControllerMessage>,
      public AgentStream {
 public:
  Stream(AgentService* service, grpc::CallbackServerContext* context, std::uint64_t number)
      : QueuedWrites(context, kMaxQueuedMessages, kMaxQueuedBytes), service_(service), number_(number),
        peer_(context->peer()) {}

  void Start(std::shared_ptr<Stream> self) {
    self_ = std::move(self);
    StartRead(&incoming_);
  }

  // --- from the brain ---
  void Send(v1::ControllerMessage message) override { Enqueue(std::move(message)); }
  void Close(Why why, const std::string& text) override {
    grpc::StatusCode code = grpc::StatusCode::ABORTED;
    if (why == Why::kRefused) code = grpc::StatusCode::RESOURCE_EXHAUSTED;
    if (why == Why::kShutdown) code = grpc::StatusCode::UNAVAILABLE;
    End(grpc::Status(code, text), why == Why::kFenced);
  }

  // --- from gRPC ---
  void OnReadDone(bool ok) override {
    if (!ok) {
      Broken("closed by the agent");
      End(grpc::Status::OK);
      return;
    }
    if (over()) return;  // fenced or refused: what still comes is not heard
    if (node_.empty()) {
      if (!TakeRegister()) return;
    } else if (incoming_.has_log_lines()) {
      if (!service_->relay_->Deliver(node_, incoming_.log_lines())) CancelTail();
    } else if (!service_->brain_->PostReport(number_, std::move(incoming_))) {
      Behind();
      return;
    }
    incoming_.Clear();
    StartRead(&incoming_);
  }

  void OnCancel() override {
    Broken("connection broken");
    End(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    Broken("stream ended");
    --service_->streams_;
    self_.reset();  // may delete this
  }

 private:
  bool TakeRegister() {
    if (!incoming_.has_register_()) {
      End({grpc::StatusCode::FAILED_PRECONDITION,
           fmt::format("{}: the first message of a session must be Register", peer_)});
      return false;
    }
    const std::string wrong = CheckRegister(incoming_.register_());
    if (!wrong.empty()) {
      LogWarning("agent_refused", {{"peer", peer_}, {"message", wrong}});
      End({grpc::StatusCode::FAILED_PRECONDITION, wrong});
      return false;
    }
    node_ = incoming_.register_().node();
    registered_ = true;
    if (!service_->brain_->PostRegister(number_, self_, std::move(*incoming_.mutable_register_()))) {
      Behind();
      return false;
    }
    return true;
  }

  void CancelTail() {
    v1::TailLogs cancel;
    cancel.set_request(incoming_.log_lines().request());
    cancel.set_cancel(true);
    cancel.set_job(incoming_.log_lines().job());
    service_->brain_->Post([brain = service_->brain_, node = node_, cancel] {
      v1::ControllerMessage message;
      *message.mutable_tail_logs() = cancel;
      brain->SendTo(node, std::move(message));
    });
  }

  void Behind() {
    LogError("mailbox_full", {{"node", node_}});
    End({grpc::StatusCode::RESOURCE_EXHAUSTED,
         "the controller is behind with its work\nhint: the agent tries again by itself"},
        true);
  }

  // Once, whoever notices first.
  void Broken(const char* how) {
    if (!registered_.exchange(false)) return;
    service_->relay_->NodeGone(node_);
    // A full mailbox must not swallow a loss; the lease finds it then.
    if (!service_->brain_->PostClosed(number_, fmt::format("{} ({})", how, peer_))) {
      LogError("mailbox_full", {{"node", node_}});
    }
  }

  AgentService* const service_;
  const std::uint64_t number_;
  const std::string peer_;
  v1::AgentMessage incoming_;
  std::string node_;
  std::atomic<bool> registered_{false};
  std::shared_ptr<Stream> self_;  // until OnDone
};

grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>* AgentService::Session(
    grpc::CallbackServerContext* context) {
  const std::uint64_t number = ++last_;
  const std::size_t streams = ++streams_;
  auto stream = std::make_shared<Stream>(this, context, number);
  Stream* raw = stream.get();
  if (streams > max_streams_) {
    raw->End({grpc::StatusCode::RESOURCE_EXHAUSTED,
              fmt::format("this controller takes {} agents at once\nhint: stop other agents first",
                          max_streams_)});
  }
  raw->Start(std::move(stream));
  return raw;
}

}  // namespace everstep::controller
