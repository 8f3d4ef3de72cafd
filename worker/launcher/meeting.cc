#include "worker/launcher/meeting.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace everstep::launcher {
namespace {

constexpr char kEndpointLabel[] = "endpoint";  // on the node that brought the first controller

}  // namespace

std::string Meeting::Open() {
  return ports_.Open(options_.address);
}

std::map<std::string, std::string> Meeting::Labels() const {
  std::map<std::string, std::string> labels = {{kBeaconLabel, ports_.beacon()},
                                               {kSuccessorLabel, ports_.controller()}};
  if (options_.host) labels.emplace(kEndpointLabel, "yes");
  return labels;
}

void Meeting::Start() {
  Watch::Options watch;
  watch.node = options_.node;
  watch.beacon = ports_.beacon_descriptor();
  watch.act = [this](const Ruling& ruling) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      news_.act = ruling;
    }
    options_.wake();
  };
  watch.silent = [this] {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      news_.redial = true;
    }
    options_.wake();
  };
  watch.say = [this](const std::string& why) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      news_.say = why;
    }
    options_.wake();
  };
  watch_ = std::make_unique<Watch>(std::move(watch));
}

std::optional<std::string> Meeting::OnStatus(const v1::JobStatus& status,
                                             const std::string& controller) {
  v1::StoreSnapshot snapshot;
  if (status.snapshot().empty() || !snapshot.ParseFromString(status.snapshot()))
    return std::nullopt;
  snapshot_ = status.snapshot();
  std::string host;
  for (const v1::NodeRecord& node : snapshot.nodes()) {
    const auto successor = node.labels().find(kSuccessorLabel);
    const bool stands_there = successor != node.labels().end() && successor->second == controller;
    const bool first = controller == options_.endpoint && node.labels().count(kEndpointLabel) > 0;
    if (stands_there || first) host = node.node();
  }
  std::vector<Peer> peers = PeersOf(snapshot, status);
  // The one that answers first, so that nobody dials the dead before the living.
  std::string controllers = controller;
  if (controller != options_.endpoint) controllers.append(",").append(options_.endpoint);
  std::size_t listed = 2;
  for (const Peer& peer : peers) {
    constexpr std::size_t kMost = 16;  // as many as an agent takes
    if (listed == kMost) break;
    if (peer.controller == controller || peer.controller.empty()) continue;
    controllers.append(",").append(peer.controller);
    ++listed;
  }
  watch_->Update(controller, host, std::move(peers));
  watch_->SetFollowed(true);
  if (controllers == controllers_) return std::nullopt;
  controllers_ = controllers;
  return controllers;
}

void Meeting::SetFollowed(bool followed) {
  if (watch_ != nullptr) watch_->SetFollowed(followed);
}

Meeting::News Meeting::TakeNews() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(news_, {});
}

std::string Meeting::ReleaseControllerAddress() {
  ports_.ReleaseController();
  return ports_.controller();
}

}  // namespace everstep::launcher
