// How much memory this process may still take: what an arena is checked against before it is made.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

struct MemoryLimit {
  std::uint64_t available_bytes = 0;
  std::string what;  // "MemAvailable of this machine" or "control group /user.slice/x (memory.max)"
};
// The tightest of the machine's MemAvailable and the limits of this process's control groups (v2),
// page cache that can be reclaimed not counted as used. A machine without /proc answers 2^63.
MemoryLimit AvailableMemory();

// kNoMemory, with who, how much and the limit, when `bytes` are more than there is.
Outcome CheckMemory(std::uint64_t bytes, const std::string& who);

std::string HumanBytes(std::uint64_t bytes);  // "1.5 GiB"

}  // namespace everstep::checkpoint
