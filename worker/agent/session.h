// The agent's stream to a controller: dials, sends, hands over what comes. One stream at a time;
// who dials when is the owner's business (dial_backoff.h).
//
// Thread-safe. The callbacks run on gRPC's threads and must only convert and push to a mailbox.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "agent.pb.h"

namespace grpc {
class Channel;
}

namespace everstep::agent {

struct SessionCallbacks {
  // `stream` is what Dial returned; messages of an older stream are dropped by the owner.
  std::function<void(std::uint64_t stream, everstep::v1::ControllerMessage message)> on_message;
  // Exactly once for each Dial, as its last callback.
  std::function<void(std::uint64_t stream, std::string why)> on_lost;
};

class SessionClient {
 public:
  // Bounds of what waits for the wire; beyond either the stream is ended (the controller does not
  // read), and the next registration carries the state.
  static constexpr std::size_t kMaxQueuedMessages = 8192;
  static constexpr std::size_t kMaxQueuedBytes = 64u << 20;

  explicit SessionClient(SessionCallbacks callbacks);
  // Ends the stream and waits for its on_lost.
  ~SessionClient();
  SessionClient(const SessionClient&) = delete;
  SessionClient& operator=(const SessionClient&) = delete;

  // Starts a stream to host:port and returns its number, from 1. Ends an older one. Does not wait:
  // a controller that is not there shows as on_lost. One thread dials.
  std::uint64_t Dial(const std::string& address);

  // False: there is no stream, or its queue is full (then the stream ends).
  bool Send(everstep::v1::AgentMessage message);

  // Bytes that wait for the wire; 0 without a stream.
  std::size_t waiting_bytes();

  // Ends the stream; on_lost follows with `why`.
  void Close(const std::string& why);

 private:
  class Stream;

  static constexpr std::size_t kMaxChannels = 16;

  const SessionCallbacks callbacks_;
  // By address, kept between dials: gRPC 1.51 aborts when the last channel of a process dies on the
  // thread of a callback. The dialling thread's alone.
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::shared_ptr<Stream> current_;
  std::uint64_t last_ = 0;
  int live_ = 0;  // streams whose on_lost is to come
};

}  // namespace everstep::agent
