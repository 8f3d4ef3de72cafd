#include "worker/keeper/store_hosts.h"

#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "proto/base/log.h"
#include "worker/keeper/process.h"
#include "worker/keeper/python_files.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

constexpr std::int64_t kLimitNs = 60'000'000'000;
constexpr std::int64_t kSpareDelayNs = 2'000'000'000;
constexpr std::int64_t kLookNs = 250'000'000;
constexpr int kStatusFd = 3;
constexpr int kListenerFd = 4;

}  // namespace

StoreHosts::Host* StoreHosts::Find(const std::string& job, std::uint64_t generation) {
  for (auto& [id, host] : hosts_) {
    if (!host->spare && host->spec.job() == job && host->spec.generation() == generation)
      return host.get();
  }
  return nullptr;
}

void StoreHosts::Start(const v1::KeeperStoreHost& request, Done done) {
  const auto fence = fences_.find(request.job());
  if (fence != fences_.end() && request.generation() <= fence->second) {
    done(Refusal(ESTALE,
                 fmt::format("no store for job {} generation {}: generations up to {} are over",
                             request.job(), request.generation(), fence->second)));
    return;
  }
  if (Host* host = Find(request.job(), request.generation()); host != nullptr) {
    host->waiting.push_back(std::move(done));
    if (host->port != 0) Answer(host);
    return;
  }
  for (auto& [id, host] : hosts_) {
    if (!host->spare || host->port == 0 || request.port() != 0) continue;
    if (host->spec.job() != request.job() || host->spec.bind_address() != request.bind_address())
      continue;
    host->spare = false;
    host->spec.set_generation(request.generation());
    host->waiting.push_back(std::move(done));
    Answer(host.get());
    WishSpare(request);
    return;
  }
  if (hosts_.size() >= kMaxStores) {
    done(Refusal(EAGAIN,
                 fmt::format("the keeper of node {} hosts {} stores, its limit; forget ended jobs",
                             context_->node, kMaxStores)));
    return;
  }
  const Id id = Make(request, false);
  Host* host = hosts_.at(id).get();
  host->waiting.push_back(std::move(done));
  std::string error;
  if (!Bind(host, &error)) {
    Fail(id, EADDRINUSE, error);
    return;
  }
  if (host->port != 0) Answer(host);
  Launch(id, true);
}

StoreHosts::Id StoreHosts::Make(const v1::KeeperStoreHost& spec, bool spare) {
  const Id id = next_++;
  auto host = std::make_unique<Host>(context_);
  host->spec = spec;
  host->spare = spare;
  host->limit_ns = MonotonicNanos() + kLimitNs;
  hosts_.emplace(id, std::move(host));
  return id;
}

// Addresses in figures only: looking a name up may block, so that is left to the store's process.
bool StoreHosts::Bind(Host* host, std::string* error) {
  const std::string& address = host->spec.bind_address();
  const std::string where = address.empty() || address == "localhost" ? "127.0.0.1" : address;
  const std::string service = std::to_string(host->spec.port());
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(where.c_str(), service.c_str(), &hints, &found) != 0) return true;
  OwnedFd socket(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int one = 1;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  const bool bound = ::bind(socket.get(), found->ai_addr, found->ai_addrlen) == 0 &&
                     ::listen(socket.get(), 2048) == 0;
  const int problem = errno;
  ::freeaddrinfo(found);
  if (!bound) {
    *error = fmt::format(
        "cannot listen at {} port {}: {}{}", where, host->spec.port(), ErrnoText(problem),
        problem == EADDRINUSE ? "; choose another --master-port, or 0 for a free one" : "");
    return false;
  }
  sockaddr_storage name{};
  socklen_t size = sizeof(name);
  ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&name), &size);
  host->port = name.ss_family == AF_INET6 ? ntohs(reinterpret_cast<sockaddr_in6*>(&name)->sin6_port)
                                          : ntohs(reinterpret_cast<sockaddr_in*>(&name)->sin_port);
  host->listener = std::move(socket);
  return true;
}

void StoreHosts::Launch(Id id, bool may_fork) {
  Host* host = hosts_.at(id).get();
  const v1::KeeperStoreHost& spec = host->spec;
  OwnedFd status =
      host->status.Open([this, id](const std::string& line, bool last) { OnLine(id, line, last); });
  if (!status) {
    Fail(id, errno, fmt::format("no pipe: {}", ErrnoText(errno)));
    return;
  }
  host->pid = 0;
  const auto answer =
      may_fork && host->listener
          ? fork_servers_->ForkStoreHost(spec.job(), host->listener.get(), status.get())
          : ForkServers::Answer::kNever;
  host->waiting_for_server = answer == ForkServers::Answer::kLater;
  host->forked = answer == ForkServers::Answer::kAsked;
  if (host->forked) return;
  if (host->waiting_for_server) {
    host->status.Close();
    return;
  }
  if (host->spare) {
    End(id);  // a fresh one would import torch for nothing but a hope
    return;
  }
  LaunchSpec launch;
  launch.argv = {spec.python().empty() ? "python3" : spec.python(),
                 "-u",
                 StoreHostProgram(context_->folder),
                 std::to_string(kStatusFd),
                 std::to_string(::getpid()),
                 spec.bind_address(),
                 std::to_string(spec.port())};
  launch.keep = {{status.get(), kStatusFd}};
  if (host->listener) {
    launch.argv.push_back(std::to_string(kListenerFd));
    launch.keep.emplace_back(host->listener.get(), kListenerFd);
  }
  for (const auto& [key, value] : spec.env())
    launch.env.push_back(fmt::format("{}={}", key, value));
  launch.stdout_path = launch.stderr_path = fmt::format("{}/store-host.log", context_->folder);
  launch.status_fd = status.get();
  std::string error;
  host->pid = keeper::Launch(launch, &error);
  if (host->pid < 0) {
    host->pid = 0;
    Fail(id, EAGAIN, error);
  }
}

void StoreHosts::OnLine(Id id, const std::string& line, bool last) {
  const auto it = hosts_.find(id);
  if (it == hosts_.end()) return;
  Host* host = it->second.get();
  if (line.starts_with("P")) {
    pid_t pid = 0;
    std::from_chars(line.data() + 1, line.data() + line.size(), pid);
    siginfo_t info{};
    if (pid > 0 &&
        ::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) == 0) {
      host->pid = pid;
    }
  } else if (line.starts_with("port ")) {
    std::from_chars(line.data() + 5, line.data() + line.size(), host->port);
    Answer(host);
  } else if (line.starts_with("serving")) {
    host->limit_ns = 0;
    host->listener.Close();
    LogInfo("store_ready", {{"job", host->spec.job()},
                            {"generation", host->spec.generation()},
                            {"port", host->port},
                            {"pid", host->pid},
                            {"spare", host->spare}});
    if (!host->spare) WishSpare(host->spec);
  } else if (line.starts_with("reached ")) {
    // So many ranks have put their addresses for the default group.
    std::from_chars(line.data() + 8, line.data() + line.size(), host->reached);
    host->reached_ns = MonotonicNanos();
    host->next_look_ns = host->reached_ns + kLookNs;
  } else if (line.starts_with("E") || line.starts_with("R")) {
    Retry(id, line.substr(1));
  } else if (last && host->limit_ns != 0) {
    Retry(id, fmt::format("its process ended before it served; see {}/store-host.log",
                          context_->folder));
  }
}

// What a fork server could not do a fresh process may.
void StoreHosts::Retry(Id id, const std::string& why) {
  Host* host = hosts_.at(id).get();
  if (!host->forked || host->spare) {
    Fail(id, EIO, why);
    return;
  }
  LogWarning("store_fork_failed", {{"job", host->spec.job()}, {"why", why}});
  Launch(id, false);
}

void StoreHosts::Answer(Host* host) {
  for (const Done& done : std::exchange(host->waiting, {})) {
    v1::KeeperReply reply;
    auto* ready = reply.mutable_store_ready();
    ready->set_job(host->spec.job());
    ready->set_generation(host->spec.generation());
    ready->set_port(host->port);
    ready->set_pid(host->pid);
    done(reply);
  }
}

void StoreHosts::Fail(Id id, int error, const std::string& why) {
  const auto it = hosts_.find(id);
  if (it == hosts_.end()) return;
  const std::string text =
      fmt::format("node {}: no store for job {} generation {}: {}", context_->node,
                  it->second->spec.job(), it->second->spec.generation(), why);
  const std::vector<Done> waiting = std::exchange(it->second->waiting, {});
  LogWarning("store_failed", {{"job", it->second->spec.job()}, {"why", why}});
  End(id);
  for (const Done& done : waiting) done(Refusal(error, text));
}

void StoreHosts::End(Id id) {
  const auto it = hosts_.find(id);
  if (it == hosts_.end()) return;
  const std::unique_ptr<Host> host = std::move(it->second);
  hosts_.erase(it);
  if (host->pid > 0) ::kill(host->pid, SIGKILL);
  for (const Done& done : host->waiting) {
    done(Refusal(ECANCELED,
                 fmt::format("the store of job {} generation {} was stopped while it started",
                             host->spec.job(), host->spec.generation())));
  }
}

// Not at once: the generation's workers start now, and need the processors.
void StoreHosts::WishSpare(const v1::KeeperStoreHost& like) {
  wishes_[like.job()] = {like, MonotonicNanos() + kSpareDelayNs};
}

void StoreHosts::MakeSpare(const v1::KeeperStoreHost& like) {
  for (const auto& [id, host] : hosts_) {
    if (host->spare && host->spec.job() == like.job()) return;
  }
  if (like.port() != 0 || hosts_.size() >= kMaxStores) return;
  v1::KeeperStoreHost spec = like;
  spec.set_generation(0);
  const Id id = Make(spec, true);
  std::string error;
  if (!Bind(hosts_.at(id).get(), &error) || !hosts_.at(id)->listener) {
    End(id);
    return;
  }
  Launch(id, true);
}

void StoreHosts::OnForkServer(const std::string& job) {
  std::vector<Id> waiting;
  for (const auto& [id, host] : hosts_) {
    if (host->spec.job() == job && host->waiting_for_server) waiting.push_back(id);
  }
  for (const Id id : waiting) {
    if (hosts_.count(id) != 0) Launch(id, true);
  }
}

void StoreHosts::Kill(const std::string& job, std::uint64_t generation) {
  std::uint64_t& fence = fences_[job];
  fence = std::max(fence, generation);
  std::vector<Id> over;
  for (const auto& [id, host] : hosts_) {
    if (host->spec.job() == job && !host->spare && host->spec.generation() <= generation)
      over.push_back(id);
  }
  for (const Id id : over) End(id);
}

void StoreHosts::Forget(const std::string& job) {
  std::vector<Id> over;
  for (const auto& [id, host] : hosts_) {
    if (host->spec.job() == job) over.push_back(id);
  }
  for (const Id id : over) End(id);
  fences_.erase(job);
  wishes_.erase(job);
}

void StoreHosts::KillAll() {
  wishes_.clear();
  while (!hosts_.empty()) End(hosts_.begin()->first);
}

bool StoreHosts::Owns(pid_t pid) const {
  for (const auto& [id, host] : hosts_) {
    if (host->pid == pid) return true;
  }
  return false;
}

bool StoreHosts::OnExit(pid_t pid, const std::string& how) {
  for (auto& [id, host] : hosts_) {
    if (host->pid != pid) continue;
    host->pid = 0;
    if (host->limit_ns == 0 && !host->spare) {
      // Its generation's workers cannot form groups any more; those that run need it no longer.
      LogWarning(
          "store_lost",
          {{"job", host->spec.job()}, {"generation", host->spec.generation()}, {"how", how}});
    }
    if (host->limit_ns != 0) {
      Retry(id,
            fmt::format("its process ended ({}); see {}/store-host.log", how, context_->folder));
    } else {
      End(id);
    }
    return true;
  }
  return false;
}

void StoreHosts::Describe(v1::KeeperState* state) const {
  for (const auto& [id, host] : hosts_) {
    if (host->spare || host->port == 0) continue;
    auto* s = state->add_stores();
    s->set_job(host->spec.job());
    s->set_generation(host->spec.generation());
    s->set_port(host->port);
    s->set_pid(host->pid);
  }
}

std::optional<std::int64_t> StoreHosts::NextDeadline() const {
  std::optional<std::int64_t> next;
  for (const auto& [id, host] : hosts_) {
    if (host->limit_ns != 0 && (!next || host->limit_ns < *next)) next = host->limit_ns;
    if (host->reached_ns != 0 && !host->formed && (!next || host->next_look_ns < *next)) {
      next = host->next_look_ns;
    }
  }
  for (const auto& [job, wish] : wishes_) {
    if (!next || wish.at_ns < *next) next = wish.at_ns;
  }
  return next;
}

void StoreHosts::Tick(std::int64_t now) {
  for (auto it = wishes_.begin(); it != wishes_.end();) {
    if (now < it->second.at_ns) {
      ++it;
      continue;
    }
    const v1::KeeperStoreHost like = it->second.like;
    it = wishes_.erase(it);
    MakeSpare(like);
  }
  std::vector<Id> late;
  for (auto& [id, host] : hosts_) {
    if (host->limit_ns != 0 && now >= host->limit_ns) late.push_back(id);
    if (host->reached_ns != 0 && !host->formed && now >= host->next_look_ns) {
      LookAtGroup(host.get(), now);
    }
  }
  for (const Id id : late) {
    Fail(id, ETIMEDOUT, fmt::format("it does not serve after {} s", kLimitNs / 1'000'000'000));
  }
}

// Gloo joins every pair of ranks by one connection. Every rank is there (the store has their
// addresses): a local rank with fewer connections than peers is one whose group does not form.
void StoreHosts::LookAtGroup(Host* host, std::int64_t now) {
  host->next_look_ns = now + kLookNs;
  const auto peers = workers_->Watched(host->spec.job(), host->spec.generation());
  if (peers.empty()) {
    host->formed = true;  // nobody asked, or they have ended
    return;
  }
  for (const Workers::Peer& peer : peers) {
    // Some are still on their way: "reached" will come again.
    if (host->reached < peer.world_size) {
      host->reached_ns = 0;
      return;
    }
    const auto seen = CountConnections(peer.pid, static_cast<std::uint16_t>(host->port));
    if (!seen || seen->others + 1 >= static_cast<int>(peer.world_size)) continue;
    // Who waits for its group holds on to the store; who has let go is done with both.
    if (seen->to_port == 0) continue;
    const std::int64_t waited_ms = (now - host->reached_ns) / 1'000'000;
    if (waited_ms < static_cast<std::int64_t>(peer.start_timeout_ms) || !host->forming.Due(now))
      return;  // not formed, not late
    const bool news = !host->forming.told();
    host->forming.Told(now);
    v1::KeeperReply event;
    v1::KeeperStalled* stalled = event.mutable_stalled();
    stalled->set_job(host->spec.job());
    stalled->set_generation(host->spec.generation());
    stalled->set_rank(peer.rank);
    stalled->set_kind(2);
    stalled->set_stalled_ms(waited_ms);
    stalled->set_evidence(fmt::format(
        "every one of {} ranks gave the store its address {} ms ago; rank {} "
        "(pid {}) has {} connections to its {} peers",
        peer.world_size, waited_ms, peer.rank, peer.pid, seen->others, peer.world_size - 1));
    if (news) {
      LogWarning("group_not_formed", {{"job", host->spec.job()},
                                      {"generation", host->spec.generation()},
                                      {"rank", peer.rank},
                                      {"evidence", stalled->evidence()}});
    }
    context_->tell_owner(event);
    return;
  }
  host->formed = true;
}

}  // namespace everstep::keeper
