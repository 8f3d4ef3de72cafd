#include "worker/keeper/keeper.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/check.h"
#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "proto/base/file_lock.h"
#include "proto/base/log.h"
#include "worker/keeper/attach_protocol.h"
#include "worker/keeper/client.h"
#include "worker/keeper/process.h"
#include "worker/keeper/python_files.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

std::string HowItEnded(int code) {
  return code >= 0 ? fmt::format("exit code {}", code) : fmt::format("signal {}", -code);
}

}  // namespace

Keeper::Keeper(KeeperOptions options)
    : options_(std::move(options)),
      fork_servers_(&context_),
      workers_(&context_, &fork_servers_),
      stores_(&context_, &fork_servers_, &workers_) {
  context_.node = options_.node;
  const auto slash = options_.socket_path.rfind('/');
  context_.folder = slash == std::string::npos ? "." : options_.socket_path.substr(0, slash + 1);
  if (char* folder = ::realpath(context_.folder.c_str(), nullptr); folder != nullptr) {
    context_.folder = folder;
    std::free(folder);
  }
  context_.tell_owner = [this](const v1::KeeperReply& event) {
    const auto it = connections_.find(owner_);
    if (it == connections_.end()) return;
    // Workers say their words again; an agent that does not read must not lose its link for them.
    if (event.has_told() && it->second->queued() > kMaxToldQueue) return;
    it->second->Send(event);
  };
  fork_servers_.on_change = [this](const std::string& job) {
    stores_.OnForkServer(job);  // first: the workers will look for their store
    workers_.OnForkServer(job);
  };
}

Keeper::~Keeper() {
  for (const auto& [token, connection] : connections_) context_.loop.Remove(token);
}

bool Keeper::Begin(std::string* error) {
  const std::string& path = options_.socket_path;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    *error = fmt::format(
        "the keeper's socket path has {} bytes, the limit is {}: {}; choose a shorter "
        "--state-dir",
        path.size(), sizeof(address.sun_path) - 1, path);
    return false;
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  // The lock, not the socket, tells whether a keeper lives: it goes with the process.
  lock_ = OwnedFd(::open((path + ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_) {
    *error = fmt::format("cannot open {}.lock: {}; is the state directory there and writable?",
                         path, ErrnoText(errno));
    return false;
  }
  if (!LockFile(lock_.get(), kLockPatience)) {
    *error = fmt::format("another keeper serves {}; end it first or use another --state-dir", path);
    return false;
  }
  if (!WritePythonFiles(context_.folder, error)) return false;
  ::unlink(path.c_str());
  listener_ = OwnedFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const mode_t mask = ::umask(0077);  // only this user may connect
  const int bound = ::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address));
  const int bind_error = errno;
  ::umask(mask);
  if (bound != 0 || ::listen(listener_.get(), 64) != 0) {
    *error =
        fmt::format("cannot listen at {}: {}", path, ErrnoText(bound != 0 ? bind_error : errno));
    return false;
  }
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT}) sigaddset(&set, signal);
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  signals_ = OwnedFd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  EVERSTEP_CHECK(signals_.get() >= 0, "signalfd failed");
  context_.loop.Add(signals_.get(), EPOLLIN, [this](std::uint32_t) {
    signalfd_siginfo info{};
    bool child = false;
    while (::read(signals_.get(), &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo == SIGCHLD) child = true;
      if (info.ssi_signo == SIGTERM) BeginShutdown(2000, "SIGTERM");
    }
    if (child) OnChild();
  });
  context_.loop.Add(listener_.get(), EPOLLIN, [this](std::uint32_t) { Accept(); });
  if (options_.lifeline >= 0) {
    // Only this process holds it from here on; a worker must not.
    ::fcntl(options_.lifeline, F_SETFD, FD_CLOEXEC);
    ::fcntl(options_.lifeline, F_SETFL, O_NONBLOCK);
    lifeline_ =
        context_.loop.Add(options_.lifeline, EPOLLIN, [this](std::uint32_t) { OnLifeline(); });
  }
  orphan_since_ns_ = MonotonicNanos();
  return true;
}

void Keeper::OnLifeline() {
  char byte = 0;
  const ssize_t n = ::read(options_.lifeline, &byte, 1);
  if (n > 0 || (n < 0 && (errno == EINTR || errno == EAGAIN))) return;
  context_.loop.Remove(lifeline_);
  shutting_down_ = false;  // an end in order that is under way is cut short
  BeginShutdown(0, "the lifeline was cut");
}

int Keeper::TimeoutMs() const {
  std::optional<std::int64_t> next;
  const auto consider = [&next](std::optional<std::int64_t> at) {
    if (at && (!next || *at < *next)) next = at;
  };
  consider(workers_.NextDeadline());
  consider(fork_servers_.NextDeadline());
  consider(stores_.NextDeadline());
  if (shutting_down_) consider(shutdown_limit_ns_);
  if (options_.orphan_timeout_ms > 0 && owner_ == 0) {
    consider(orphan_since_ns_ + options_.orphan_timeout_ms * 1'000'000);
  }
  if (!next) return -1;
  const std::int64_t wait = *next - MonotonicNanos();
  return wait <= 0 ? 0 : static_cast<int>(std::min<std::int64_t>(wait / 1'000'000 + 1, 60'000));
}

int Keeper::Run() {
  while (true) {
    context_.loop.RunOnce(TimeoutMs());
    const std::int64_t now = MonotonicNanos();
    workers_.Tick(now);
    fork_servers_.Tick(now);
    stores_.Tick(now);
    Sweep();
    if (options_.orphan_timeout_ms > 0 && owner_ == 0 && !shutting_down_ &&
        now >= orphan_since_ns_ + options_.orphan_timeout_ms * 1'000'000) {
      BeginShutdown(2000, "no agent for the orphan timeout");
    }
    if (shutting_down_ && (!workers_.AnyRunning() || now >= shutdown_limit_ns_)) break;
  }
  ::unlink(options_.socket_path.c_str());
  LogInfo("keeper_ended", {{"node", options_.node}});
  return 0;
}

void Keeper::BeginShutdown(std::uint32_t grace_ms, const char* why) {
  if (shutting_down_) return;
  shutting_down_ = true;
  shutdown_limit_ns_ = MonotonicNanos() + (static_cast<std::int64_t>(grace_ms) + 2000) * 1'000'000;
  LogInfo("keeper_ends", {{"node", options_.node}, {"why", why}, {"grace_ms", grace_ms}});
  workers_.KillAll(grace_ms);
  stores_.KillAll();
}

// --- children ---

void Keeper::OnChild() {
  for (const pid_t pid : ListChildren()) {
    siginfo_t info{};
    if (::waitid(P_PID, static_cast<id_t>(pid), &info, WSTOPPED | WCONTINUED | WNOHANG) == 0 &&
        info.si_pid == pid) {
      workers_.OnStopped(pid, info.si_code == CLD_STOPPED);
      // Our own helpers are of use to nobody while they stand still.
      if (info.si_code == CLD_STOPPED && (fork_servers_.Owns(pid) || stores_.Owns(pid))) {
        LogWarning("helper_stopped", {{"pid", pid}, {"action", "SIGCONT"}});
        ::kill(pid, SIGCONT);
      }
    }
    info = {};
    if (::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
        info.si_pid != pid) {
      continue;
    }
    const int code = info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
    const auto answer = workers_.OnExit(pid, code);
    if (answer == Workers::ExitAnswer::kLater && !fork_servers_.Owns(pid) && !stores_.Owns(pid))
      continue;
    if (answer != Workers::ExitAnswer::kReap) {
      const std::string how = HowItEnded(code);
      if (!fork_servers_.OnExit(pid, how)) stores_.OnExit(pid, how);
    }
    ::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG);
  }
  workers_.ReapOrphans();
}

// --- connections ---

void Keeper::Accept() {
  while (true) {
    OwnedFd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      // No descriptor is free: the caller waits in the queue, and this loop must not spin.
      if (errno == EMFILE || errno == ENFILE) ::poll(nullptr, 0, 20);
      return;
    }
    ucred peer{};
    socklen_t size = sizeof(peer);
    ::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size);
    if (connections_.size() >= kMaxConnections) {
      LogWarning("connection_refused",
                 {{"pid", peer.pid}, {"limit", std::uint64_t{kMaxConnections}}});
      continue;
    }
    auto connection = std::make_unique<Connection>(std::move(socket), peer.pid);
    const int fd = connection->fd();
    // The token is known only after Add; handlers run later, on this thread.
    auto token = std::make_shared<Loop::Token>(0);
    *token = context_.loop.Add(fd, EPOLLIN,
                               [this, token](std::uint32_t events) { OnReady(*token, events); });
    connection->token = *token;
    connections_.emplace(*token, std::move(connection));
  }
}

void Keeper::OnReady(Loop::Token token, std::uint32_t events) {
  const auto it = connections_.find(token);
  if (it == connections_.end()) return;
  Connection* connection = it->second.get();
  if ((events & EPOLLOUT) != 0 && !connection->Flush()) connection->broken = true;
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) == 0 || connection->closing) return;
  if (!connection->Read()) {
    connection->broken = true;
    return;
  }
  if (connection->session) return OnSessionWords(connection);
  if (!connection->greeted) {
    const std::string_view first = connection->reader().pending();
    std::uint32_t magic = 0;
    if (first.size() >= sizeof(magic)) std::memcpy(&magic, first.data(), sizeof(magic));
    if (magic == kAttachMagic) {
      if (first.size() >= sizeof(AttachRequest)) OnAttach(connection);
      return;
    }
    if (magic == kSessionMagic) {
      if (first.size() >= sizeof(SessionRequest)) OnSession(connection);
      return;
    }
  }
  std::string frame;
  while (!connection->closing && !connection->broken) {
    const FrameReader::Result result = connection->reader().Pop(&frame);
    if (result == FrameReader::Result::kMore) return;
    v1::KeeperRequest request;
    if (result == FrameReader::Result::kTooLong) {
      Refuse(
          connection, 0, EMSGSIZE,
          fmt::format(
              "the keeper of node {} takes frames of at most {} bytes, pid {} announced {}; is "
              "it speaking another protocol?",
              options_.node, kMaxFrameBytes, connection->peer(), connection->reader().announced()));
    } else if (!request.ParseFromString(frame)) {
      Refuse(
          connection, 0, EBADMSG,
          fmt::format("the keeper of node {} cannot read a frame of {} bytes from pid {}: it is no "
                      "KeeperRequest",
                      options_.node, frame.size(), connection->peer()));
    } else {
      OnRequest(connection, request);
    }
  }
}

void Keeper::Refuse(Connection* connection, std::uint64_t id, int error, const std::string& text) {
  LogWarning("request_refused", {{"pid", connection->peer()}, {"why", text}});
  v1::KeeperReply reply = Refusal(error, text);
  reply.set_id(id);
  connection->Send(reply);
  connection->closing = true;
}

void Keeper::Drop(Loop::Token token) {
  context_.loop.Remove(token);
  if (token == owner_) {
    LogInfo("agent_gone", {{"node", options_.node}, {"pid", connections_.at(token)->peer()}});
    owner_ = 0;
    orphan_since_ns_ = MonotonicNanos();
  }
  const bool session = connections_.at(token)->session;
  connections_.erase(token);
  if (session) workers_.OnSessionLost(token);
}

// Closes what is to be closed and asks for writability where something waits.
void Keeper::Sweep() {
  std::vector<Loop::Token> over;
  for (auto& [token, connection] : connections_) {
    if (connection->broken || (connection->closing && !connection->wants_write())) {
      over.push_back(token);
    } else {
      context_.loop.Modify(token, connection->wants_write() ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
  }
  for (const Loop::Token token : over) Drop(token);
}

}  // namespace everstep::keeper
