#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"
#include "worker/keeper/client.h"

namespace everstep::keeper {
namespace {

std::string BesideThisProgram() {
  char path[PATH_MAX];
  const ssize_t n = ::readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (n <= 0) return "everstep-keeper";
  std::string folder(path, static_cast<std::size_t>(n));
  return folder.substr(0, folder.rfind('/') + 1) + "everstep-keeper";
}

// Between fork and exec of a process that may have threads: nothing but system calls.
[[noreturn]] void Become(const char* program, char* const* argv, int ready_fd, int null_fd,
                         int log_fd, int lifeline) {
  ::setsid();
  // A second fork: the keeper is nobody's child, so nobody has to reap it.
  const pid_t second = ::fork();
  if (second < 0) {
    const char text[] = "the system has no room for another process; raise its limit (ulimit -u)\n";
    [[maybe_unused]] const ssize_t n = ::write(ready_fd, text, sizeof(text) - 1);
  }
  if (second != 0) ::_exit(0);
  sigset_t none;
  sigemptyset(&none);
  ::pthread_sigmask(SIG_SETMASK, &none, nullptr);
  for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
  ::dup2(null_fd, 0);
  ::dup2(log_fd, 1);
  ::dup2(log_fd, 2);
  const int flags = ::fcntl(ready_fd, F_GETFD);
  ::fcntl(ready_fd, F_SETFD, flags & ~FD_CLOEXEC);
  if (lifeline >= 0) ::fcntl(lifeline, F_SETFD, ::fcntl(lifeline, F_GETFD) & ~FD_CLOEXEC);
  ::execv(program, argv);
  const char text[] = "cannot execute everstep-keeper; is it installed beside the agent?\n";
  [[maybe_unused]] const ssize_t n = ::write(ready_fd, text, sizeof(text) - 1);
  ::_exit(127);
}

}  // namespace

bool StartKeeper(const StartOptions& options, std::string* error) {
  const std::string program = options.program.empty() ? BesideThisProgram() : options.program;
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    *error = fmt::format("cannot start a keeper: {}", ErrnoText(errno));
    return false;
  }
  OwnedFd ready(ends[0]);
  OwnedFd theirs(ends[1]);
  OwnedFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  OwnedFd log(options.log_file.empty() ? ::fcntl(2, F_DUPFD_CLOEXEC, 3)
                                       : ::open(options.log_file.c_str(),
                                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!log) {
    *error = fmt::format(
        "cannot open the keeper's log {}: {}; is the state directory full or read-only?",
        options.log_file, ErrnoText(errno));
    return false;
  }
  std::vector<std::string> words = {
      program,      "--socket",   options.socket_path,         "--node",
      options.node, "--ready-fd", std::to_string(theirs.get())};
  if (!options.log_file.empty()) words.insert(words.end(), {"--log", options.log_file});
  if (options.orphan_timeout.count() > 0) {
    words.insert(words.end(),
                 {"--orphan-timeout-ms", std::to_string(ToMilliseconds(options.orphan_timeout))});
  }
  if (options.lifeline >= 0)
    words.insert(words.end(), {"--lifeline", std::to_string(options.lifeline)});
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0)
    Become(program.c_str(), argv.data(), theirs.get(), nothing.get(), log.get(), options.lifeline);
  if (child < 0) {
    *error = fmt::format("cannot fork a keeper: {}", ErrnoText(errno));
    return false;
  }
  theirs.Close();
  while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  std::string text;
  const std::int64_t deadline = MonotonicNanos() + options.timeout.count();
  while (text.find('\n') == std::string::npos) {
    const std::int64_t left = (deadline - MonotonicNanos()) / 1'000'000;
    pollfd p{ready.get(), POLLIN, 0};
    char piece[512];
    if (left <= 0) break;
    const int some = ::poll(&p, 1, static_cast<int>(left));
    const ssize_t n = some > 0 ? ::read(ready.get(), piece, sizeof(piece)) : some;
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(piece, static_cast<std::size_t>(n));
  }
  text.erase(std::min(text.find('\n'), text.size()));
  if (text == "ready") return true;
  *error = text.empty()
               ? fmt::format("the keeper of node {} did not answer within {} ms; see {}",
                             options.node, ToMilliseconds(options.timeout), options.log_file)
               : fmt::format("the keeper of node {} did not start: {}", options.node, text);
  return false;
}

}  // namespace everstep::keeper
