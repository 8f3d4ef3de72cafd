// AgentService: one bidi stream for each node. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>

#include "agent.grpc.pb.h"
#include "controller/server/brain.h"
#include "controller/server/log_relay.h"

namespace everstep::controller {

class AgentService final : public v1::AgentService::CallbackService {
 public:
  // Both outlive the server. max_streams: agents at once, refused beyond with RESOURCE_EXHAUSTED.
  AgentService(Brain* brain, LogRelay* relay, std::size_t max_streams)
      : brain_(brain), relay_(relay), max_streams_(max_streams) {}

  grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>* Session(
      grpc::CallbackServerContext* context) override;

  std::size_t streams() const { return streams_; }

 private:
  class Stream;

  Brain* const brain_;
  LogRelay* const relay_;
  const std::size_t max_streams_;
  std::atomic<std::size_t> streams_{0};
  std::atomic<std::uint64_t> last_{0};
};

}  // namespace everstep::controller
