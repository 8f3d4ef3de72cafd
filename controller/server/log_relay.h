// Carries log lines from agents to whoever asked, beside the brain: a chatty job must not delay a
// decision. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "admin.pb.h"
#include "agent.pb.h"

namespace everstep::controller {

class LogRelay {
 public:
  // Called on gRPC's threads. lines: false means gone. end: nothing more will come.
  struct Reader {
    std::function<bool(v1::JobLogLines)> lines;
    std::function<void()> end;
  };

  // Starts request number `request` that these nodes answer. It is over when each has said so or is
  // gone; with `follow` only by End.
  void Open(std::uint64_t request, Reader reader, std::set<std::string> nodes, bool follow);
  // A message of `node`. False: nobody reads it any more, tell the agent to cancel.
  bool Deliver(const std::string& node, const v1::LogLines& lines);
  // The node's stream broke: it will answer nothing more.
  void NodeGone(const std::string& node);
  void End(std::uint64_t request);    // and the reader is told
  void Close(std::uint64_t request);  // the reader is gone

  std::uint64_t bytes() const { return bytes_; }

 private:
  struct Entry {
    std::shared_ptr<Reader> reader;
    std::set<std::string> waiting;
    bool follow = false;
  };
  std::mutex mutex_;
  std::map<std::uint64_t, Entry> open_;
  std::atomic<std::uint64_t> bytes_{0};
};

}  // namespace everstep::controller
