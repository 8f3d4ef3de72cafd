#include "worker/keeper/process.h"
#include "proto/base/errno_text.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>

#include <fmt/format.h>

namespace everstep::keeper {
namespace {

// What /proc and /sys hold: short, or cut at 1 MiB.
std::optional<std::string> ReadFile(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string out;
  char buffer[4096];
  ssize_t n;
  while (out.size() < (1u << 20) && (n = ::read(fd, buffer, sizeof(buffer))) > 0) {
    out.append(buffer, static_cast<std::size_t>(n));
  }
  ::close(fd);
  return out;
}

std::optional<std::int64_t> NumberAfter(const std::string& text, std::string_view key) {
  std::size_t at = 0;
  while (at < text.size()) {
    if (std::string_view(text).substr(at).starts_with(key)) {
      const char* p = text.data() + at + key.size();
      const char* end = text.data() + text.size();
      while (p != end && (*p == ' ' || *p == '\t')) ++p;
      std::int64_t value = 0;
      if (std::from_chars(p, end, value).ec == std::errc()) return value;
    }
    at = text.find('\n', at);
    if (at == std::string::npos) break;
    ++at;
  }
  return std::nullopt;
}

// Our control group's folder (version 2), or empty.
const std::string& ControlGroup() {
  static const std::string folder = [] {
    const auto text = ReadFile("/proc/self/cgroup");
    if (!text) return std::string();
    const auto at = text->find("0::");
    if (at == std::string::npos) return std::string();
    std::string path = text->substr(at + 3);
    path.erase(std::min(path.find('\n'), path.size()));
    return "/sys/fs/cgroup" + (path == "/" ? std::string() : path);
  }();
  return folder;
}

[[noreturn]] void Give(int status_fd, const std::string& text) {
  const std::string line = "E" + text;
  if (status_fd >= 0) {
    [[maybe_unused]] const ssize_t n = ::write(status_fd, line.data(), line.size());
  }
  ::_exit(127);
}

void MakeFolders(const std::string& file) {
  for (std::size_t at = file.find('/', 1); at != std::string::npos; at = file.find('/', at + 1)) {
    ::mkdir(file.substr(0, at).c_str(), 0777);
  }
}

int OpenLog(const std::string& path, int status_fd) {
  if (path.empty()) return ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0 && errno == ENOENT) {
    MakeFolders(path);
    fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  }
  if (fd < 0) {
    Give(status_fd, fmt::format("cannot open the worker's log {}: {}; choose another --log-dir or "
                                "make room there",
                                path, ErrnoText(errno)));
  }
  return fd;
}

// Moves fd out of the numbers that will be given away.
int Lift(int fd) {
  return ::fcntl(fd, F_DUPFD_CLOEXEC, 64);
}

std::string_view EnvironmentValue(const std::vector<std::string>& env, std::string_view key) {
  for (const std::string& entry : env) {
    if (entry.size() > key.size() && entry.starts_with(key) && entry[key.size()] == '=') {
      return std::string_view(entry).substr(key.size() + 1);
    }
  }
  return {};
}

void Execute(const LaunchSpec& spec, char* const* argv, char* const* envp) {
  const std::string& program = spec.argv[0];
  if (program.find('/') != std::string::npos) {
    ::execve(program.c_str(), argv, envp);
    return;
  }
  std::string_view path = EnvironmentValue(spec.env, "PATH");
  if (path.empty()) path = "/usr/local/bin:/usr/bin:/bin";
  int error = ENOENT;
  while (true) {
    const auto colon = path.find(':');
    std::string candidate(path.substr(0, colon));
    if (candidate.empty()) candidate = ".";
    candidate += "/" + program;
    ::execve(candidate.c_str(), argv, envp);
    if (errno != ENOENT && errno != ENOTDIR) error = errno;
    if (colon == std::string_view::npos) break;
    path.remove_prefix(colon + 1);
  }
  errno = error;
}

[[noreturn]] void RunChild(const LaunchSpec& spec, pid_t keeper, char* const* argv,
                           char* const* envp) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != keeper) ::_exit(127);
  ::setsid();
  for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  ::pthread_sigmask(SIG_SETMASK, &none, nullptr);

  const int status = spec.status_fd >= 0 ? Lift(spec.status_fd) : -1;
  std::vector<std::pair<int, int>> keep;
  for (const auto& [from, to] : spec.keep) keep.emplace_back(Lift(from), to);
  if (!spec.cwd.empty() && ::chdir(spec.cwd.c_str()) != 0) {
    Give(status, fmt::format("cannot enter the job's folder {}: {}; it must exist on every node",
                             spec.cwd, ErrnoText(errno)));
  }
  // Logs are made with the keeper's own mask: the job's may deny reading to the agent.
  const int input = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  const int out = OpenLog(spec.stdout_path, status);
  const int err = spec.stderr_path == spec.stdout_path ? out : OpenLog(spec.stderr_path, status);
  if (spec.umask) ::umask(*spec.umask);
  const int numbers[3] = {Lift(input), Lift(out), Lift(err)};
  for (int i = 0; i < 3; ++i) ::dup2(numbers[i], i);
  ::close_range(3, std::numeric_limits<unsigned>::max(), CLOSE_RANGE_CLOEXEC);
  for (const auto& [from, to] : keep) ::dup2(from, to);  // dup2 clears close-on-exec
  Execute(spec, argv, envp);
  Give(status, fmt::format("cannot execute {}: {}; is it installed on this node and executable?",
                           spec.argv[0], ErrnoText(errno)));
}

}  // namespace

pid_t Launch(const LaunchSpec& spec, std::string* error) {
  std::vector<char*> argv;
  std::vector<char*> envp;
  for (const std::string& a : spec.argv) argv.push_back(const_cast<char*>(a.c_str()));
  for (const std::string& e : spec.env) envp.push_back(const_cast<char*>(e.c_str()));
  argv.push_back(nullptr);
  envp.push_back(nullptr);
  const pid_t keeper = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) RunChild(spec, keeper, argv.data(), envp.data());
  if (pid < 0) {
    *error =
        fmt::format("cannot fork {}: {}; raise the limit of processes (ulimit -u) or free memory",
                    spec.argv[0], ErrnoText(errno));
  }
  return pid;
}

std::optional<std::string> ReadProcEnvironment(pid_t pid, const std::string& key) {
  const auto text = ReadFile(fmt::format("/proc/{}/environ", pid));
  if (!text) return std::nullopt;
  std::string_view rest = *text;
  while (!rest.empty()) {
    const auto end = rest.find('\0');
    const std::string_view entry = rest.substr(0, end);
    if (entry.size() > key.size() && entry.starts_with(key) && entry[key.size()] == '=') {
      return std::string(entry.substr(key.size() + 1));
    }
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
  return std::nullopt;
}

std::vector<pid_t> ListChildren() {
  std::vector<pid_t> out;
  const auto text = ReadFile(fmt::format("/proc/self/task/{}/children", ::getpid()));
  if (!text) return out;
  const char* p = text->data();
  const char* end = p + text->size();
  while (p != end) {
    pid_t pid = 0;
    const auto [next, problem] = std::from_chars(p, end, pid);
    if (problem != std::errc()) {
      ++p;
      continue;
    }
    out.push_back(pid);
    p = next;
  }
  return out;
}

std::int64_t MemoryKills() {
  if (!ControlGroup().empty()) {
    const auto events = ReadFile(ControlGroup() + "/memory.events");
    if (events) {
      if (const auto kills = NumberAfter(*events, "oom_kill ")) return *kills;
    }
  }
  const auto machine = ReadFile("/proc/vmstat");
  return machine ? NumberAfter(*machine, "oom_kill ").value_or(0) : 0;
}

std::optional<TcpConnections> CountConnections(pid_t pid, std::uint16_t port) {
  std::set<unsigned long> sockets;
  const std::string folder = fmt::format("/proc/{}/fd", pid);
  DIR* dir = ::opendir(folder.c_str());
  if (dir == nullptr) return std::nullopt;
  // NOLINTNEXTLINE(concurrency-mt-unsafe): a stream of this function's own
  while (const dirent* entry = ::readdir(dir)) {
    char target[64];
    const ssize_t n = ::readlinkat(::dirfd(dir), entry->d_name, target, sizeof(target) - 1);
    if (n <= 0) continue;
    target[n] = '\0';
    unsigned long inode;
    if (std::sscanf(target, "socket:[%lu]", &inode) == 1) sockets.insert(inode);
  }
  ::closedir(dir);
  TcpConnections count;
  for (const char* table : {"tcp", "tcp6"}) {
    std::FILE* file = std::fopen(fmt::format("/proc/{}/net/{}", pid, table).c_str(), "re");
    if (file == nullptr) continue;
    char line[512];
    while (std::fgets(line, sizeof(line), file) != nullptr) {
      unsigned local = 0, remote = 0, state = 0;
      unsigned long inode = 0;
      if (std::sscanf(line, "%*d: %*[0-9A-Fa-f]:%x %*[0-9A-Fa-f]:%x %x %*s %*s %*s %*s %*s %lu",
                      &local, &remote, &state, &inode) != 4) {
        continue;
      }
      if (state != 1 || sockets.count(inode) == 0) continue;
      if (remote == port) {
        ++count.to_port;
      } else if (local != port) {
        ++count.others;
      }
    }
    std::fclose(file);
  }
  return count;
}

}  // namespace everstep::keeper
