#include "worker/launcher/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include <fmt/format.h>

#include "proto/base/errno_text.h"
#include "proto/base/process_stat.h"

namespace everstep::launcher {
namespace {

struct Sockets {
  int read = -1;
  int write = -1;
};

// The child's part: async-signal-safe calls only, since other threads may hold any lock.
[[noreturn]] void BecomeProgram(const ProcessSpec& spec, char* const* argv, char* const* envp,
                                pid_t parent, int report) {
  const auto fail = [report] {
    const int error = errno;
    [[maybe_unused]] const ssize_t n = ::write(report, &error, sizeof(error));
    ::_exit(127);
  };
  ::setsid();
  if (!spec.survives_launcher) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);  // it ended before the line above
  }
  for (int signal = 1; signal < 32; ++signal) {
    if (signal != SIGKILL && signal != SIGSTOP) ::signal(signal, SIG_DFL);
  }
  sigset_t none;
  ::sigemptyset(&none);
  ::pthread_sigmask(SIG_SETMASK, &none, nullptr);
  const int nothing = ::open("/dev/null", O_RDONLY);
  const int output = ::open(spec.output.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (nothing < 0 || output < 0 || ::dup2(nothing, 0) < 0 || ::dup2(output, 1) < 0 ||
      ::dup2(output, 2) < 0) {
    fail();
  }
  if (nothing > 2) ::close(nothing);
  if (output > 2) ::close(output);
  if (spec.inherited >= 0) {
    const int flags = ::fcntl(spec.inherited, F_GETFD);
    ::fcntl(spec.inherited, F_SETFD, flags & ~FD_CLOEXEC);
  }
  ::execve(argv[0], argv, envp);
  fail();
  ::_exit(127);
}

}  // namespace

std::string StatusText(int status) {
  if (WIFSIGNALED(status)) {
    const char* name = ::sigabbrev_np(WTERMSIG(status));
    return fmt::format("was ended by signal {} (SIG{})", WTERMSIG(status), name ? name : "?");
  }
  return fmt::format("exited with code {}", WEXITSTATUS(status));
}

Process::~Process() {
  if (running()) {
    Signal(SIGKILL);
    Wait(std::chrono::seconds(10));
  }
  if (pidfd_ >= 0) ::close(pidfd_);
}

Process::Process(Process&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)), pidfd_(std::exchange(other.pidfd_, -1)) {}

Process& Process::operator=(Process&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(pidfd_, other.pidfd_);
  return *this;
}

std::string Process::Start(const ProcessSpec& spec) {
  std::vector<char*> argv;
  for (const std::string& arg : spec.argv) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  std::vector<std::string> entries;
  entries.reserve(spec.environment.size());
  for (const auto& [key, value] : spec.environment) {
    entries.push_back(fmt::format("{}={}", key, value));
  }
  std::vector<char*> envp;
  envp.reserve(entries.size() + 1);
  for (const std::string& entry : entries) envp.push_back(const_cast<char*>(entry.c_str()));
  envp.push_back(nullptr);

  Sockets report;
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return fmt::format("no pipe: {}", ErrnoText(errno));
  report = {ends[0], ends[1]};
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) BecomeProgram(spec, argv.data(), envp.data(), parent, report.write);
  const int fork_error = errno;
  ::close(report.write);
  if (pid < 0) {
    ::close(report.read);
    return fmt::format("cannot start {}: {}", spec.argv[0], ErrnoText(fork_error));
  }
  int error = 0;
  ssize_t count = 0;
  do {
    count = ::read(report.read, &error, sizeof(error));  // ends when exec closes the other end
  } while (count < 0 && errno == EINTR);
  ::close(report.read);
  if (count == sizeof(error)) {
    ::waitpid(pid, nullptr, 0);
    return fmt::format("cannot start {}: {}", spec.argv[0], ErrnoText(error));
  }
  if (pidfd_ >= 0) ::close(pidfd_);
  pid_ = pid;
  pidfd_ = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  return {};
}

void Process::Signal(int signal) {
  if (running()) ::kill(pid_, signal);  // not reaped yet, so the number is still ours
}

bool Process::stopped() const {
  if (!running()) return false;
  const auto stat = ReadProcessStat(pid_);
  return stat && stat->state == 'T';
}

std::optional<int> Process::Reap() {
  int status = 0;
  if (!running() || ::waitpid(pid_, &status, WNOHANG) != pid_) return std::nullopt;
  pid_ = -1;
  if (pidfd_ >= 0) ::close(std::exchange(pidfd_, -1));
  return status;
}

std::optional<int> Process::Wait(std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (running()) {
    if (auto status = Reap()) return status;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return std::nullopt;
    pollfd end{pidfd_, POLLIN, 0};
    ::poll(&end, pidfd_ >= 0 ? 1 : 0, static_cast<int>(std::min<std::int64_t>(left.count(), 100)));
  }
  return std::nullopt;
}

bool SignalByPidFile(const std::string& file, const std::string& program, int signal) {
  std::ifstream in(file);
  pid_t pid = 0;
  if (!(in >> pid) || pid <= 1) return false;
  const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  if (pidfd < 0) return false;
  // The pidfd holds the process, so what /proc says now is said of the one that will be signalled.
  std::ifstream comm(fmt::format("/proc/{}/comm", pid));
  std::string name;
  std::getline(comm, name);
  const bool same = name == program.substr(0, 15);
  const bool sent = same && ::syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0) == 0;
  ::close(pidfd);
  return sent;
}

std::string LastLines(const std::string& path, std::size_t lines) {
  constexpr std::streamoff kMost = 4096;
  std::ifstream in(path, std::ios::binary);
  in.seekg(0, std::ios::end);
  const std::streamoff size = in.tellg();
  if (!in || size <= 0) return {};
  in.seekg(std::max<std::streamoff>(0, size - kMost));
  std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  while (!text.empty() && text.back() == '\n') text.pop_back();
  std::size_t at = text.size();
  for (std::size_t i = 0; i < lines && at != std::string::npos && at > 0; ++i) {
    at = text.rfind('\n', at - 1);
  }
  return at == std::string::npos || at == 0 ? text : text.substr(at + 1);
}

}  // namespace everstep::launcher
