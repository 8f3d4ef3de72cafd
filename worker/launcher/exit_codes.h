// What everstep-run's exit code says to the shell, the scheduler and the requeue script above it.
// Reference: docs/reference/exit-codes.md.
#pragma once

#include <cstdint>
#include <string_view>

namespace everstep::launcher {

inline constexpr std::int32_t kExitSucceeded = 0;  // every worker exited 0
inline constexpr std::int32_t kExitFailed = 1;  // a worker failed and the budget is spent; a signal
inline constexpr std::int32_t kExitUsage = 2;   // the command line was refused, nothing ran
inline constexpr std::int32_t kExitCapacity =
    75;  // EX_TEMPFAIL: machines are missing, submit again
inline constexpr std::int32_t kExitNoProgress =
    93;  // it cannot get on, submitting again will not help

// "a worker failed and its restarts are spent"; "an exit code that is not Everstep's" for others.
std::string_view ExitMeaning(std::int32_t exit_code);
// What to do next, one sentence; empty for 0.
std::string_view ExitAdvice(std::int32_t exit_code);

}  // namespace everstep::launcher
