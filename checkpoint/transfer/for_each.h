// Work on several things at a time, for as long as a call lasts.
#pragma once

#include <cstddef>
#include <functional>

#include "checkpoint/store/result.h"

namespace everstep::checkpoint {

// Runs task(i) for each i < count on at most `threads` threads, the caller's among them; fewer
// where no thread is to be had. The first error: what had not begun then does not begin.
Outcome ForEach(std::size_t count, std::size_t threads,
                const std::function<Outcome(std::size_t)>& task);

}  // namespace everstep::checkpoint
