#include "worker/launcher/machine.h"

#include <sched.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <system_error>
#include <vector>

#include <fmt/format.h>

#include "proto/base/clock.h"

namespace everstep::launcher {
namespace {

std::string Value(const Environment& environment, const char* key) {
  const auto found = environment.find(key);
  return found == environment.end() ? std::string() : found->second;
}

bool IsProgram(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error) && ::access(path.c_str(), X_OK) == 0;
}

// First program `name` of PATH; empty: none.
std::string InPath(const Environment& environment, const std::string& name) {
  std::string_view path = "/usr/local/bin:/usr/bin:/bin";
  const auto found = environment.find("PATH");
  if (found != environment.end()) path = found->second;
  while (true) {
    const std::size_t end = path.find(':');
    const std::string_view folder = path.substr(0, end);
    std::string candidate = fmt::format("{}/{}", folder.empty() ? "." : folder, name);
    if (IsProgram(candidate)) return candidate;
    if (end == std::string_view::npos) return {};
    path.remove_prefix(end + 1);
  }
}

std::string Absolute(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal().string();
}

std::uint32_t NvidiaDevices() {
  std::uint32_t count = 0;
  std::error_code error;
  std::filesystem::directory_iterator entries("/dev", error);
  for (; !error && entries != std::filesystem::directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().string();
    constexpr std::string_view kPrefix = "nvidia";
    if (name.size() > kPrefix.size() && name.rfind(kPrefix, 0) == 0 &&
        name.find_first_not_of("0123456789", kPrefix.size()) == std::string::npos) {
      ++count;
    }
  }
  return count;
}

}  // namespace

std::uint32_t VisibleDevices(std::string_view value, std::uint32_t present) {
  std::uint32_t count = 0;
  while (!value.empty()) {
    const std::size_t end = std::min(value.find(','), value.size());
    const std::string_view entry = value.substr(0, end);
    value.remove_prefix(std::min(end + 1, value.size()));
    std::int64_t number = 0;
    const char* last = entry.data() + entry.size();
    const std::from_chars_result read = std::from_chars(entry.data(), last, number);
    const bool numeric = read.ec == std::errc() && read.ptr == last;
    const bool named = entry.rfind("GPU-", 0) == 0 || entry.rfind("MIG-", 0) == 0;
    if (numeric ? (number < 0 || number >= static_cast<std::int64_t>(present)) : !named) break;
    ++count;
  }
  return count;
}

MachineFacts ProbeMachine(const Environment& environment) {
  MachineFacts facts;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) {
    facts.cpus = static_cast<std::uint32_t>(std::max(1, CPU_COUNT(&set)));
  } else {
    facts.cpus = static_cast<std::uint32_t>(std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN)));
  }
  facts.gpus = NvidiaDevices();
  const auto visible = environment.find("CUDA_VISIBLE_DEVICES");
  if (visible != environment.end()) facts.gpus = VisibleDevices(visible->second, facts.gpus);
  return facts;
}

std::string FindPython(const Environment& environment, const std::string& command,
                       std::string* error) {
  const std::string named = Value(environment, "PYTHON_EXEC");
  if (!named.empty()) {
    const std::string path =
        named.find('/') == std::string::npos ? InPath(environment, named) : named;
    if (!path.empty() && IsProgram(path)) return Absolute(path);
    *error = fmt::format("everstep-run: PYTHON_EXEC={} is no program; correct or unset it", named);
    return {};
  }
  std::vector<std::string> candidates;
  const std::string environment_root = Value(environment, "VIRTUAL_ENV");
  if (!environment_root.empty()) candidates.push_back(environment_root + "/bin/python");
  const std::size_t slash = command.rfind('/');
  if (slash != std::string::npos) candidates.push_back(command.substr(0, slash) + "/python3");
  for (const std::string& candidate : candidates) {
    if (IsProgram(candidate)) return Absolute(candidate);
  }
  const std::string found = InPath(environment, "python3");
  if (!found.empty()) return Absolute(found);
  *error = fmt::format(
      "everstep-run: no Python interpreter: PYTHON_EXEC and VIRTUAL_ENV are unset or empty, none "
      "beside {}, no python3 in PATH; activate an environment or set PYTHON_EXEC",
      command);
  return {};
}

std::string GatherFacts(const LaunchFlags& flags, const Environment& environment,
                        const std::string& command, SubmitterFacts* facts) {
  facts->environment = environment;
  std::error_code error;
  facts->cwd = std::filesystem::current_path(error).string();
  if (error) return "everstep-run: the working directory is gone; change to one that exists";
  if (flags.script_kind != ScriptKind::kProgram) {
    std::string wrong;
    facts->python = FindPython(environment, command, &wrong);
    if (facts->python.empty()) return wrong;
  }
  const Resolved workers = ResolveWorkers(flags.workers, ProbeMachine(environment));
  if (!workers.error.empty()) return workers.error;
  facts->workers = workers.workers;
  facts->umask = ::umask(022);
  ::umask(static_cast<mode_t>(facts->umask));
  facts->terminal = ::isatty(STDOUT_FILENO) != 0;
  facts->random = RandomHex(6);
  facts->now_ns = RealClock().Now().ns;
  return {};
}

Environment OwnEnvironment() {
  Environment environment;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::size_t equals = text.find('=');
    if (equals == std::string_view::npos || equals == 0) continue;
    environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

std::string CommandPath(const std::string& argv0, const Environment& environment) {
  if (argv0.find('/') != std::string::npos) return Absolute(argv0);
  const std::string found = InPath(environment, argv0);
  return found.empty() ? argv0 : Absolute(found);
}

std::string HostLabel() {
  std::array<char, 256> name = {};
  if (::gethostname(name.data(), name.size() - 1) != 0) name = {'n', 'o', 'd', 'e'};
  std::string label;
  for (const char c : std::string_view(name.data())) {
    if (label.size() == 48) break;
    const char lower = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    const bool fits = (lower >= 'a' && lower <= 'z') || (lower >= '0' && lower <= '9') ||
                      lower == '.' || lower == '-';
    label += fits ? lower : '-';
  }
  return label.empty() ? "node" : label;
}

std::string RandomHex(std::size_t digits) {
  std::array<unsigned char, 16> bytes = {};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    bytes[0] = static_cast<unsigned char>(::getpid());  // names need to differ, not to be secret
    bytes[1] = static_cast<unsigned char>(::getpid() >> 8);
  }
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("{:02x}", byte);
  return text.substr(0, digits);
}

}  // namespace everstep::launcher
