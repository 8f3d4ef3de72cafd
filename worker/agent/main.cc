// everstep-agent: the command line, the node's directory, signals; everything else is the engine's.
#include <fmt/format.h>
#include <malloc.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <thread>

#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "worker/agent/engine.h"
#include "worker/agent/node_dir.h"
#include "worker/agent/options.h"

namespace everstep::agent {
namespace {

sigset_t HandledSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int s : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaddset(&set, s);
  return set;
}

// Signals and the lifeline, until `stop` is rung.
void Watch(int signals, int lifeline, int stop, Engine* engine) {
  while (true) {
    pollfd fds[] = {{stop, POLLIN, 0}, {signals, POLLIN, 0}, {lifeline, POLLIN, 0}};
    if (poll(fds, lifeline >= 0 ? 3 : 2, -1) < 0 && errno != EINTR) return;
    if (fds[0].revents != 0) return;
    if (fds[1].revents != 0) {
      signalfd_siginfo info = {};
      if (read(signals, &info, sizeof info) != static_cast<ssize_t>(sizeof info)) continue;
      if (info.ssi_signo == SIGUSR1) {
        engine->Quit();
      } else {
        engine->Leave(fmt::format("{} from pid {}",
                                  info.ssi_signo == SIGTERM  ? "sigterm"
                                  : info.ssi_signo == SIGINT ? "sigint"
                                                             : "sighup",
                                  info.ssi_pid));
      }
    }
    if (lifeline >= 0 && fds[2].revents != 0) {
      char byte = 0;
      const ssize_t n = read(lifeline, &byte, 1);
      if (n > 0 || (n < 0 && (errno == EINTR || errno == EAGAIN))) continue;
      engine->LifelineCut();
      lifeline = -1;
    }
  }
}

int Main(int argc, char** argv) {
  AgentOptions options;
  switch (ParseOptions(argc, argv, &options)) {
    case ParseOutcome::kExitOk: return 0;
    case ParseOutcome::kExitUsage: return 2;
    case ParseOutcome::kRun: break;
  }
  // Before any thread: a process of many threads otherwise keeps one heap for each.
  mallopt(M_ARENA_MAX, 2);  // NOLINT(concurrency-mt-unsafe)
  const sigset_t handled = HandledSignals();
  pthread_sigmask(SIG_BLOCK, &handled, nullptr);
  signal(SIGPIPE, SIG_IGN);
  NodeDirLock lock;
  std::string error;
  if (!lock.Take(options.node_dir, &error)) {
    fmt::print(stderr, "everstep-agent: {}\n", error);
    return 1;
  }
  LogInit(options.log);
  RealClock clock;
  const int signals = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
  const int stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (signals < 0 || stop < 0) {
    fmt::print(stderr, "everstep-agent: no descriptors are left; raise the limit (ulimit -n)\n");
    return 1;
  }
  int exit_code = 0;
  {
    TransferFactory transfer;
#ifdef EVERSTEP_TRANSFER
    transfer = checkpoint::TransferService::Start;
#endif
    Engine engine(std::move(options), &clock, std::move(transfer));
    std::thread watch(
        [&, lifeline = engine.options().lifeline] { Watch(signals, lifeline, stop, &engine); });
    exit_code = engine.Run();
    eventfd_write(stop, 1);
    watch.join();
  }
  close(signals);
  close(stop);
  return exit_code;
}

}  // namespace
}  // namespace everstep::agent

int main(int argc, char** argv) {
  return everstep::agent::Main(argc, argv);
}
