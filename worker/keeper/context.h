// What the keeper's parts share. Everything runs on the one thread of the Loop.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "keeper.pb.h"
#include "worker/keeper/loop.h"

namespace everstep::keeper {

// Answers one request; the id is filled in by whoever gave it. Called once, any time later; what
// it answers is dropped when the asker is gone.
using Done = std::function<void(everstep::v1::KeeperReply reply)>;

struct Context {
  Loop loop;
  std::string node;
  std::string folder;  // of keeper.sock; holds python/ and the fork servers' logs
  // Tells the owner; nothing when there is none (it will find the fact in KeeperState).
  std::function<void(const everstep::v1::KeeperReply&)> tell_owner;
};

inline everstep::v1::KeeperReply Refusal(int error, std::string text) {
  everstep::v1::KeeperReply reply;
  reply.set_error(error);
  reply.set_message(std::move(text));
  return reply;
}

std::int64_t WallNanos();

// Reads a child's status channel (a socket pair) to its end: lines as they come, then the end.
// Owned by a table entry; dies with it.
class StatusPipe {
 public:
  // A line without its end; `last` (then `line` may be empty): the child closed the pipe.
  using OnLine = std::function<void(const std::string& line, bool last)>;

  explicit StatusPipe(Context* context) : context_(context) {}
  ~StatusPipe() { Close(); }
  StatusPipe(const StatusPipe&) = delete;
  StatusPipe& operator=(const StatusPipe&) = delete;

  // The write end for the child, to be closed by the caller after the fork; invalid: errno says
  // why.
  OwnedFd Open(OnLine on_line);
  void Close();
  // What was written up to this moment is heard, then the end; whoever writes later fails. So both
  // sides agree on whether a word came in time.
  void Finish();

 private:
  void Read();

  Context* context_;
  OwnedFd read_;
  Loop::Token token_ = 0;
  std::string buffer_;
  OnLine on_line_;
};

}  // namespace everstep::keeper
