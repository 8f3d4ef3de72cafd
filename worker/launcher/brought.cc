#include "worker/launcher/brought.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "proto/base/check.h"
#include "proto/base/errno_text.h"
#include "proto/base/whole_file.h"

namespace everstep::launcher {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kAddressPoll{5};
constexpr milliseconds kRestartStep{200};
constexpr milliseconds kRestartMost{5'000};
constexpr int kControllerCannotBind = 3;          // everstep-controller's exit code
constexpr std::size_t kControllerArguments = 10;  // of argv, those that stay for a restart
constexpr milliseconds kKeeperEndLimit{5'000};
constexpr milliseconds kAgentSlack{5'000};

// Of everstep-controller's exit codes (docs/reference/exit-codes.md).
std::string MeaningOf(int code) {
  switch (code) {
    case kControllerCannotBind: return "its address cannot be bound";
    case 4: return "another controller holds its state directory";
    case 5:
      return "its state directory is missing, read-only or full; free it or name another with "
             "--state-dir";
    case 6: return "its store is damaged, or of a newer version";
    default: return {};
  }
}

std::string ReadWord(const std::string& path) {
  std::ifstream in(path);
  std::string word;
  in >> word;
  return word;
}

}  // namespace

Brought::Brought(BroughtOptions options) : options_(std::move(options)) {
  // What configures the launcher must not configure what it brings; only flags do.
  for (const auto& [key, value] : options_.environment) {
    if (key.rfind("EVERSTEP_", 0) != 0) environment_.emplace(key, value);
  }
  controller_.name = "everstep-controller";
  controller_.log = options_.state->controller() + "/controller.out";
  agent_.name = "everstep-agent";
  agent_.log = options_.state->node_dir() + "/agent.out";
}

Brought::~Brought() {
  StopNode(How::kAtOnce);
  StopController(How::kAtOnce);
  for (const int end : {lifeline_read_, lifeline_write_}) {
    if (end >= 0) ::close(end);
  }
}

std::string Brought::Trouble(const Program& program, const std::string& what) const {
  std::string text = fmt::format("{} {}", program.name, what);
  const std::string last = LastLines(program.log, 5);
  if (!last.empty()) {
    text += fmt::format(": {}", last);
  } else if (&program == &controller_ && !controller_meaning_.empty()) {
    text += fmt::format(": {}", controller_meaning_);  // a full disk takes no last words
  }
  return options_.state->temporary() ? text : text + fmt::format(" (log: {})", program.log);
}

std::string Brought::Launch(Program* program) {
  ProcessSpec spec;
  spec.argv = program->argv;
  spec.environment = environment_;
  spec.output = program->log;
  spec.inherited = program == &agent_ ? lifeline_read_ : -1;
  program->started = steady_clock::now();
  program->wanted = true;
  return program->process.Start(spec);
}

std::string Brought::StartController(const Start& start) {
  const std::string& dir = options_.state->controller();
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  std::filesystem::remove(dir + "/address", error);
  controller_.argv = {options_.programs + "/everstep-controller",
                      "--listen",
                      start.listen,
                      "--state-dir",
                      dir,
                      "--address-file",
                      dir + "/address",
                      "--log-file",
                      dir + "/controller.log",
                      "--allow-shutdown"};
  EVERSTEP_CHECK(controller_.argv.size() == kControllerArguments);
  if (!start.snapshot.empty()) {
    controller_.argv.insert(controller_.argv.end(), {"--from-snapshot", start.snapshot});
  }
  if (!start.known_dead.empty()) {
    controller_.argv.insert(controller_.argv.end(), {"--known-dead", start.known_dead});
  }
  address_taken_ = false;
  std::string wrong = Launch(&controller_);
  if (wrong.empty()) wrong = WaitForAddress();
  if (!wrong.empty()) {
    StopController(How::kAtOnce);
    return wrong;
  }
  // Where it stands now it stands again after a restart, so agents and launchers find it. What it
  // knows by then is in its own store.
  controller_.argv[2] = controller_address_;
  controller_.argv.resize(kControllerArguments);
  return {};
}

std::string Brought::WaitForAddress() {
  const auto deadline = steady_clock::now() + kControllerStartLimit;
  while (steady_clock::now() < deadline) {
    controller_address_ = ReadWord(options_.state->controller() + "/address");
    if (!controller_address_.empty()) return {};
    if (const auto status = controller_.process.Wait(kAddressPoll)) {
      const int code = WIFEXITED(*status) ? WEXITSTATUS(*status) : 0;
      address_taken_ = code == kControllerCannotBind;
      controller_meaning_ = MeaningOf(code);
      return Trouble(controller_, StatusText(*status) + " before it served");
    }
  }
  return Trouble(controller_,
                 fmt::format("did not serve within {} s", kControllerStartLimit.count()));
}

std::string Brought::SetControllers(const std::string& controllers) {
  const std::string file = options_.state->node_dir() + "/controller";
  const int wrong = WriteWhole(file, controllers + "\n");
  return wrong == 0 ? std::string() : CannotWrite(file, wrong);
}

std::string Brought::StartAgent(const std::string& controllers,
                                const std::map<std::string, std::string>& labels) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return fmt::format("no pipe: {}", ErrnoText(errno));
  lifeline_read_ = ends[0];
  lifeline_write_ = ends[1];
  if (std::string wrong = SetControllers(controllers); !wrong.empty()) return wrong;
  agent_.argv = {options_.programs + "/everstep-agent",
                 "--node",
                 options_.state->node(),
                 "--state-dir",
                 options_.state->path(),
                 "--address",
                 options_.address,
                 "--leave-timeout",
                 fmt::format("{}", options_.leave_timeout.count() / 1000.0),
                 "--stop-grace",
                 fmt::format("{}", options_.stop_grace.count() / 1000.0),
                 "--lifeline",
                 std::to_string(lifeline_read_)};
  for (const auto& [key, value] : labels) {
    agent_.argv.insert(agent_.argv.end(), {"--label", fmt::format("{}={}", key, value)});
  }
  if (!options_.local_command.empty()) {
    agent_.argv.insert(agent_.argv.end(), {"--local-command", options_.local_command});
  }
  return Launch(&agent_);
}

void Brought::AddTo(std::vector<pollfd>* polled) const {
  for (const Program* program : {&controller_, &agent_}) {
    if (program->process.running()) polled->push_back({program->process.pidfd(), POLLIN, 0});
  }
}

std::string Brought::Tend() {
  std::string wrong = Mind(&controller_);
  return wrong.empty() ? Mind(&agent_) : wrong;
}

std::string Brought::Mind(Program* program) {
  if (!program->wanted) return {};
  const auto now = steady_clock::now();
  if (program->process.running()) {
    const auto status = program->process.Reap();
    if (!status) {
      MindStopped(program, now);
      return {};
    }
    program->stopped_since.reset();
    const bool short_life = now - program->started < kShortLife;
    program->short_lives = short_life ? program->short_lives + 1 : 0;
    // Workers need no controller to go on, so there is always another try. Without an agent nothing
    // ends well.
    if (program == &agent_ && program->short_lives >= kMaxShortLives) {
      program->wanted = false;
      return Trouble(
          *program, fmt::format("{} {} times in a row", StatusText(*status), program->short_lives));
    }
    if (program->short_lives < kMaxShortLives) {
      options_.say(fmt::format("{} {}; starting it again, the workers run on", program->name,
                               StatusText(*status)));
    } else if (program->short_lives == kMaxShortLives) {
      options_.say(Trouble(*program, fmt::format("{} {} times in a row", StatusText(*status),
                                                 program->short_lives)) +
                   "; trying on in silence, the workers run on");
    }
    program->again =
        now + std::min<milliseconds>(program->short_lives * kRestartStep, kRestartMost);
  }
  if (now < program->again) return {};
  return Launch(program);
}

// One that is stopped holds its locks and its place and does nothing with them.
void Brought::MindStopped(Program* program, steady_clock::time_point now) {
  if (now < program->look_again) return;
  program->look_again = now + kStoppedLook;
  if (!program->process.stopped()) {
    program->stopped_since.reset();
    return;
  }
  if (!program->stopped_since) program->stopped_since = now;
  if (now - *program->stopped_since < kStoppedLimit) return;
  options_.say(fmt::format("{} is stopped (SIGSTOP); replacing it", program->name));
  program->stopped_since.reset();
  program->process.Signal(SIGKILL);
}

void Brought::EndKeeper() {
  const std::string file = options_.state->node_dir() + "/keeper.pid";
  const auto deadline = steady_clock::now() + kKeeperEndLimit;
  while (SignalByPidFile(file, "everstep-keeper", SIGKILL) && steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(5));
  }
}

bool Brought::StopNode(How how) {
  agent_.wanted = false;
  bool in_order = true;
  if (agent_.process.running() && how != How::kAtOnce) {
    agent_.process.Signal(SIGTERM);
    agent_.process.Signal(SIGCONT);
    in_order =
        agent_.process
            .Wait(how == How::kIdle ? kAgentSlack
                                    : options_.leave_timeout + options_.stop_grace + kAgentSlack)
            .has_value();
  }
  if (agent_.process.running()) {
    agent_.process.Signal(SIGKILL);
    agent_.process.Wait(milliseconds(5'000));
  }
  // The keeper hears of the end by the lifeline; the pid file is for one that does not listen.
  if (lifeline_write_ >= 0) ::close(std::exchange(lifeline_write_, -1));
  EndKeeper();
  return in_order;
}

bool Brought::StopController(How how) {
  controller_.wanted = false;
  bool in_order = true;
  if (controller_.process.running() && how != How::kAtOnce) {
    controller_.process.Signal(SIGTERM);
    controller_.process.Signal(SIGCONT);
    in_order = controller_.process.Wait(kControllerStopLimit).has_value();
  }
  if (controller_.process.running()) {
    controller_.process.Signal(SIGKILL);
    controller_.process.Wait(milliseconds(5'000));
  }
  return in_order;
}

}  // namespace everstep::launcher
