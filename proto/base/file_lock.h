// A lock that goes with its process (flock(2)). Thread-safe.
#pragma once

#include "proto/base/time.h"

namespace everstep {

// How long whoever is started again waits for the one before: the system gives its locks back at
// the very end of a killed process, after the memory of its arenas, on a busy machine.
inline constexpr Duration kLockPatience = Seconds(5);

// Locks `fd` for this process alone; tries again until `within` is over. False: another process
// holds it still (errno EWOULDBLOCK), or what the system says (errno).
bool LockFile(int fd, Duration within);

}  // namespace everstep
