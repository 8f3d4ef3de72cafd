// Reads the file a worker's @record handler writes when it raises (TORCHELASTIC_ERROR_FILE): the
// real error of a run is the one with the smallest time among all ranks.
#pragma once

#include <string>
#include <string_view>

#include "proto/base/plan.h"
#include "proto/base/time.h"

namespace everstep::agent {

inline constexpr std::size_t kMaxErrorFile = 64u << 10;
// Beside it, where a worker ended since it refuses its input (everstep/_refusal.py): why.
inline constexpr char kRefusalFile[] = "refused.txt";
inline constexpr std::size_t kMaxRefusal = 4u << 10;

// message.extraInfo.timestamp, seconds since the epoch as text or number. ns == 0: none, or not
// JSON.
Timestamp ErrorTime(std::string_view json);

// Fills error_json (at most kMaxErrorFile) and error_time of an exit that failed, from error_file
// or, when that is empty, from `fallback`, and refused (at most kMaxRefusal) from kRefusalFile
// beside it. A file that is not there is fine: not every script records.
void FillError(const std::string& fallback, ExitInfo* exit);

}  // namespace everstep::agent
