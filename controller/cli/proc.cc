#include "controller/cli/proc.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <thread>

#include <fmt/format.h>

#include "proto/base/process_stat.h"

namespace everstep::cli {
namespace {

constexpr std::size_t kMaxProcFile = 4 << 20;

std::string ReadProc(pid_t pid, const char* name) {
  const std::string path = fmt::format("/proc/{}/{}", pid, name);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return "";
  std::string out;
  char buffer[16384];
  for (;;) {
    const ssize_t n = ::read(fd, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0 || out.size() > kMaxProcFile) break;
    out.append(buffer, static_cast<std::size_t>(n));
  }
  ::close(fd);
  return out;
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(separator, at), text.size());
    out.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

// `path` is `directory` or lies below it.
bool Within(const std::string& path, const std::string& directory) {
  return path.compare(0, directory.size(), directory) == 0 &&
         (path.size() == directory.size() || path[directory.size()] == '/');
}

bool EnvironmentMarks(const std::string& environment, const std::string& directory) {
  for (const std::string& name : {std::string(kStateVariable), std::string("EVERSTEP_KEEPER")}) {
    const std::string mark = name + "=";
    for (std::size_t at = 0; (at = environment.find(mark, at)) != std::string::npos; ++at) {
      if (at > 0 && environment[at - 1] != '\0') continue;
      const std::size_t from = at + mark.size();
      const std::size_t end = std::min(environment.find('\0', from), environment.size());
      if (Within(environment.substr(from, end - from), directory)) return true;
    }
  }
  return false;
}

bool OurProgram(const std::string& program) {
  return program == "everstep" || program.rfind("everstep-", 0) == 0;
}

}  // namespace

ProcessId Identify(pid_t pid) {
  const auto stat = ReadProcessStat(pid);
  if (!stat) return {};
  return {pid, stat->start_time};
}

bool Alive(const ProcessId& id) {
  const auto stat = ReadProcessStat(id.pid);
  return stat && stat->start_time == id.start_time && !stat->dead();
}

std::vector<ProcessFacts> ProcessesOf(const std::string& directory, bool own_children) {
  std::map<pid_t, ProcessFacts> all;
  std::error_code unreadable;
  std::filesystem::directory_iterator entry("/proc", unreadable);
  for (; !unreadable && entry != std::filesystem::directory_iterator();
       entry.increment(unreadable)) {
    const pid_t pid = static_cast<pid_t>(std::atol(entry->path().filename().c_str()));
    if (pid <= 1 || pid == ::getpid()) continue;
    const auto stat = ReadProcessStat(pid);
    if (!stat || stat->dead()) continue;
    ProcessFacts facts;
    facts.id = {pid, stat->start_time};
    facts.parent = stat->parent;
    facts.state = stat->state;
    facts.name = stat->name;
    char target[4096];
    const std::string link = fmt::format("/proc/{}/exe", pid);
    const ssize_t n = ::readlink(link.c_str(), target, sizeof(target));
    if (n > 0) {
      facts.program.assign(target, static_cast<std::size_t>(n));
      if (const auto cut = facts.program.find(" (deleted)"); cut != std::string::npos) {
        facts.program.resize(cut);
      }
      facts.program.erase(0, facts.program.rfind('/') + 1);
    }
    all.emplace(pid, std::move(facts));
  }

  std::set<pid_t> found;
  for (auto& [pid, facts] : all) {
    facts.marked = EnvironmentMarks(ReadProc(pid, "environ"), directory);
    bool named = false;
    if (OurProgram(facts.program)) {
      facts.arguments = Split(ReadProc(pid, "cmdline"), '\0');
      // `everstep` itself counts as a supervisor only: a shell's `everstep logs` is nobody's part.
      const bool part = facts.program != "everstep" ||
                        std::find(facts.arguments.begin(), facts.arguments.end(), "supervise") !=
                            facts.arguments.end();
      for (const std::string& argument : facts.arguments) {
        const std::size_t equals = argument.find('=');
        named = named ||
                (part &&
                 (Within(argument, directory) ||
                  (equals != std::string::npos && Within(argument.substr(equals + 1), directory))));
      }
    }
    if (named || facts.marked) found.insert(pid);
  }
  for (bool grew = true; grew;) {
    grew = false;
    for (const auto& [pid, facts] : all) {
      const bool child =
          found.count(facts.parent) > 0 || (own_children && facts.parent == ::getpid());
      if (child && found.count(pid) == 0) {
        found.insert(pid);
        grew = true;
      }
    }
  }
  std::vector<ProcessFacts> out;
  out.reserve(found.size());
  for (const pid_t pid : found) out.push_back(std::move(all.at(pid)));
  return out;
}

bool SendSignal(const ProcessId& id, int signal) {
  if (id.pid <= 1) return false;
  const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, id.pid, 0));
  if (pidfd < 0) return false;
  const bool same = Identify(id.pid).start_time == id.start_time;
  const bool sent = same && ::syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0) == 0;
  ::close(pidfd);
  return sent;
}

bool WaitGone(const std::vector<ProcessId>& ids, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (const ProcessId& id : ids) {
    while (Alive(id)) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          deadline - std::chrono::steady_clock::now());
      if (left.count() <= 0) return false;
      const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, id.pid, 0));
      if (pidfd < 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        continue;
      }
      pollfd end{pidfd, POLLIN, 0};
      ::poll(&end, 1, static_cast<int>(std::min<std::int64_t>(left.count(), 100)));
      ::close(pidfd);
    }
  }
  return true;
}

std::string OwnFolder() {
  char target[4096];
  const ssize_t n = ::readlink("/proc/self/exe", target, sizeof(target));
  if (n <= 0) return "";
  std::string path(target, static_cast<std::size_t>(n));
  return path.substr(0, path.rfind('/'));
}

}  // namespace everstep::cli
