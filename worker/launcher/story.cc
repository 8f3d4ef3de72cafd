#include "worker/launcher/story.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <string_view>

#include <fmt/format.h>

namespace everstep::launcher {
namespace {

std::string Count(std::uint64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

// Of "1 of at least 2 nodes"; 0 when there is none.
std::uint32_t LeadingNumber(const std::string& text) {
  std::uint32_t number = 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

WorkerFailure FailureOf(const v1::RootCause& cause) {
  WorkerFailure failure;
  failure.rank = cause.rank();
  failure.local_rank = cause.local_rank();
  failure.node = cause.node();
  failure.pid = cause.pid();
  failure.exit_code = cause.exit_code();
  failure.time = LocalTime(cause.time());
  failure.error_file = cause.error_file();
  failure.error_json = cause.error_json();
  return failure;
}

}  // namespace

std::vector<std::string> Story::News(const v1::JobStatus& status) {
  std::vector<std::string> lines;
  for (const v1::FaultStatus& fault : status.faults()) {
    const auto [told, fresh] = faults_.try_emplace(fault.id());
    if (fresh) {
      std::string line = fmt::format("{}: {}", fault.subject(), fault.reason());
      if (!fault.evidence().empty()) line += fmt::format(" ({})", fault.evidence());
      if (!fault.action().empty()) line += fmt::format("; {}", fault.action());
      lines.push_back(std::move(line));
    }
    if (fault.recovery_seconds() < 0 || told->second.recovered) continue;
    told->second.recovered = true;
    std::string line = fmt::format("{}: recovered in {:.2f} s, generation {}", fault.subject(),
                                   fault.recovery_seconds(), fault.generation_after());
    if (fault.step_after() >= 0) line += fmt::format(", from step {}", fault.step_after());
    lines.push_back(std::move(line));
  }
  std::string waiting;
  // With enough nodes it is but the moment in which more may come.
  if (status.state() == "WAITING" && LeadingNumber(status.message()) < status.min_nodes()) {
    waiting = status.message().empty()
                  ? fmt::format("waiting for nodes: {} of {}", status.nodes(), status.min_nodes())
                  : fmt::format("waiting for nodes: {}", status.message());
  }
  // The first moments of every run are a wait; only one that follows a fault, or says more, is
  // news.
  if (waiting != waiting_ && !waiting.empty() && (status.generation() > 0 || !waiting_.empty())) {
    lines.push_back(waiting);
  }
  waiting_ = waiting;
  return lines;
}

std::string LiveLine(const v1::JobStatus& status) {
  std::string line = fmt::format("everstep: {} {}  {} on {}  generation {}", status.job(),
                                 status.state(), Count(status.world_size(), "worker"),
                                 Count(status.nodes(), "node"), status.generation());
  if (status.step() >= 0) {
    line += fmt::format("  step {}", status.step());
    if (status.committed_step() >= 0) line += fmt::format(" ({} safe)", status.committed_step());
  }
  if (status.spares() > 0) line += fmt::format("  {}", Count(status.spares(), "spare"));
  if (status.faults_size() > 0) {
    line += fmt::format("  {}, {:.2f} s lost",
                        Count(static_cast<std::uint64_t>(status.faults_size()), "fault"),
                        status.seconds_lost());
  }
  return line;
}

RunOutcome OutcomeOf(const v1::JobStatus& status, const std::string& script,
                     const std::string& logs) {
  RunOutcome outcome;
  outcome.job = status.job();
  outcome.script = script;
  outcome.state = status.state();
  outcome.reason = status.reason();
  outcome.message = status.message();
  outcome.exit_code = status.exit_code();
  outcome.restarts = status.restarts();
  outcome.max_restarts = status.max_restarts();
  outcome.lost_capacity = status.lost_capacity();
  outcome.best_step = status.step();
  outcome.seconds_lost = status.seconds_lost();
  outcome.logs = logs;
  if (status.has_root_cause()) {
    outcome.failures.push_back(FailureOf(status.root_cause()));
    for (const v1::RootCause& other : status.root_cause().others()) {
      outcome.failures.push_back(FailureOf(other));
    }
  }
  for (const v1::FaultStatus& fault : status.faults()) {
    outcome.faults.push_back({fault.reason(), fault.subject(), fault.action(),
                              fault.recovery_seconds(), fault.steps_lost()});
  }
  return outcome;
}

std::string ShownLines(const LaunchFlags& flags, std::uint32_t nproc_per_node,
                       const v1::JobLogLines& lines) {
  const std::int32_t local = lines.rank() % static_cast<std::int32_t>(nproc_per_node);
  const auto& filter = flags.local_ranks_filter;
  if (!filter.empty() && std::find(filter.begin(), filter.end(), local) == filter.end()) return {};
  const std::uint8_t bit = lines.from_stderr() ? kStreamErr : kStreamOut;
  if ((flags.tee.For(local) & bit) == 0) {
    return (flags.redirects.For(local) & bit) != 0 ? std::string() : lines.data();
  }
  // Local ranks would name several workers at once here.
  std::string text;
  std::string_view rest = lines.data();
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find('\n'), rest.size() - 1);
    text += fmt::format("[{}{}]:{}", flags.role, lines.rank(), rest.substr(0, end + 1));
    rest.remove_prefix(end + 1);
  }
  return text;
}

std::string LocalTime(const std::string& rfc3339) {
  std::tm utc{};
  if (std::sscanf(rfc3339.c_str(), "%4d-%2d-%2dT%2d:%2d:%2d", &utc.tm_year, &utc.tm_mon,
                  &utc.tm_mday, &utc.tm_hour, &utc.tm_min, &utc.tm_sec) != 6) {
    return rfc3339;
  }
  utc.tm_year -= 1900;
  utc.tm_mon -= 1;
  const std::time_t seconds = ::timegm(&utc);
  std::tm local{};
  std::array<char, 32> text{};
  if (::localtime_r(&seconds, &local) == nullptr ||
      std::strftime(text.data(), text.size(), "%Y-%m-%d_%H:%M:%S", &local) == 0) {
    return rfc3339;
  }
  return text.data();
}

}  // namespace everstep::launcher
