// Who starts a controller when the one of a job without a standing cluster is gone with its
// machine. Pure: what a launcher sees and the time go in, a verdict with its reason comes out.
// docs/adr/0006-succession.md is the why.
//
// Two controllers of one job never act at once: each needs proof that the old one is dead (the
// host's kernel refuses the controller's and the agent's port), or a majority of the last members,
// and among the living only the first in order may act. What a successor does not see alive it must
// have proof of, or be in the majority.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proto/base/time.h"
#include "worker/launcher/endpoint.h"

namespace everstep::launcher {

inline constexpr Duration kProofHolds = Milliseconds(500);  // refusals for this long are a death
inline constexpr Duration kSilenceHolds = Seconds(8);       // silence for this long may be one
inline constexpr Duration kCutHolds =
    Seconds(3);  // a host that is cut off steps down before others act

// One launcher of the job. In order: members by group rank, then the others by name.
struct Peer {
  std::string node;
  std::string beacon;      // host:port on which the launcher listens as long as it lives
  std::string controller;  // host:port at which it will start a controller
  std::string data;        // host:port of its agent's data plane
  bool member = false;     // of the newest generation
};

// What one launcher sees at one moment.
struct Sight {
  bool followed = false;  // the controller sends statuses
  Probe controller = Probe::kSilent;
  Probe host_agent = Probe::kSilent;
  std::vector<Probe> peers;  // beacons, in the order of the peers; one's own is kListens
};

enum class Verdict : std::uint8_t {
  kNone,        // the controller is there, or has been away for a moment only
  kWait,        // another launcher is to act, or there is no proof yet
  kNoMajority,  // silence, and too few see each other: nobody may act
  kTakeOver,
  kStepDown,  // we are the host, and the others may go on without us
};

struct Ruling {
  Verdict verdict = Verdict::kNone;
  std::string why;
  std::string dead;  // the node that is known to be dead; empty: silent only
};

class Succession {
 public:
  // `peers` holds this launcher's own `node`, and usually `host`: the node whose launcher brought
  // the controller.
  Succession(std::string node, std::string host, std::vector<Peer> peers);

  // REQUIRES sight.peers.size() == peers().size().
  Ruling Step(Timestamp now, const Sight& sight);

  const std::vector<Peer>& peers() const { return peers_; }

 private:
  const std::string node_;
  const std::string host_;
  const std::vector<Peer> peers_;
  std::optional<Timestamp> refused_since_;
  std::optional<Timestamp> silent_since_;
};

// The other half: a host that is cut off from most of the members ends its controller and its node
// before the others may start theirs, so that two generations of one job never train at once.
class HostGuard {
 public:
  // `sight`: the beacons of `peers`, in their order; one's own is kListens.
  Ruling Step(Timestamp now, const std::vector<Peer>& peers, const std::vector<Probe>& sight);

 private:
  // Nodes of the newest generation, and those that were when they fell silent: a controller that is
  // cut off makes a smaller generation at once, but they do not know of it.
  std::set<std::string> members_;
  std::optional<Timestamp> cut_since_;
};

}  // namespace everstep::launcher
