// everstep-keeper --socket PATH --node NAME [--log FILE] [--orphan-timeout-ms N] [--lifeline FD]
//
// Two processes. The first is a guard that does nothing but wait for the second, the keeper proper:
// when that one dies, its workers die by their parent-death signal, what they had started becomes
// the guard's child, and the guard kills it. So nothing outlives a keeper.
#include <getopt.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <fmt/format.h>

#include "proto/base/errno_text.h"
#include "proto/base/log.h"
#include "worker/keeper/keeper.h"
#include "worker/keeper/process.h"

namespace everstep::keeper {
namespace {

constexpr const char kUsage[] =
    "usage: everstep-keeper --socket PATH --node NAME [options]\n"
    "Parents the workers of a node and holds its checkpoint memory. Started by everstep-agent.\n"
    "  --socket PATH           unix socket to serve, at most 107 bytes\n"
    "  --node NAME             name of this node, for texts\n"
    "  --log FILE              appended to; default: standard error\n"
    "  --orphan-timeout-ms N   end everything after N ms without an agent; 0 (default): never\n"
    "  --lifeline FD           a pipe; when its other end closes, everything ends\n"
    "  --ready-fd N            one line goes there: 'ready', or why not\n";

struct Flags {
  KeeperOptions keeper;
  std::string log;
  int ready_fd = -1;
};

// 0: go on; else the exit code plus one.
int ParseFlags(int argc, char** argv, Flags* flags) {
  enum { kSocket = 1, kNode, kLog, kOrphan, kLifeline, kReady, kHelp };
  const option options[] = {{"socket", required_argument, nullptr, kSocket},
                            {"node", required_argument, nullptr, kNode},
                            {"log", required_argument, nullptr, kLog},
                            {"orphan-timeout-ms", required_argument, nullptr, kOrphan},
                            {"lifeline", required_argument, nullptr, kLifeline},
                            {"ready-fd", required_argument, nullptr, kReady},
                            {"help", no_argument, nullptr, kHelp},
                            {nullptr, 0, nullptr, 0}};
  int c;
  // NOLINTNEXTLINE(concurrency-mt-unsafe): one thread
  while ((c = ::getopt_long(argc, argv, "h", options, nullptr)) != -1) {
    switch (c) {
      case kSocket: flags->keeper.socket_path = optarg; break;
      case kNode: flags->keeper.node = optarg; break;
      case kLog: flags->log = optarg; break;
      case kOrphan: flags->keeper.orphan_timeout_ms = std::strtoll(optarg, nullptr, 10); break;
      case kLifeline: flags->keeper.lifeline = std::atoi(optarg); break;
      case kReady: flags->ready_fd = std::atoi(optarg); break;
      case kHelp:
      case 'h': std::fputs(kUsage, stdout); return 1;
      default: std::fputs(kUsage, stderr); return 3;
    }
  }
  if (optind < argc || flags->keeper.socket_path.empty() || flags->keeper.node.empty()) {
    std::fprintf(stderr,
                 "error: everstep-keeper needs --socket and --node, and takes no arguments\n%s",
                 kUsage);
    return 3;
  }
  return 0;
}

void SayReady(int fd, const std::string& text) {
  if (fd < 0) return;
  const std::string line = text + "\n";
  [[maybe_unused]] const ssize_t n = ::write(fd, line.data(), line.size());
  ::close(fd);
}

int RunKeeper(const Flags& flags) {
  ::prctl(PR_SET_NAME, "everstep-keeper");
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  LogInit({.process = "keeper", .file = flags.log});
  Keeper keeper(flags.keeper);
  std::string error;
  if (!keeper.Begin(&error)) {
    if (flags.ready_fd < 0) std::fprintf(stderr, "error: %s\n", error.c_str());
    LogError("keeper_refused", {{"why", error}});
    SayReady(flags.ready_fd, error);
    return 1;
  }
  LogInfo("keeper_ready", {{"node", flags.keeper.node},
                           {"socket", flags.keeper.socket_path},
                           {"pid", static_cast<std::int32_t>(::getpid())}});
  SayReady(flags.ready_fd, "ready");
  return keeper.Run();
}

// Kills and reaps until nobody is left below.
void KillDescendants() {
  while (true) {
    for (const pid_t pid : ListChildren()) ::kill(pid, SIGKILL);
    const pid_t reaped = ::waitpid(-1, nullptr, 0);
    if (reaped < 0 && errno == ECHILD) return;
  }
}

int Guard(pid_t keeper) {
  ::prctl(PR_SET_NAME, "everstep-guard");
  // Signals meant for the keeper's folder of processes are the keeper's to answer.
  for (const int signal : {SIGINT, SIGHUP, SIGQUIT, SIGPIPE}) ::signal(signal, SIG_IGN);
  static volatile pid_t forward_to;
  forward_to = keeper;
  struct sigaction forward {};
  forward.sa_handler = [](int) { ::kill(forward_to, SIGTERM); };
  ::sigaction(SIGTERM, &forward, nullptr);
  int status = 0;
  while (true) {
    const pid_t pid = ::waitpid(-1, &status, 0);
    if (pid == keeper) break;
    if (pid < 0 && errno != EINTR) break;
  }
  KillDescendants();
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int Main(int argc, char** argv) {
  Flags flags;
  if (const int stop = ParseFlags(argc, argv, &flags); stop != 0) return stop - 1;
  if (::prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) {
    std::fprintf(stderr, "error: this kernel has no child subreapers: %s\n",
                 ErrnoText(errno).c_str());
    return 1;
  }
  const pid_t keeper = ::fork();
  if (keeper < 0) {
    std::fprintf(stderr, "error: cannot fork: %s\n", ErrnoText(errno).c_str());
    return 1;
  }
  if (keeper == 0) {
    ::setsid();  // killing the keeper's group leaves the guard
    return RunKeeper(flags);
  }
  if (flags.ready_fd >= 0) ::close(flags.ready_fd);
  return Guard(keeper);
}

}  // namespace
}  // namespace everstep::keeper

int main(int argc, char** argv) {
  return everstep::keeper::Main(argc, argv);
}
