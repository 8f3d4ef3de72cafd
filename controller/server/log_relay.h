// Carries log lines from agents to whoever asked, beside the brain: a chatty job must not delay a decision.
// Thread-safe.
#pragma once

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

  // Starts a request that these nodes will answer; the number goes into their TailLogs.
  std::uint64_t Open(Reader reader, std::set<std::string> nodes);
  // A message of `node`. False: nobody reads it any more, tell the agent to cancel.
  bool Deliver(const std::string& node, const v1::LogLines& lines);
  // The node's stream broke: it will answer nothing more.
  void NodeGone(const std::string& node);
  void Close(std::uint64_t request);

 private:
  struct Request_ {
    std::shared_ptr<Reader> reader;
    std::set<std::string> waiting;
  };
  std::mutex mutex_;
  std::uint64_t last_ = 0;
  std::map<std::uint64_t, Request_> open_;
};

}  // namespace everstep::controller
