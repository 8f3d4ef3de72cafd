#include "worker/keeper/fork_servers.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "proto/base/log.h"
#include "proto/base/process_stat.h"
#include "worker/keeper/framing.h"
#include "worker/keeper/process.h"
#include "worker/keeper/python_files.h"

namespace everstep::keeper {
namespace {

namespace v1 = everstep::v1;

enum Kind : std::uint32_t { kScript = 1, kModule = 2, kProgram = 3, kRunPath = 4 };  // Command.Kind

constexpr std::int64_t kStartLimitNs = 120'000'000'000;
constexpr int kControlFd = 3;
constexpr int kStatusFd = 4;

// torch.distributed.run's run_script_path().
constexpr const char* kRunPathCode =
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')";

// What Python, the BLAS libraries, OpenMP or torch read once, at their import or start.
constexpr std::array kRankVariables = {"RANK",
                                       "LOCAL_RANK",
                                       "GROUP_RANK",
                                       "ROLE_RANK",
                                       "ROLE_NAME",
                                       "LOCAL_WORLD_SIZE",
                                       "WORLD_SIZE",
                                       "GROUP_WORLD_SIZE",
                                       "ROLE_WORLD_SIZE",
                                       "MASTER_ADDR",
                                       "MASTER_PORT",
                                       "CUDA_VISIBLE_DEVICES",
                                       "TORCH_NCCL_ASYNC_ERROR_HANDLING"};

std::string Frame(const std::vector<std::string>& fields) {
  std::string body;
  const auto number = [&body](std::size_t n) {
    for (int i = 0; i < 4; ++i) body += static_cast<char>(n >> (8 * i));
  };
  number(0);
  for (const std::string& field : fields) {
    number(field.size());
    body += field;
  }
  const std::size_t size = body.size() - 4;
  for (int i = 0; i < 4; ++i)
    body[static_cast<std::size_t>(i)] = static_cast<char>(size >> (8 * i));
  return body;
}

// The first key whose value differs between what the server was started with and the worker's.
std::string DifferingKey(const v1::KeeperForkServer& server, const v1::KeeperSpawn& spawn) {
  for (const auto& [key, value] : spawn.env()) {
    if (IsRankVariable(key)) continue;
    const auto it = server.env().find(key);
    if (it == server.env().end() || it->second != value) return key;
  }
  for (const auto& [key, value] : server.env()) {
    if (!IsRankVariable(key) && spawn.env().find(key) == spawn.env().end()) return key;
  }
  return "";
}

bool SameCommand(const v1::KeeperForkServer& server, const v1::KeeperSpawn& spawn) {
  return server.command_kind() == spawn.command_kind() && server.python() == spawn.python() &&
         server.target() == spawn.target() && server.cwd() == spawn.cwd() &&
         server.args_size() == spawn.args_size();
}

void TakeCommand(const v1::KeeperSpawn& spawn, v1::KeeperForkServer* server) {
  server->set_command_kind(spawn.command_kind());
  server->set_python(spawn.python());
  server->set_target(spawn.target());
  server->set_cwd(spawn.cwd());
  *server->mutable_args() = spawn.args();
}

void TakeEnvironment(const v1::KeeperSpawn& spawn, v1::KeeperForkServer* server) {
  server->clear_env();
  for (const auto& [key, value] : spawn.env()) {
    if (!IsRankVariable(key)) (*server->mutable_env())[key] = value;
  }
}

}  // namespace

bool IsPython(std::uint32_t command_kind) {
  return command_kind != kProgram;
}

bool IsRankVariable(const std::string& key) {
  if (key.starts_with("TORCHELASTIC_") || key.starts_with("EVERSTEP_")) return true;
  for (const char* name : kRankVariables) {
    if (key == name) return true;
  }
  return false;
}

std::vector<std::string> WorkerArgv(std::uint32_t command_kind, const std::string& python,
                                    const std::string& target,
                                    const std::vector<std::string>& args) {
  std::vector<std::string> out;
  switch (command_kind) {
    case kProgram: out = {target}; break;
    case kModule: out = {python, "-u", "-m", target}; break;
    case kRunPath: out = {python, "-u", "-c", kRunPathCode, target}; break;
    default: out = {python, "-u", target}; break;
  }
  out.insert(out.end(), args.begin(), args.end());
  return out;
}

ForkServers::Server* ForkServers::Find(const std::string& job) {
  const auto it = servers_.find(job);
  return it == servers_.end() ? nullptr : it->second.get();
}

void ForkServers::Configure(const v1::KeeperForkServer& request, const Done& done) {
  Server* server = Find(request.job());
  if (request.stop()) {
    Forget(request.job());
    done({});
    return;
  }
  if (server == nullptr) {
    if (servers_.size() >= kMaxServers) {
      done(Refusal(ENFILE,
                   fmt::format("the keeper of node {} runs {} fork servers, its limit; job {}'s "
                               "workers start as fresh processes",
                               context_->node, kMaxServers, request.job())));
      return;
    }
    server =
        servers_.emplace(request.job(), std::make_unique<Server>(context_)).first->second.get();
    server->spec.set_job(request.job());
  }
  done({});
  const bool same = server->phase != Phase::kIdle && server->phase != Phase::kFailed &&
                    (request.command_kind() == 0 ||
                     request.SerializeAsString() == server->spec.SerializeAsString());
  if (same) {
    Tell(*server);
    return;
  }
  Stop(server);
  server->spec = request;
  server->starts = 0;
  if (request.command_kind() == kProgram) {
    Fail(server, "the command is not Python (--no-python)");
  } else if (request.command_kind() != 0) {
    Start(server);
  }
}

void ForkServers::Start(Server* server) {
  const std::string job = server->spec.job();
  if (server->starts >= kMaxStarts) {
    Fail(server, fmt::format("started {} times, its limit; last: {}", kMaxStarts, server->message));
    return;
  }
  ++server->starts;
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    Fail(server, fmt::format("socketpair: {}", ErrnoText(errno)));
    return;
  }
  OwnedFd theirs(ends[1]);
  ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  server->control = std::make_unique<Connection>(OwnedFd(ends[0]), 0);
  OwnedFd status = server->status.Open(
      [this, job](const std::string& line, bool last) { OnLine(job, line, last); });

  LaunchSpec launch;
  // First a look whether this interpreter runs our sitecustomize at all: it then executes itself
  // again with the real command. One that does not would run the user's script here.
  launch.argv = {server->spec.python(), "-u", "-c", "import sys; sys.exit(97)"};
  std::string path = PythonFolder(context_->folder);
  const auto own = server->spec.env().find("PYTHONPATH");
  for (const auto& [key, value] : server->spec.env()) {
    if (key != "PYTHONPATH") launch.env.push_back(fmt::format("{}={}", key, value));
  }
  if (own != server->spec.env().end()) {
    launch.env.push_back("EVERSTEP_FORK_SERVER_PYTHONPATH=" + own->second);
    if (!own->second.empty()) path += ":" + own->second;
  }
  launch.env.push_back("PYTHONPATH=" + path);
  launch.env.push_back(
      fmt::format("EVERSTEP_FORK_SERVER=1:{}:{}:{}:-1", kControlFd, kStatusFd, ::getpid()));
  launch.cwd = server->spec.cwd();
  launch.stdout_path = launch.stderr_path = fmt::format("{}/fork-server.log", context_->folder);
  launch.keep = {{theirs.get(), kControlFd}, {status.get(), kStatusFd}};
  launch.status_fd = status.get();
  std::string error;
  const pid_t pid = Launch(launch, &error);
  if (pid < 0) {
    Fail(server, error);
    return;
  }
  server->pid = pid;
  server->phase = Phase::kStarting;
  server->store_ready = server->learnt = false;
  server->cpu_seen = 0;
  server->started_ns = MonotonicNanos();
  server->message = "importing";
  std::vector<std::string> argv =
      WorkerArgv(server->spec.command_kind(), server->spec.python(), server->spec.target(),
                 std::vector<std::string>(server->spec.args().begin(), server->spec.args().end()));
  std::vector<std::string> fields = {"command", std::to_string(server->spec.command_kind()),
                                     server->spec.target()};
  fields.insert(fields.end(), argv.begin(), argv.end());
  if (!Send(server, fields, {})) return;
  fields = {"preload"};
  for (const std::string& module : server->spec.modules()) fields.push_back(module);
  if (!Send(server, fields, {})) return;
  LogInfo("fork_server_started", {{"job", job}, {"pid", pid}, {"target", server->spec.target()}});
}

// A server reads when it can: between two imports, or one fork after the other.
bool ForkServers::Send(Server* server, const std::vector<std::string>& fields,
                       const std::vector<int>& descriptors) {
  server->control->SendRaw(Frame(fields), descriptors);
  if (server->control->broken) {
    Fail(server, "it does not read its requests");
    return false;
  }
  Watch(server);
  return true;
}

void ForkServers::Watch(Server* server) {
  Connection* control = server->control.get();
  if (!control->wants_write() || control->token != 0) return;
  const std::string job = server->spec.job();
  control->token = context_->loop.Add(control->fd(), EPOLLOUT, [this, job](std::uint32_t) {
    Server* again = Find(job);
    if (again == nullptr || again->control == nullptr) return;
    Connection* c = again->control.get();
    const bool gone = !c->Flush();  // its end will be told by its exit
    if (gone || !c->wants_write()) {
      context_->loop.Remove(std::exchange(c->token, 0));
    }
  });
}

ForkServers::Answer ForkServers::Fork(const v1::KeeperSpawn& spawn, int status_fd,
                                      std::string* reason) {
  Server* server = Find(spawn.job());
  if (!IsPython(spawn.command_kind())) {
    *reason = "the command is not Python";
    return Answer::kNever;
  }
  if (server == nullptr) {
    *reason = "the job has no fork server";
    return Answer::kNever;
  }
  const bool unknown = server->spec.command_kind() == 0;
  std::string differs;
  if (!unknown && !SameCommand(server->spec, spawn)) {
    differs = "its command is another";
  } else if (const std::string key = DifferingKey(server->spec, spawn); !unknown && !key.empty()) {
    differs = fmt::format("{} is another in its environment", key);
  }
  if (unknown || (!differs.empty() && server->phase != Phase::kFailed)) {
    Stop(server);
    TakeCommand(spawn, &server->spec);
    TakeEnvironment(spawn, &server->spec);
    LogInfo("fork_server_restarts",
            {{"job", spawn.job()}, {"why", unknown ? std::string("first workers") : differs}});
    Start(server);
  }
  switch (server->phase) {
    case Phase::kReady: break;
    case Phase::kFailed:
      *reason = "the fork server failed: " + server->message;
      return Answer::kNever;
    default: *reason = "the fork server still imports"; return Answer::kLater;
  }
  std::vector<std::string> fields = {"worker",
                                     spawn.cwd(),
                                     std::to_string(spawn.umask()),
                                     spawn.stdout_path(),
                                     spawn.stderr_path(),
                                     std::to_string(spawn.args_size())};
  for (const std::string& arg : spawn.args()) fields.push_back(arg);
  for (const auto& [key, value] : spawn.env()) fields.push_back(fmt::format("{}={}", key, value));
  if (!Send(server, fields, {status_fd})) {
    *reason = "the fork server failed: " + server->message;
    return Answer::kNever;
  }
  return Answer::kAsked;
}

ForkServers::Answer ForkServers::ForkStoreHost(const std::string& job, int listener,
                                               int status_fd) {
  Server* server = Find(job);
  if (server == nullptr || server->phase == Phase::kFailed || server->phase == Phase::kIdle) {
    return Answer::kNever;
  }
  if (!server->store_ready) return Answer::kLater;
  return Send(server, {"store"}, {status_fd, listener}) ? Answer::kAsked : Answer::kNever;
}

void ForkServers::Learn(const std::string& job, pid_t pid) {
  Server* server = Find(job);
  if (server == nullptr || server->phase != Phase::kReady || server->learnt) return;
  server->learnt = true;
  Send(server, {"learn", std::to_string(pid)}, {});
}

bool ForkServers::Advances(const std::string& job) {
  Server* server = Find(job);
  if (server == nullptr || server->phase != Phase::kStarting) return false;
  const auto stat = ReadProcessStat(server->pid);
  if (!stat) return false;
  return std::exchange(server->cpu_seen, stat->cpu_ticks) < stat->cpu_ticks;
}

void ForkServers::OnLine(const std::string& job, const std::string& line, bool last) {
  Server* server = Find(job);
  if (server == nullptr) return;
  if (line.starts_with("store")) {
    server->store_ready = true;
    if (on_change) on_change(job);
  } else if (line.starts_with("ready ")) {
    server->phase = Phase::kReady;
    server->store_ready = true;
    server->preload_ms = (MonotonicNanos() - server->started_ns) / 1'000'000;
    server->message = line.substr(6);
    LogInfo("fork_server_ready", {{"job", job},
                                  {"pid", server->pid},
                                  {"preload_ms", server->preload_ms},
                                  {"what", server->message}});
    Tell(*server);
    if (on_change) on_change(job);
  } else if (line.starts_with("learnt ")) {
    LogInfo("fork_server_learnt", {{"job", job}, {"modules", line.substr(7)}});
  } else if (line.starts_with("E") || line.starts_with("failed ")) {
    Fail(server, line.starts_with("E") ? line.substr(1) : line.substr(7));
  } else if (last && server->phase == Phase::kStarting) {
    server->message = "it ended while it started; see fork-server.log in the node's folder";
  }
}

bool ForkServers::Owns(pid_t pid) const {
  for (const auto& [job, server] : servers_) {
    if (server->pid == pid) return true;
  }
  return false;
}

bool ForkServers::OnExit(pid_t pid, const std::string& how) {
  for (auto& [job, server] : servers_) {
    if (server->pid != pid) continue;
    const bool was_ready = server->phase == Phase::kReady;
    server->pid = 0;
    if (server->phase == Phase::kFailed) return true;
    Stop(server.get());
    if (was_ready) {
      LogWarning("fork_server_lost", {{"job", job}, {"pid", pid}, {"how", how}});
      server->message = "it ended: " + how;
      Start(server.get());
      if (server->phase == Phase::kStarting) Tell(*server);
    } else {
      Fail(server.get(), how == "exit code 97"
                             ? "the interpreter does not import sitecustomize from PYTHONPATH"
                             : fmt::format("it ended while it started ({}); see {}/fork-server.log",
                                           how, context_->folder));
    }
    return true;
  }
  return false;
}

void ForkServers::Stop(Server* server) {
  if (server->pid > 0) ::kill(-server->pid, SIGKILL), ::kill(server->pid, SIGKILL);
  server->pid = 0;
  if (server->control != nullptr && server->control->token != 0) {
    context_->loop.Remove(server->control->token);
  }
  server->control.reset();
  server->status.Close();
  server->store_ready = false;
  server->phase = Phase::kIdle;
}

void ForkServers::Fail(Server* server, const std::string& why) {
  Stop(server);
  server->phase = Phase::kFailed;
  server->message = why;
  LogWarning("fork_server_failed", {{"job", server->spec.job()}, {"why", why}});
  Tell(*server);
  if (on_change) on_change(server->spec.job());
}

void ForkServers::Tell(const Server& server) {
  v1::KeeperState state;
  v1::KeeperReply reply;
  v1::KeeperForkServerState* s = reply.mutable_fork_server();
  s->set_job(server.spec.job());
  s->set_ready(server.phase == Phase::kReady);
  s->set_failed(server.phase == Phase::kFailed);
  s->set_message(server.message);
  s->set_pid(server.pid);
  s->set_preload_ms(server.preload_ms);
  context_->tell_owner(reply);
}

void ForkServers::Forget(const std::string& job) {
  const auto it = servers_.find(job);
  if (it == servers_.end()) return;
  Stop(it->second.get());
  servers_.erase(it);
}

void ForkServers::Describe(v1::KeeperState* state) const {
  for (const auto& [job, server] : servers_) {
    auto* s = state->add_fork_servers();
    s->set_job(job);
    s->set_ready(server->phase == Phase::kReady);
    s->set_failed(server->phase == Phase::kFailed);
    s->set_message(server->message);
    s->set_pid(server->pid);
    s->set_preload_ms(server->preload_ms);
  }
}

std::vector<pid_t> ForkServers::Pids() const {
  std::vector<pid_t> out;
  for (const auto& [job, server] : servers_) {
    if (server->pid > 0) out.push_back(server->pid);
  }
  return out;
}

std::optional<std::int64_t> ForkServers::NextDeadline() const {
  std::optional<std::int64_t> next;
  for (const auto& [job, server] : servers_) {
    if (server->phase != Phase::kStarting) continue;
    const std::int64_t at = server->started_ns + kStartLimitNs;
    if (!next || at < *next) next = at;
  }
  return next;
}

void ForkServers::Tick(std::int64_t now) {
  for (auto& [job, server] : servers_) {
    if (server->phase == Phase::kStarting && now >= server->started_ns + kStartLimitNs) {
      Fail(server.get(),
           fmt::format("its imports took more than {} s", kStartLimitNs / 1'000'000'000));
    }
  }
}

}  // namespace everstep::keeper
