#include "worker/launcher/watch.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "worker/launcher/process.h"

namespace everstep::launcher {
namespace {

constexpr int kProbeLimitMs = 250;
constexpr std::chrono::milliseconds kStep{50};          // while the controller is away
constexpr std::chrono::milliseconds kQuietStep{1'000};  // while it answers: silence shows here

// A socket bound to any port of `address`; -1: errno says why.
int BindAny(const std::string& address, std::string* text) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), "0", &hints, &found) != 0) {
    errno = EADDRNOTAVAIL;
    return -1;
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, ::freeaddrinfo);
  const int bound = ::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (bound < 0) return -1;
  sockaddr_storage own{};
  socklen_t length = sizeof(own);
  if (::bind(bound, found->ai_addr, found->ai_addrlen) != 0 ||
      ::getsockname(bound, reinterpret_cast<sockaddr*>(&own), &length) != 0) {
    const int error = errno;
    ::close(bound);
    errno = error;
    return -1;
  }
  Endpoint endpoint;
  endpoint.host = address;
  endpoint.port =
      ntohs(own.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&own)->sin6_port
                                      : reinterpret_cast<const sockaddr_in*>(&own)->sin_port);
  *text = endpoint.text();
  return bound;
}

std::string Label(const v1::NodeRecord& node, const char* key) {
  const auto found = node.labels().find(key);
  return found == node.labels().end() ? std::string() : found->second;
}

}  // namespace

Ports::~Ports() {
  if (beacon_ >= 0) ::close(beacon_);
  ReleaseController();
}

std::string Ports::Open(const std::string& address) {
  beacon_ = BindAny(address, &beacon_text_);
  controller_ = beacon_ < 0 ? -1 : BindAny(address, &controller_text_);
  if (controller_ < 0 || ::listen(beacon_, 128) != 0) {
    return fmt::format(
        "cannot listen on this node's address {}: {}; name the right one with --local-addr",
        address, ErrnoText(errno));
  }
  return {};
}

void Ports::ReleaseController() {
  if (controller_ >= 0) ::close(std::exchange(controller_, -1));
}

std::vector<Peer> PeersOf(const v1::StoreSnapshot& snapshot, const v1::JobStatus& status) {
  std::map<std::string, Peer> by_name;
  for (const v1::NodeRecord& node : snapshot.nodes()) {
    Peer peer;
    peer.node = node.node();
    peer.beacon = Label(node, kBeaconLabel);
    peer.controller = Label(node, kSuccessorLabel);
    peer.data = Endpoint{node.address(), static_cast<std::uint16_t>(node.data_port())}.text();
    if (!peer.beacon.empty()) by_name.emplace(peer.node, std::move(peer));
  }
  std::vector<Peer> peers;
  for (const std::string& member : status.members()) {
    const auto found = by_name.find(member);
    if (found == by_name.end()) continue;
    found->second.member = true;
    peers.push_back(std::move(found->second));
    by_name.erase(found);
  }
  for (auto& [name, peer] : by_name) peers.push_back(std::move(peer));
  return peers;
}

Watch::Watch(Options options) : options_(std::move(options)), thread_([this] { Loop(); }) {}

Watch::~Watch() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Watch::Update(const std::string& controller, const std::string& host,
                   std::vector<Peer> peers) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto same = [](const Peer& a, const Peer& b) {
    return a.node == b.node && a.beacon == b.beacon && a.data == b.data && a.member == b.member;
  };
  if (controller == controller_ && host == host_ &&
      std::equal(peers.begin(), peers.end(), peers_.begin(), peers_.end(), same)) {
    return;
  }
  if (host != host_) acted_ = false;
  controller_ = controller;
  host_ = host;
  peers_ = std::move(peers);
  ++version_;
}

void Watch::SetFollowed(bool followed) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (followed_ == followed) return;
    followed_ = followed;
  }
  changed_.notify_all();
}

Sight Watch::Look(const std::string& controller, const std::string& host,
                  const std::vector<Peer>& peers) {
  Sight sight;
  sight.controller = ProbeAll({controller}, kProbeLimitMs).front();
  // While the controller listens nobody asks for the rest.
  if (sight.controller == Probe::kListens) {
    sight.peers.assign(peers.size(), Probe::kListens);
    return sight;
  }
  std::vector<std::string> addresses;
  addresses.reserve(peers.size() + 1);
  for (const Peer& peer : peers) addresses.push_back(peer.beacon);
  for (const Peer& peer : peers) {
    if (peer.node == host) addresses.push_back(peer.data);
  }
  sight.peers = ProbeAll(addresses, kProbeLimitMs);
  if (sight.peers.size() > peers.size()) {
    sight.host_agent = sight.peers.back();
    sight.peers.resize(peers.size());
  }
  for (std::size_t i = 0; i < peers.size(); ++i) {
    if (peers[i].node == options_.node) sight.peers[i] = Probe::kListens;
  }
  return sight;
}

std::vector<Probe> Watch::LookAtPeers(const std::vector<Peer>& peers) {
  std::vector<std::string> addresses;
  addresses.reserve(peers.size() + 1);
  for (const Peer& peer : peers) addresses.push_back(peer.beacon);
  std::vector<Probe> sight = ProbeAll(addresses, kProbeLimitMs);
  for (std::size_t i = 0; i < peers.size(); ++i) {
    if (peers[i].node == options_.node) sight[i] = Probe::kListens;
  }
  return sight;
}

void Watch::Loop() {
  const RealClock clock;
  std::unique_ptr<Succession> succession;
  HostGuard guard;
  int silent_looks = 0;
  std::uint64_t version = 0;
  std::string said;
  while (true) {
    std::string controller;
    std::string host;
    bool followed = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_for(lock, followed_ ? kQuietStep : kStep);
      if (ending_) return;
      if (version != version_) {
        version = version_;
        succession = std::make_unique<Succession>(options_.node, host_, peers_);
      }
      controller = controller_;
      host = host_;
      followed = followed_;
    }
    while (
        true) {  // whoever asks whether we live is answered by the kernel; this empties its queue
      const int caller = ::accept4(options_.beacon, nullptr, nullptr, SOCK_CLOEXEC);
      if (caller < 0) break;
      ::close(caller);
    }
    if (succession == nullptr || controller.empty()) continue;
    Ruling ruling;
    if (host == options_.node) {
      ruling = guard.Step(clock.Now(), succession->peers(), LookAtPeers(succession->peers()));
    } else {
      Sight sight = Look(controller, host, succession->peers());
      // A stream to a machine that vanished stays open for a long time: the probe knows better.
      sight.followed = followed && sight.controller != Probe::kSilent;
      ruling = succession->Step(clock.Now(), sight);
      // Twice in a row: one answer may be lost.
      silent_looks = followed && sight.controller == Probe::kSilent ? silent_looks + 1 : 0;
      if (silent_looks == 2) options_.silent();
    }
    if (ruling.verdict == Verdict::kNoMajority && said != ruling.why) {
      said = ruling.why;
      options_.say(ruling.why);
    }
    if (ruling.verdict != Verdict::kTakeOver && ruling.verdict != Verdict::kStepDown) continue;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // What was looked at may have changed meanwhile.
      if (version != version_ || std::exchange(acted_, true)) continue;
    }
    options_.act(ruling);
  }
}

}  // namespace everstep::launcher
