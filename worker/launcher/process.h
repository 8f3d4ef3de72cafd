// The programs a launcher brings: started, watched, ended. A child cannot outlive its launcher: the
// kernel kills it when the thread that started it ends (PDEATHSIG), so one long-lived thread starts
// them all.
//
// Not thread-safe: one owner thread.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "worker/launcher/flags.h"

namespace everstep::launcher {

struct ProcessSpec {
  std::vector<std::string> argv;  // argv[0]: the program's path
  Environment environment;        // whole
  std::string output;             // stdout and stderr are appended to this file
  int inherited = -1;  // a descriptor that the program gets under its own number; -1: none
  bool survives_launcher = false;  // no PDEATHSIG: it ends by its lifeline
};

// "exited with code 3", "was ended by signal 9 (SIGKILL)"; of a waitpid status.
std::string StatusText(int status);

class Process {
 public:
  Process() = default;
  // Kills what still runs, and reaps it.
  ~Process();
  Process(Process&& other) noexcept;
  Process& operator=(Process&& other) noexcept;

  // In a session of its own, signals unblocked and at their defaults. Empty on success, else a
  // sentence. A program that cannot be executed is an error here, not an exit code 127 later.
  std::string Start(const ProcessSpec& spec);

  bool running() const { return pid_ > 0; }
  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_; }  // readable: it ended
  void Signal(int signal);
  // It was stopped (SIGSTOP, SIGTSTP): it neither works nor ends until somebody continues it.
  bool stopped() const;
  // The waitpid status once it ended, then running() is false. Does not wait.
  std::optional<int> Reap();
  // Waits up to `limit`.
  std::optional<int> Wait(std::chrono::milliseconds limit);

 private:
  pid_t pid_ = -1;
  int pidfd_ = -1;
};

// Sends `signal` to the process that `file` names (its first number), if it still runs `program`: a
// pid may have been given to somebody else. False: there is no such process.
bool SignalByPidFile(const std::string& file, const std::string& program, int signal);

// The last `lines` lines of a text file, at most 4 KiB; empty when it cannot be read.
std::string LastLines(const std::string& path, std::size_t lines);

}  // namespace everstep::launcher
