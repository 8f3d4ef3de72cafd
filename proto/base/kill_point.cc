#include "proto/base/kill_point.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace everstep::kill_point {

constinit std::atomic<std::uintptr_t> page{kNotLooked};

namespace {

// The page that the environment names; null: none, or not to be trusted.
KillPage* Map() {
  const char* path = secure_getenv("EVERSTEP_KILL_POINTS");
  if (path == nullptr || *path == '\0') return nullptr;
  const int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return nullptr;
  struct stat facts {};
  void* map = MAP_FAILED;
  if (fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_uid == geteuid() &&
      (facts.st_mode & (S_IWGRP | S_IWOTH)) == 0 &&
      facts.st_size == static_cast<off_t>(sizeof(KillPage))) {
    map = mmap(nullptr, sizeof(KillPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  close(fd);
  if (map == MAP_FAILED) return nullptr;
  auto* found = static_cast<KillPage*>(map);
  if (std::memcmp(found->magic, kKillPageMagic, sizeof found->magic) == 0) return found;
  munmap(map, sizeof(KillPage));
  return nullptr;
}

bool IsMe(const KillPage& p) {
  const pid_t me = getpid();
  if ((p.only_pid != 0 && p.only_pid != me) || p.spared_pid == me) return false;
  return std::strncmp(program_invocation_short_name, p.program,
                      strnlen(p.program, sizeof p.program)) == 0;
}

}  // namespace

void Reached(const char* label) {
  std::uintptr_t at = page.load(std::memory_order_acquire);
  if (at == kNotLooked) {
    KillPage* mapped = Map();
    const auto fresh = reinterpret_cast<std::uintptr_t>(mapped);
    if (page.compare_exchange_strong(at, fresh)) {
      at = fresh;
    } else if (mapped != nullptr) {  // another thread was first
      munmap(mapped, sizeof(KillPage));
    }
  }
  if (at == 0) return;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): an address, or one of two marks
  auto* p = reinterpret_cast<KillPage*>(at);
  if (p->countdown.load(std::memory_order_acquire) <= 0) return;
  if (std::strncmp(p->label, label, sizeof p->label) != 0 || !IsMe(*p)) return;
  if (p->countdown.fetch_sub(1) != 1) return;
  p->killed_pid.store(getpid());
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

}  // namespace everstep::kill_point
