// What the kernel says of a process in /proc/PID/stat. Thread-safe.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace everstep {

struct ProcessStat {
  char state = '?';  // R, S, D, T, t, Z, X
  pid_t parent = 0;
  pid_t group = 0;
  pid_t session = 0;
  std::uint64_t start_time = 0;  // clock ticks since boot; with the pid it names a process for good
  std::int64_t cpu_ticks = 0;    // processor time it had so far
  std::int64_t threads = 0;
  std::string name;

  // Dead, perhaps not yet reaped.
  bool dead() const { return state == 'Z' || state == 'X'; }
};

// Nothing: there is no such process, or it may not be read.
std::optional<ProcessStat> ReadProcessStat(pid_t pid);

// One line of that file (proc(5)). The name, in parentheses, may hold anything. Nothing: it ends
// before the start time.
std::optional<ProcessStat> ParseProcessStat(std::string_view line);

}  // namespace everstep
