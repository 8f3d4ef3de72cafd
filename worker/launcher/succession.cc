#include "worker/launcher/succession.h"

#include <utility>

#include <fmt/format.h>

#include "proto/base/check.h"

namespace everstep::launcher {

Succession::Succession(std::string node, std::string host, std::vector<Peer> peers)
    : node_(std::move(node)), host_(std::move(host)), peers_(std::move(peers)) {}

Ruling Succession::Step(Timestamp now, const Sight& sight) {
  EVERSTEP_CHECK(sight.peers.size() == peers_.size(), "a sight is of other peers");
  // A port that listens is a controller that lives, or one that is being started again by its
  // launcher.
  if (sight.followed || sight.controller == Probe::kListens) {
    refused_since_.reset();
    silent_since_.reset();
    return {};
  }
  bool host_launcher_lives = false;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    host_launcher_lives =
        host_launcher_lives || (peers_[i].node == host_ && sight.peers[i] == Probe::kListens);
  }
  if (host_launcher_lives || sight.host_agent == Probe::kListens) {
    refused_since_.reset();
    silent_since_.reset();
    return {Verdict::kWait, fmt::format("{} lives and starts its controller again", host_)};
  }
  const bool proof = sight.controller == Probe::kRefused && sight.host_agent == Probe::kRefused;
  std::optional<Timestamp>& since = proof ? refused_since_ : silent_since_;
  (proof ? silent_since_ : refused_since_).reset();
  if (!since) since = now;
  const Duration wanted = proof ? kProofHolds : kSilenceHolds;
  if (now - *since < wanted) {
    return {Verdict::kWait, proof ? "the controller's and its agent's ports refuse connections"
                                  : "the controller is silent"};
  }
  std::size_t members = 0;
  std::size_t seen = 0;
  std::string first;  // of the living
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    const bool lives = sight.peers[i] == Probe::kListens && peers_[i].node != host_;
    if (lives && first.empty()) first = peers_[i].node;
    // One that may live behind a cut must not act, too: only a refusal is a death.
    members += peers_[i].member ? 1 : 0;
    seen += peers_[i].member && lives ? 1 : 0;
  }
  const bool majority = seen * 2 > members;
  bool unknown = false;  // somebody before us may live where we cannot see it
  for (std::size_t i = 0; i < peers_.size() && peers_[i].node != node_; ++i) {
    unknown = unknown || (peers_[i].node != host_ && sight.peers[i] == Probe::kSilent);
  }
  if ((!proof || unknown) && !majority) {
    return {
        Verdict::kNoMajority,
        fmt::format("{} of {} members see each other; no controller is started without proof or a "
                    "majority",
                    seen, members)};
  }
  if (first != node_) return {Verdict::kWait, fmt::format("{} is to start a controller", first)};
  return {Verdict::kTakeOver,
          proof
              ? fmt::format("{} is dead: its ports refuse connections", host_)
              : fmt::format("{} is silent, {} of {} members see each other", host_, seen, members),
          proof ? host_ : std::string()};
}

Ruling HostGuard::Step(Timestamp now, const std::vector<Peer>& peers,
                       const std::vector<Probe>& sight) {
  EVERSTEP_CHECK(sight.size() == peers.size(), "a sight is of other peers");
  std::set<std::string> known;
  std::size_t silent = 0;
  for (std::size_t i = 0; i < peers.size(); ++i) {
    const bool was = members_.count(peers[i].node) != 0;
    if (!peers[i].member && !(was && sight[i] == Probe::kSilent)) continue;
    known.insert(peers[i].node);
    silent += sight[i] == Probe::kSilent ? 1 : 0;
  }
  members_ = std::move(known);
  if (silent * 2 <= members_.size()) {
    cut_since_.reset();
    return {};
  }
  if (!cut_since_) cut_since_ = now;
  std::string why = fmt::format("{} of {} members are out of reach and may go on without this node",
                                silent, members_.size());
  return {now - *cut_since_ < kCutHolds ? Verdict::kWait : Verdict::kStepDown, std::move(why), {}};
}

}  // namespace everstep::launcher
