// The thread that looks for a dead controller host: holds this launcher's beacon, probes the
// others, asks Succession.
//
// Thread-safe. `act` runs on the watch's thread, at most once between two Update calls that name
// another host.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "admin.pb.h"
#include "worker/launcher/succession.h"

namespace everstep::launcher {

// The labels by which a launcher tells the others of itself, through its agent's registration.
inline constexpr char kBeaconLabel[] = "launcher";
inline constexpr char kSuccessorLabel[] = "successor";

// Two ports of this node: one that listens as long as the launcher lives, and one that is kept free
// for a controller.
class Ports {
 public:
  ~Ports();
  // Empty on success. `address` is this node's, as the others reach it.
  std::string Open(const std::string& address);
  const std::string& beacon() const { return beacon_text_; }
  const std::string& controller() const { return controller_text_; }
  int beacon_descriptor() const { return beacon_; }
  // A controller may bind the kept port now.
  void ReleaseController();

 private:
  int beacon_ = -1;
  int controller_ = -1;
  std::string beacon_text_;
  std::string controller_text_;
};

// The peers that a snapshot names, in the order of succession: members by group rank, then the
// others by name.
std::vector<Peer> PeersOf(const v1::StoreSnapshot& snapshot, const v1::JobStatus& status);

class Watch {
 public:
  struct Options {
    std::string node;
    int beacon = -1;  // a listening socket; connections to it are accepted and closed
    std::function<void(const Ruling& ruling)> act;  // kTakeOver, kStepDown
    std::function<void()> silent;  // the controller is out of reach, whatever its stream says
    std::function<void(const std::string&)> say;  // once for each kNoMajority
  };
  explicit Watch(Options options);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // What the newest status said. `host`: the peer at whose address the controller answers.
  void Update(const std::string& controller, const std::string& host, std::vector<Peer> peers);
  // The status stream is up, or broke.
  void SetFollowed(bool followed);

 private:
  void Loop();
  std::vector<Probe> LookAtPeers(const std::vector<Peer>& peers);
  Sight Look(const std::string& controller, const std::string& host,
             const std::vector<Peer>& peers);

  const Options options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ending_ = false;
  bool followed_ = false;
  bool acted_ = false;
  std::string controller_;
  std::string host_;
  std::vector<Peer> peers_;
  std::uint64_t version_ = 0;
  std::thread thread_;
};

}  // namespace everstep::launcher
