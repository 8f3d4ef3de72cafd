#include "controller/cli/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/clock.h"
#include "proto/base/errno_text.h"

namespace everstep::cli {
namespace fs = std::filesystem;
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr const char* kAnyHttp = "127.0.0.1:0";
constexpr milliseconds kTick{50};  // while something is awaited
constexpr milliseconds kIdleTick{1'000};
constexpr milliseconds kShortLife{2'000};  // an end sooner than this slows the next start
constexpr milliseconds kLongestPause{5'000};
constexpr milliseconds kKeeperLook{50};  // a killed node's keeper has died by then
constexpr int kStartTries = 3;           // of the first start, before it is given up
constexpr milliseconds kControllerGrace{2'000};
constexpr milliseconds kNodeGrace{5'000};
constexpr milliseconds kSweepLimit{10'000};

void Log(const std::string& line) {
  const std::string text = fmt::format("{} {}\n", FormatTimestamp(RealClock().Now()), line);
  [[maybe_unused]] const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
}

std::string HowItEnded(int status) {
  if (WIFSIGNALED(status)) {
    const char* name = ::sigabbrev_np(WTERMSIG(status));
    return fmt::format("was ended by signal {} (SIG{})", WTERMSIG(status), name ? name : "?");
  }
  return fmt::format("exited with code {}", WEXITSTATUS(status));
}

// For exec: a pointer to each, then a null pointer.
std::vector<char*> Pointers(std::vector<std::string>* words) {
  std::vector<char*> out;
  out.reserve(words->size() + 1);
  for (std::string& word : *words) out.push_back(word.data());
  out.push_back(nullptr);
  return out;
}

struct Part {
  std::string name;  // "controller" or the node's
  bool node = false;
  std::string dir;
  std::vector<std::string> argv;
  pid_t pid = -1;
  int short_lives = 0;
  bool look_for_keeper = false;  // it just died: is the whole node dead?
  bool said_held = false;
  steady_clock::time_point started;
  steady_clock::time_point next = steady_clock::time_point::max();  // to be started at
};

class Supervisor {
 public:
  Supervisor(std::string state_dir, ClusterPlan plan, Environment environment)
      : state_dir_(std::move(state_dir)), plan_(std::move(plan)) {
    for (const char* name : {"EVERSTEP_CONTROLLER", "EVERSTEP_CLUSTER", "EVERSTEP_KEEPER"}) {
      environment.erase(name);
    }
    environment[kStateVariable] = state_dir_;
    for (const auto& [name, value] : environment)
      environment_.push_back(fmt::format("{}={}", name, value));
  }

  int Run() {
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
    sigset_t handled;
    ::sigemptyset(&handled);
    for (const int signal : {SIGCHLD, SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&handled, signal);
    ::pthread_sigmask(SIG_BLOCK, &handled, nullptr);
    signals_ = ::signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
    const ProcessId self = Identify(::getpid());
    if (Outcome written = WriteSmallFile(state_dir_ + "/supervisor.pid",
                                         fmt::format("{} {}\n", self.pid, self.start_time));
        !written.ok()) {
      return GiveUp(written.error().message);
    }
    if (std::string wrong = Prepare(); !wrong.empty()) return GiveUp(wrong);
    Log(fmt::format("cluster {}: a controller and {} nodes", plan_.name, plan_.nodes.size()));
    parts_[0].next = steady_clock::now();
    while (!ending_) {
      for (Part& part : parts_) Mind(&part);
      if (!failure_.empty()) return GiveUp(failure_);
      Wait();
    }
    Log("ending the cluster");
    End();
    return 0;
  }

 private:
  std::string Prepare() {
    const auto controller_dir = state_dir_ + "/controller";
    parts_.push_back({.name = "controller", .dir = controller_dir});
    for (const std::string& node : plan_.nodes) {
      parts_.push_back({.name = node, .node = true, .dir = state_dir_ + "/nodes/" + node});
    }
    for (Part& part : parts_) {
      std::error_code error;
      fs::create_directories(part.dir, error);
      if (error) return fmt::format("cannot make {}: {}", part.dir, error.message());
      const std::string program =
          plan_.programs + (part.node ? "/everstep-agent" : "/everstep-controller");
      if (::access(program.c_str(), X_OK) != 0) {
        return fmt::format("cannot start {}: {}", program, ErrnoText(errno));
      }
      part.argv = {program, "--state-dir", part.node ? state_dir_ : part.dir};
      if (part.node) {
        // The log file is the default one; naming it marks the process as this node's (proc.h).
        part.argv.insert(part.argv.end(), {"--node", part.name, "--address", "127.0.0.1",
                                           "--log-file", part.dir + "/agent.log"});
        if (plan_.slots > 0) {
          part.argv.insert(part.argv.end(), {"--slots", std::to_string(plan_.slots)});
        }
      } else {
        part.argv.insert(part.argv.end(),
                         {"--cluster", plan_.name, "--address-file", part.dir + "/address",
                          "--log-file", part.dir + "/controller.log"});
      }
    }
    return "";
  }

  // The last words of a part that did not come up.
  std::string Trouble(const Part& part, const std::string& what) const {
    std::string text = fmt::format("{} {}", part.argv[0].substr(part.argv[0].rfind('/') + 1), what);
    std::string last;
    for (const char* file : {"/controller.out", "/agent.out", "/controller.log", "/agent.log"}) {
      if (last.empty()) last = LastLines(part.dir + file, 3);
    }
    // Each try left its line; equal ones are said once.
    std::istringstream lines(last);
    std::string before;
    for (std::string line; std::getline(lines, line); before = line) {
      if (line != before) text += (before.empty() ? ": " : "; ") + line;
    }
    return text;
  }

  void Start(Part* part) {
    part->next = steady_clock::time_point::max();
    part->started = steady_clock::now();
    std::vector<std::string> words = part->argv;
    if (!part->node) words.insert(words.end(), {"--listen", listen_, "--http", http_});
    const std::vector<char*> argv = Pointers(&words);
    const std::vector<char*> envp = Pointers(&environment_);
    const std::string output = part->dir + (part->node ? "/agent.out" : "/controller.out");
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::setsid();
      sigset_t none;
      ::sigemptyset(&none);
      ::pthread_sigmask(SIG_SETMASK, &none, nullptr);
      const int nothing = ::open("/dev/null", O_RDONLY);
      const int file = ::open(output.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
      if (nothing >= 0) ::dup2(nothing, 0);
      if (file >= 0) {
        ::dup2(file, 1);
        ::dup2(file, 2);
        if (file > 2) ::close(file);
      }
      if (nothing > 2) ::close(nothing);
      ::execve(argv[0], argv.data(), envp.data());
      ::dprintf(2, "cannot start %s: %s\n", argv[0], ErrnoText(errno).c_str());
      ::_exit(127);
    }
    if (pid < 0) {
      Log(fmt::format("cannot start {}: {}", part->name, ErrnoText(errno)));
      part->next = steady_clock::now() + kLongestPause;
      return;
    }
    part->pid = pid;
    Log(fmt::format("{} started, pid {}", part->name, pid));
  }

  void Mind(Part* part) {
    const auto now = steady_clock::now();
    if (!part->node) ReadAddress();
    if (part->pid > 0 || now < part->next) return;
    if (part->look_for_keeper) {
      part->look_for_keeper = false;
      if (Ready() && !KeeperLives(*part)) {
        part->next = now + kNodeReturn;
        const bool held = ReadHold(part->dir).has_value();
        Log(fmt::format(
            "{}: the whole node is dead, it comes back {}", part->name,
            held ? "when it is not held down" : fmt::format("in {} ms", kNodeReturn.count())));
        if (!held) return;
      }
    }
    if (const std::optional<Hold> hold = ReadHold(part->dir)) {
      if (!part->said_held) Log(fmt::format("{} is held down", part->name));
      part->said_held = true;
      part->next = now + kTick;
      return;
    }
    RemoveHold(part->dir);
    part->said_held = false;
    Start(part);
  }

  bool Ready() const { return ::access((state_dir_ + "/ready").c_str(), F_OK) == 0; }

  static bool KeeperLives(const Part& part) {
    const std::vector<ProcessFacts> found = ProcessesOf(part.dir);
    return std::any_of(found.begin(), found.end(), [](const ProcessFacts& process) {
      return process.program == "everstep-keeper";
    });
  }

  // The nodes start when the controller has said where it is, and are told when that changes.
  void ReadAddress() {
    std::istringstream in(ReadSmallFile(parts_[0].dir + "/address"));
    std::string address;
    in >> address;
    if (address.empty() || address == address_) return;
    const bool first = address_.empty();
    address_ = address;
    Log(fmt::format("the controller listens on {}", address));
    // It comes back where it was: clients and agents know that place.
    listen_ = address;
    for (Part& part : parts_) {
      if (!part.node) continue;
      if (Outcome written = WriteSmallFile(part.dir + "/controller", address + "\n");
          !written.ok()) {
        Log(written.error().message);
      }
      if (first) part.next = steady_clock::now();
    }
  }

  void Died(Part* part, int status) {
    part->pid = -1;
    const auto now = steady_clock::now();
    part->short_lives = now - part->started < kShortLife ? part->short_lives + 1 : 0;
    const std::string how = HowItEnded(status);
    Log(fmt::format("{} {}", part->name, how));
    if (part->short_lives >= kStartTries && !Ready()) {
      failure_ = Trouble(*part, how);
      return;
    }
    if (!part->node) {
      std::istringstream http(ReadSmallFile(part->dir + "/http.address"));
      if (std::string there; http >> there) http_ = there;
      if (part->short_lives >= 2 * kStartTries) {  // somebody took its place
        listen_ = plan_.listen;
        http_ = kAnyHttp;
      }
    }
    milliseconds pause = part->short_lives == 0 ? milliseconds(0) : milliseconds(50);
    for (int n = 1; n < part->short_lives && pause < kLongestPause; ++n) pause *= 2;
    pause = std::min(pause, kLongestPause);
    part->look_for_keeper = part->node;
    part->next = now + (part->node ? std::max(pause, kKeeperLook) : pause);
  }

  void Reap() {
    int status = 0;
    for (pid_t pid = 0; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
      for (Part& part : parts_) {
        if (part.pid == pid) Died(&part, status);
      }
    }
  }

  void Wait() {
    auto limit = steady_clock::now() + (address_.empty() ? milliseconds(5) : kIdleTick);
    if (steady_clock::now() - parts_[0].started < kShortLife) {
      limit = std::min(limit, steady_clock::now() + kTick);  // its address may change
    }
    for (const Part& part : parts_) limit = std::min(limit, part.next);
    const auto left = std::chrono::duration_cast<milliseconds>(limit - steady_clock::now()).count();
    pollfd polled{signals_, POLLIN, 0};
    ::poll(&polled, 1, static_cast<int>(std::clamp<std::int64_t>(left + 1, 0, 1'000)));
    signalfd_siginfo info;
    while (::read(signals_, &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) ending_ = true;
      if (info.ssi_signo == SIGHUP) StartWaiting();
    }
    Reap();
  }

  // What waits for its time starts now, unless it is held down.
  void StartWaiting() {
    for (Part& part : parts_) {
      if (part.pid > 0 || part.next == steady_clock::time_point::max()) continue;
      part.next = steady_clock::now();
      part.look_for_keeper = false;
    }
  }

  int GiveUp(const std::string& why) {
    Log("error: " + why);
    (void)WriteSmallFile(state_dir_ + "/failure", why + "\n");
    End();
    return 1;
  }

  // Waits for these to end, reaping what is ours; false at the limit.
  bool Await(const std::vector<ProcessId>& processes, milliseconds limit) {
    const auto deadline = steady_clock::now() + limit;
    for (;;) {
      Reap();
      if (std::none_of(processes.begin(), processes.end(), Alive)) return true;
      if (steady_clock::now() >= deadline) return false;
      pollfd polled{signals_, POLLIN, 0};
      ::poll(&polled, 1, 10);
      signalfd_siginfo info;
      while (::read(signals_, &info, sizeof(info)) == sizeof(info)) {
      }
    }
  }

  void Ask(const std::vector<Part*>& parts, milliseconds limit) {
    std::vector<ProcessId> asked;
    for (Part* part : parts) {
      if (part->pid <= 0) continue;
      asked.push_back(Identify(part->pid));
      ::kill(part->pid, SIGTERM);
      ::kill(part->pid, SIGCONT);  // a paused one shall hear it
    }
    Await(asked, limit);
  }

  // The controller first, so that it does not move jobs between nodes that end; then the nodes, in
  // order; then whatever is left.
  void End() {
    std::vector<Part*> nodes;
    for (Part& part : parts_) {
      if (part.node) nodes.push_back(&part);
    }
    if (!parts_.empty()) Ask({&parts_[0]}, kControllerGrace);
    Ask(nodes, kNodeGrace);
    const auto deadline = steady_clock::now() + kSweepLimit;
    for (;;) {
      std::vector<ProcessId> left;
      for (const ProcessFacts& process : ProcessesOf(state_dir_, /*own_children=*/true)) {
        left.push_back(process.id);
      }
      if (left.empty() || steady_clock::now() >= deadline) break;
      for (const ProcessId& id : left) SendSignal(id, SIGKILL);
      Await(left, milliseconds(1'000));
    }
  }

  const std::string state_dir_;
  const ClusterPlan plan_;
  std::vector<std::string> environment_;
  std::vector<Part> parts_;  // the controller first
  std::string address_;      // the controller's, as it said last; empty: not yet
  std::string listen_ = plan_.listen;
  std::string http_ = kAnyHttp;
  std::string failure_;
  int signals_ = -1;
  bool ending_ = false;
};

}  // namespace

int Supervise(const std::string& state_dir, const Environment& environment) {
  const Result<ClusterPlan> plan = ReadPlan(state_dir);
  if (!plan.ok()) {
    Log(plan.error().message);
    return 1;
  }
  return Supervisor(state_dir, plan.value(), environment).Run();
}

Outcome StartSupervisor(const std::string& programs, const std::string& state_dir) {
  const std::string own = programs + "/everstep";
  const std::string log = state_dir + "/supervisor.log";
  std::vector<std::string> words{own, "cluster", "supervise", state_dir};
  const std::vector<char*> argv = Pointers(&words);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    return CliError{ExitCode::kFailed, "FAILED", fmt::format("no pipe: {}", ErrnoText(errno)), ""};
  }
  const pid_t middle = ::fork();
  if (middle == 0) {
    ::setsid();
    const pid_t second = ::fork();
    if (second < 0) {
      const int error = errno;
      [[maybe_unused]] const ssize_t n = ::write(ends[1], &error, sizeof(error));
    }
    if (second != 0) ::_exit(0);
    const int nothing = ::open("/dev/null", O_RDONLY);
    const int file = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
    int error = errno;
    if (nothing >= 0 && file >= 0 && ::chdir("/") == 0) {
      ::dup2(nothing, 0);
      ::dup2(file, 1);
      ::dup2(file, 2);
      ::signal(SIGHUP, SIG_IGN);
      ::close_range(3, static_cast<unsigned>(ends[1]) - 1, 0);
      ::close_range(static_cast<unsigned>(ends[1]) + 1, ~0U, 0);
      ::execv(argv[0], argv.data());
      error = errno;
    }
    [[maybe_unused]] const ssize_t n = ::write(ends[1], &error, sizeof(error));
    ::_exit(127);
  }
  ::close(ends[1]);
  int error = middle < 0 ? errno : 0;
  if (middle > 0) {
    int failed = 0;
    if (::read(ends[0], &failed, sizeof(failed)) == sizeof(failed)) error = failed;
    ::waitpid(middle, nullptr, 0);
  }
  ::close(ends[0]);
  if (error == 0) return Done{};
  return CliError{ExitCode::kFailed, "FAILED",
                  fmt::format("cannot start {}: {}", own, ErrnoText(error)), ""};
}

Outcome WriteHold(const std::string& part_dir, const Hold& hold) {
  return WriteSmallFile(part_dir + "/hold",
                        hold.ever ? "ever\n" : fmt::format("{}\n", hold.until_ms));
}

void RemoveHold(const std::string& part_dir) {
  ::unlink((part_dir + "/hold").c_str());
}

std::optional<Hold> ReadHold(const std::string& part_dir) {
  const std::string text = ReadSmallFile(part_dir + "/hold");
  if (text.rfind("ever", 0) == 0) return Hold{.ever = true};
  const std::int64_t until = std::strtoll(text.c_str(), nullptr, 10);
  if (until <= WallMilliseconds()) return std::nullopt;
  return Hold{.until_ms = until};
}

std::int64_t WallMilliseconds() {
  return std::chrono::duration_cast<milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace everstep::cli
