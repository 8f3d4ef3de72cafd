// How an agent (or a test, or a tool that only looks) talks to its node's keeper.
//
//   ConnectError error;
//   v1::KeeperState held;
//   auto client = Client::Connect({.socket_path = path, .on_event = ..., .on_lost = ...}, &held,
//   &error); if (!client && error.kind == ConnectError::kNoKeeper) StartKeeper(...), then Connect
//   again. client->Send(request, [](Reply reply) { if (reply.message.error() != 0) ... });
//
// Thread-safe. One reader thread per Client runs every callback, one at a time and in the order of
// the wire; a callback may Send but must neither Call nor destroy its Client.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "keeper.pb.h"
#include "proto/base/time.h"
#include "worker/keeper/fd.h"

namespace everstep::keeper {

inline constexpr std::uint32_t kKeeperProtocolVersion = 1;

// message.error() is an errno (0: done) and message.message() a text that says who, what, the limit
// and what to do next. `descriptors`: of an arena, memfd first, then the eventfd that the trainer
// rings.
struct Reply {
  everstep::v1::KeeperReply message;
  std::vector<OwnedFd> descriptors;
};

struct ConnectError {
  enum Kind {
    kNone,
    kNoKeeper,  // nobody listens there: start one
    kRefused,   // a keeper answered no: another live agent owns it, or it speaks another version
    kBroken,    // it does not answer within the limit, or answers nonsense
  };
  Kind kind = kNone;
  std::string message;
};

struct ClientOptions {
  std::string socket_path;
  bool owner = true;              // an agent. false: a look only; everything but Hello is refused
  Duration timeout = Seconds(5);  // for the connection and the hello
  // KeeperExited, KeeperForkServerState and KeeperStalled nobody asked for (reply.message.id() ==
  // 0).
  std::function<void(Reply)> on_event;
  // The keeper is gone or dropped us; told once, after every pending Send was answered with
  // ENOTCONN. Not told when the Client is destroyed.
  std::function<void(std::string why)> on_lost;
};

class Client {
 public:
  // Connects, says hello and fills *state with what the keeper holds. Null: see *error. Events that
  // happen after the hello's answer was written are delivered; none is delivered twice.
  static std::unique_ptr<Client> Connect(ClientOptions options, everstep::v1::KeeperState* state,
                                         ConnectError* error);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Never blocks for an answer (the write itself is bounded by ClientOptions::timeout). `done` runs
  // once, on the reader thread; may be null. The request's id is set here.
  void Send(everstep::v1::KeeperRequest request, std::function<void(Reply)> done);

  // Waits. ETIMEDOUT after `timeout`; ENOTCONN when the keeper is gone.
  Reply Call(everstep::v1::KeeperRequest request, Duration timeout);

 private:
  class Impl;
  explicit Client(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

struct StartOptions {
  std::string program;      // path of everstep-keeper; empty: beside this program
  std::string socket_path;  // at most 107 bytes
  std::string node;
  std::string log_file;            // appended to
  Duration timeout = Seconds(10);  // until it answers
  Duration orphan_timeout = {};    // it ends everything after so long without an agent; 0: never
  int lifeline =
      -1;  // >= 0: inherited by the keeper as `--lifeline FD` (docs/internals/lifecycle.md)
};

// Starts a keeper in a session of its own: it outlives the caller and everything the caller's
// terminal does. Returns when its socket answers. False: *error says who, what, what to do next.
bool StartKeeper(const StartOptions& options, std::string* error);

}  // namespace everstep::keeper
