// The listening side: accepts, shakes hands, checks the key, and hands each request to a Handler on
// a thread of its own. Bounded in connections and, on each, in time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "checkpoint/store/result.h"
#include "checkpoint/transfer/frame.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/siphash.h"
#include "checkpoint/transfer/socket.h"
#include "proto/base/ids.h"

namespace everstep::checkpoint {

// One authenticated request.
class PeerSession {
 public:
  PeerSession(Connection* connection, const RequestFrame& request, const SipKey& key,
              std::uint64_t client_nonce, std::uint64_t server_nonce)
      : connection_(connection),
        request_(request),
        key_(key),
        client_nonce_(client_nonce),
        server_nonce_(server_nonce) {}

  const RequestFrame& request() const { return request_; }
  JobId job() const;
  Connection* connection() { return connection_; }
  Outcome Respond(ResponseFrame response);
  Outcome Refuse(Status status, const std::string& message);
  Outcome Acknowledge(std::uint32_t crc_root);
  Outcome AcknowledgeError(const Error& error, std::uint64_t chunk);

 private:
  Connection* connection_;
  RequestFrame request_;
  SipKey key_;
  std::uint64_t client_nonce_;
  std::uint64_t server_nonce_;
};

class PeerHandler {
 public:
  virtual ~PeerHandler() = default;
  // None: the job is not known here. Called from many threads.
  virtual std::optional<SipKey> KeyOf(const JobId& job) = 0;
  virtual void Serve(PeerSession* session) = 0;
};

struct PeerServerOptions {
  std::string bind_address = "127.0.0.1";
  std::uint16_t port = 0;
  int max_connections = 64;
  PeerLimits limits;
};

class PeerServer {
 public:
  // `handler` must outlive the server.
  static Result<std::unique_ptr<PeerServer>> Start(const PeerServerOptions& options,
                                                   PeerHandler* handler);
  ~PeerServer();
  std::uint16_t port() const;
  // Breaks every connection and joins every thread.
  void Stop();

 private:
  struct Impl;
  explicit PeerServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace everstep::checkpoint
