// AgentService: one bidi stream for each node. Thread-safe.
//
// A stream that does not register in time, sends another message first, or speaks another version
// is ended with a text. An agent that sends faster than the brain takes in is not read from for a
// while; one that does not read is cut off (queued_writes.h).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "agent.grpc.pb.h"
#include "controller/server/brain.h"

namespace everstep::controller {

class AgentService final : public v1::AgentService::CallbackService {
 public:
  static constexpr std::chrono::seconds kRegisterWithin{10};
  static constexpr std::size_t kMaxUnhandled = 256;  // reports of one agent in the mailbox

  // The brain outlives the server. max_streams: open ones, refused beyond with RESOURCE_EXHAUSTED.
  AgentService(Brain* brain, std::size_t max_streams) : brain_(brain), max_streams_(max_streams) {}

  grpc::ServerBidiReactor<v1::AgentMessage, v1::ControllerMessage>* Session(
      grpc::CallbackServerContext* context) override;

 private:
  class Stream;

  Brain* const brain_;
  const std::size_t max_streams_;
  std::atomic<std::size_t> streams_{0};
  std::atomic<std::uint64_t> last_{0};
};

}  // namespace everstep::controller
