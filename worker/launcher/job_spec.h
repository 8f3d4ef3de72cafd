// From a command line to the job that is handed to a controller. Pure but for the facts it is
// given.
#pragma once

#include <cstdint>
#include <string>

#include "record.pb.h"
#include "worker/launcher/flags.h"

namespace everstep::launcher {

// What of the shell goes with the job.
struct SubmitterFacts {
  Environment environment;  // goes to the workers
  std::string cwd;
  std::string python;  // absolute; empty only for kProgram
  std::uint32_t umask = 022;
  std::uint32_t workers = 1;  // per node, as ResolveWorkers says
  bool terminal = false;      // stdout is one: workers' output is line-buffered
  std::string random;         // 6 hexadecimal digits, makes a name unique
  std::int64_t now_ns = 0;
};

inline constexpr std::size_t kMaxEnvironmentBytes = std::size_t{1024} * 1024;
inline constexpr std::uint32_t kDefaultJoinTimeoutMs = 600 * 1000;  // torchrun's
inline constexpr std::uint32_t kDefaultLastCallMs = 1000;
// Once every rank told the store its address, a process group forms in milliseconds or not at all.
inline constexpr std::uint32_t kStartTimeoutMs = 5000;
inline constexpr std::uint32_t kRestartGraceMs =
    500;  // a peer is dead: the others lose nothing more

// --name, else --rdzv-id when one was given, else the script's stem and `random`; always a good job
// name.
std::string JobName(const LaunchFlags& flags, const std::string& random);

// *spec is written whole. Not empty: the error, in the launcher's form.
std::string MakeJobSpec(const LaunchFlags& flags, const SubmitterFacts& facts, v1::JobSpec* spec);

// The spec as indented JSON, the environment left out (it may hold secrets): for --dry-run.
std::string JobSpecJson(v1::JobSpec spec);

}  // namespace everstep::launcher
