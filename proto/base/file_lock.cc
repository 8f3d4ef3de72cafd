#include "proto/base/file_lock.h"

#include <sys/file.h>

#include <cerrno>
#include <chrono>
#include <thread>

namespace everstep {

bool LockFile(int fd, Duration within) {
  constexpr Duration kBetween = Milliseconds(10);
  const auto deadline = std::chrono::steady_clock::now() + within;
  while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return false;
    if (std::chrono::steady_clock::now() >= deadline) {
      errno = EWOULDBLOCK;
      return false;
    }
    std::this_thread::sleep_for(kBetween);
  }
  return true;
}

}  // namespace everstep
