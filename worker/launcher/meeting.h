// A launcher's part among the launchers of one job: what it tells the others of itself, whom it
// knows, and the newest records of the controller, from which it can bring a successor.
//
// One owner thread, but for the watch inside.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "admin.pb.h"
#include "worker/launcher/watch.h"

namespace everstep::launcher {

class Meeting {
 public:
  struct Options {
    std::string node;
    std::string address;         // of this node, for the others
    std::string endpoint;        // host:port of the first controller
    bool host = false;           // it is brought here
    std::function<void()> wake;  // from any thread: TakeNews has something
  };
  explicit Meeting(Options options) : options_(std::move(options)) {}

  // Opens the beacon. Empty on success.
  std::string Open();
  // Of this node's agent.
  std::map<std::string, std::string> Labels() const;
  // The job is known: from now on the others are watched.
  void Start();

  // A status came from the controller at `controller`. The list of addresses ("host:port,...") at
  // which one may be found, when it is another than before.
  std::optional<std::string> OnStatus(const v1::JobStatus& status, const std::string& controller);
  void SetFollowed(bool followed);

  struct News {
    bool redial = false;        // the controller is out of reach, its stream hangs
    std::string say;            // for the person; empty: nothing
    std::optional<Ruling> act;  // kTakeOver: start a controller; kStepDown: end this node
  };
  News TakeNews();

  // Where a controller of this launcher stands, and the records it starts from. The port is free
  // from now on.
  std::string ReleaseControllerAddress();
  const std::string& snapshot() const { return snapshot_; }

 private:
  const Options options_;
  Ports ports_;
  std::string snapshot_;
  std::string controllers_;
  std::mutex mutex_;  // news_
  News news_;
  std::unique_ptr<Watch> watch_;  // its thread writes news_: ends first
};

}  // namespace everstep::launcher
