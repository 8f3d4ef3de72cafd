// A gap trace: when the network of one training iteration is busy and when it is idle, as a
// profiler saw it. Text, one span a line, '#' begins a remark:
//
//   link 25 12.5        latency in microseconds and bandwidth in GB/s (optional; 0 and 1 otherwise)
//   layer 40 20         a layer's time and its collective's, in ms (optional: head-of-line bound)
//   12.5 3.2            12.5 ms busy, then 3.2 ms idle
//   8.0 0.4
//
// Pure: the shell reads the file.
#pragma once

#include <string>
#include <string_view>

#include "checkpoint/core/pacing.h"

namespace everstep::checkpoint {

inline constexpr std::size_t kMostSpans = 100'000;

// Empty: *options has what the text says. Else what is wrong, with the line's number.
std::string ParseGapTrace(std::string_view text, PacerOptions* options);

}  // namespace everstep::checkpoint
