#include "proto/base/process_stat.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

namespace everstep {

std::optional<ProcessStat> ParseProcessStat(std::string_view line) {
  const auto open = line.find('(');
  const auto close = line.rfind(')');
  if (open == std::string_view::npos || close == std::string_view::npos || close < open ||
      close + 2 >= line.size()) {
    return std::nullopt;
  }
  ProcessStat out;
  out.name = line.substr(open + 1, close - open - 1);
  out.state = line[close + 2];
  constexpr int kFirst = 4, kLast = 22;  // parent to start time
  std::int64_t fields[kLast + 1] = {};
  std::string_view rest = line.substr(close + 3);
  for (int i = kFirst; i <= kLast; ++i) {
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), fields[i]);
    if (error != std::errc{}) return std::nullopt;
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
  }
  out.parent = static_cast<pid_t>(fields[4]);
  out.group = static_cast<pid_t>(fields[5]);
  out.session = static_cast<pid_t>(fields[6]);
  out.cpu_ticks = fields[14] + fields[15];
  out.threads = fields[20];
  out.start_time = static_cast<std::uint64_t>(fields[22]);
  return out;
}

std::optional<ProcessStat> ReadProcessStat(pid_t pid) {
  if (pid <= 0) return std::nullopt;
  const int fd = open(fmt::format("/proc/{}/stat", pid).c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  char text[4096];  // 52 numbers and a name of at most 64 bytes
  std::size_t size = 0;
  while (size < sizeof text) {
    const ssize_t n = read(fd, text + size, sizeof text - size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;  // ESRCH: it has just gone
    size += static_cast<std::size_t>(n);
  }
  close(fd);
  return ParseProcessStat({text, size});
}

}  // namespace everstep
