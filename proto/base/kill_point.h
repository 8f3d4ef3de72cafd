// Places where a test may end this process with SIGKILL: between two steps of a protocol, where a
// crash is most instructive. tests/integration/kills.py arms each of them in a real job.
//
//   if (auto ok = file->Sync(); !ok.ok()) return ok;
//   KillPoint("persist.part_synced");
//   if (auto ok = disk->Rename(part, name); !ok.ok()) return ok;
//
// Labels are literals PHASE.WHAT_WAS_DONE, one place each: the test finds them by reading the
// sources.
//
// It is compiled into every build, so that what is tested is what ships. Two deliberate acts are
// needed before a point can do anything: the environment of the process names a file
// (EVERSTEP_KILL_POINTS), and that file is a KillPage, a regular one of this very user that nobody
// else may write. A stray variable does nothing; whoever can do both could send the signal himself.
// `everstep run` does not hand the variable on to the agent and controller it brings.
//
// Cost where nothing is armed: one relaxed load and a branch. Thread-safe. Not for pure cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace everstep {

inline constexpr char kKillPageMagic[32] = "everstep kill points, page 1\n";

// What the test writes, shared by all its processes. Little-endian; the offsets are part of it.
struct KillPage {
  char magic[32];                        // 0
  std::atomic<std::int32_t> countdown;   // 32: the armed point's n-th hit kills; 0: none is armed
  std::atomic<std::int32_t> killed_pid;  // 36: written by who dies
  std::int32_t only_pid;                 // 40: 0: any process
  std::int32_t spared_pid;               // 44: lives on; 0: none
  char label[64];                        // 48: NUL-terminated
  char program[16];                      // 112: begin of the program's name; empty: any
};
static_assert(sizeof(KillPage) == 128 && std::atomic<std::int32_t>::is_always_lock_free);

namespace kill_point {
inline constexpr std::uintptr_t kNotLooked = 1;  // 0: there is no page
extern std::atomic<std::uintptr_t> page;
void Reached(const char* label);
}  // namespace kill_point

inline void KillPoint(const char* label) {
  if (kill_point::page.load(std::memory_order_relaxed) != 0) [[unlikely]] {
    kill_point::Reached(label);
  }
}

}  // namespace everstep
