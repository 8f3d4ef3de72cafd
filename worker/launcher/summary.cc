#include "worker/launcher/summary.h"

#include <algorithm>
#include <csignal>
#include <string_view>

#include <fmt/format.h>

#include "worker/launcher/error_file.h"
#include "worker/launcher/exit_codes.h"

namespace everstep::launcher {
namespace {

constexpr std::size_t kWidth = 60;  // at most, as torchrun

// A fixed table: strsignal speaks the user's language and is not thread-safe.
std::string_view SignalName(std::int32_t number) {
  switch (number) {
    case SIGHUP: return "SIGHUP";
    case SIGINT: return "SIGINT";
    case SIGQUIT: return "SIGQUIT";
    case SIGILL: return "SIGILL";
    case SIGTRAP: return "SIGTRAP";
    case SIGABRT: return "SIGABRT";
    case SIGBUS: return "SIGBUS";
    case SIGFPE: return "SIGFPE";
    case SIGKILL: return "SIGKILL";
    case SIGUSR1: return "SIGUSR1";
    case SIGSEGV: return "SIGSEGV";
    case SIGUSR2: return "SIGUSR2";
    case SIGPIPE: return "SIGPIPE";
    case SIGALRM: return "SIGALRM";
    case SIGTERM: return "SIGTERM";
    case SIGXCPU: return "SIGXCPU";
    case SIGXFSZ: return "SIGXFSZ";
    default: return "";
  }
}

// Lines after the first are indented below the first, as torchrun does it.
std::string Indented(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += c;
    if (c == '\n') out += "  ";
  }
  return out;
}

// torch/distributed/elastic/multiprocessing/errors: _FAILURE_FORMAT_TEMPLATE, its stray spaces
// included.
std::string FormatFailure(std::size_t index, const WorkerFailure& f) {
  std::string name;
  if (f.exit_code < 0 && !SignalName(-f.exit_code).empty()) {
    name = fmt::format(" ({})", SignalName(-f.exit_code));
  }
  return fmt::format(
      "[{}]:\n"
      "  time      : {}\n"
      "  host      : {}\n"
      "  rank      : {} (local_rank: {})\n"
      "  exitcode  : {} (pid: {}) {}\n"
      "  error_file: {}\n"
      "  traceback : {}",
      index, f.time.empty() ? "<N/A>" : f.time, f.node, f.rank, f.local_rank, f.exit_code, f.pid,
      name, f.error_file.empty() ? "<N/A>" : f.error_file, Indented(FailureMessage(f)));
}

// Characters of the longest line, not bytes: UTF-8 continues with 10xxxxxx.
std::size_t LongestLine(std::string_view text) {
  std::size_t longest = 0;
  std::size_t length = 0;
  for (const char c : text) {
    length = c == '\n' ? 0 : length + ((static_cast<unsigned char>(c) & 0xC0) != 0x80 ? 1 : 0);
    longest = std::max(longest, length);
  }
  return longest;
}

// _MSG_FORMAT_TEMPLATE of the same file. Failures are numbered by rank; the root cause keeps its
// number.
std::string FormatFailures(const RunOutcome& o) {
  std::vector<const WorkerFailure*> by_rank;
  for (const WorkerFailure& failure : o.failures) by_rank.push_back(&failure);
  std::stable_sort(by_rank.begin(), by_rank.end(),
                   [](const auto* a, const auto* b) { return a->rank < b->rank; });
  const std::string title = fmt::format("{} FAILED", o.script);
  std::size_t width = LongestLine(title);
  std::string root;
  std::string others;
  std::size_t listed = 0;
  for (std::size_t i = 0; i < by_rank.size(); ++i) {
    const bool is_root = by_rank[i] == &o.failures.front();
    if (!is_root && ++listed >= kMaxListed) continue;
    std::string text = FormatFailure(i, *by_rank[i]);
    width = std::max(width, LongestLine(text));
    if (is_root) {
      root = std::move(text);
    } else {
      others += (others.empty() ? "" : "\n") + text;
    }
  }
  if (listed >= kMaxListed) others += fmt::format("\n  and {} more", listed - kMaxListed + 1);
  if (others.empty()) others = "  <NO_OTHER_FAILURES>";
  width = std::min(width, kWidth);
  const std::string border(width, '=');
  const std::string section(width, '-');
  return fmt::format(
      "{}\n{}\n{}\nFailures:\n{}\n{}\nRoot Cause (first observed failure):\n{}\n{}\n", border,
      title, section, others, section, root, border);
}

std::string FormatFaults(const std::vector<FaultLine>& faults) {
  std::string text;
  const std::size_t first = faults.size() > kMaxListed ? faults.size() - kMaxListed : 0;
  if (first > 0) text += fmt::format("everstep:   {} earlier ones are not listed\n", first);
  for (std::size_t i = first; i < faults.size(); ++i) {
    const FaultLine& f = faults[i];
    text += fmt::format("everstep:   {}: {}", f.subject, f.reason);
    if (!f.action.empty()) text += fmt::format("; {}", f.action);
    text += f.recovery_seconds < 0 ? std::string("; not recovered")
                                   : fmt::format("; recovered in {:.2f} s", f.recovery_seconds);
    if (f.steps_lost >= 0) text += fmt::format(", {} steps lost", f.steps_lost);
    text += '\n';
  }
  return text;
}

}  // namespace

std::string_view ExitMeaning(std::int32_t exit_code) {
  switch (exit_code) {
    case kExitSucceeded: return "every worker exited 0";
    case kExitFailed: return "a worker failed and its restarts are spent, or the run was cancelled";
    case kExitUsage: return "the command line was refused";
    case kExitCapacity: return "too few nodes for too long";
    case kExitNoProgress: return "the run cannot make progress";
    default: return "an exit code that is not Everstep's";
  }
}

std::string_view ExitAdvice(std::int32_t exit_code) {
  switch (exit_code) {
    case kExitFailed: return "see the root cause, correct the script, run again";
    case kExitUsage: return "see `everstep-run --help`";
    case kExitCapacity: return "submit it again when machines are free; its saved state is kept";
    case kExitNoProgress: return "do not requeue it: look at the first worker's log";
    default: return "";
  }
}

std::string FailureMessage(const WorkerFailure& failure) {
  std::string text = TextOfErrorFile(failure.error_json);
  if (!text.empty()) return text;
  if (failure.exit_code < 0) {
    const std::string_view name = SignalName(-failure.exit_code);
    return fmt::format("Signal {} ({}) received by PID {}", -failure.exit_code,
                       name.empty() ? "<N/A>" : name, failure.pid);
  }
  return "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html";
}

std::string FormatSummary(const RunOutcome& o) {
  const bool succeeded = o.exit_code == kExitSucceeded;
  std::string text;
  if (!succeeded && !o.failures.empty()) text += FormatFailures(o);
  if (!o.faults.empty()) {
    std::int64_t steps = 0;
    bool known = false;
    for (const FaultLine& fault : o.faults) {
      known = known || fault.steps_lost >= 0;
      steps += std::max<std::int64_t>(fault.steps_lost, 0);
    }
    text +=
        fmt::format("everstep: {} fault{} in this run ({} restart{} charged to the script, {} not)",
                    o.faults.size(), o.faults.size() == 1 ? "" : "s", o.restarts,
                    o.restarts == 1 ? "" : "s", o.lost_capacity);
    text += fmt::format("; {:.2f} s lost", o.seconds_lost);
    if (known) text += fmt::format(", {} step{}", steps, steps == 1 ? "" : "s");
    text += '\n';
    text += FormatFaults(o.faults);
  }
  if (succeeded) return text;
  text += fmt::format("everstep: job {} {} ({})", o.job, o.state, o.reason);
  if (!o.message.empty()) text += fmt::format(": {}", o.message);
  text += fmt::format("\neverstep: {} of {} restarts used", o.restarts, o.max_restarts);
  if (o.best_step != kNoStep) text += fmt::format(", best step {}", o.best_step);
  if (!o.logs.empty()) text += fmt::format(", logs: {}", o.logs);
  if (o.state == "CANCELLED") {  // the code is torchrun's, and says less than what is known here
    return text + fmt::format("\neverstep: exit code {}: the run was cancelled\n", o.exit_code);
  }
  text += fmt::format("\neverstep: exit code {}: {}", o.exit_code, ExitMeaning(o.exit_code));
  if (!ExitAdvice(o.exit_code).empty()) text += fmt::format("; {}", ExitAdvice(o.exit_code));
  text += '\n';
  return text;
}

}  // namespace everstep::launcher
