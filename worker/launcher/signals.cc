#include "worker/launcher/signals.h"

#include <sys/signalfd.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include <fmt/format.h>

namespace everstep::launcher {
namespace {

int NumberOf(const std::string& name) {
  for (int number = 1; number < 32; ++number) {
    const char* short_name = ::sigabbrev_np(number);
    if (short_name != nullptr && name == std::string("SIG") + short_name) return number;
  }
  return 0;
}

}  // namespace

Signals::Signals(const std::vector<std::string>& names) {
  sigset_t set;
  ::sigemptyset(&set);
  for (const std::string& name : names) {
    if (const int number = NumberOf(name); number != 0) ::sigaddset(&set, number);
  }
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  descriptor_ = ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

Signals::~Signals() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::optional<int> Signals::Take() {
  signalfd_siginfo info{};
  if (::read(descriptor_, &info, sizeof(info)) != sizeof(info)) return std::nullopt;
  return static_cast<int>(info.ssi_signo);
}

std::string SignalLabel(int number) {
  const char* name = ::sigabbrev_np(number);
  return name == nullptr ? fmt::format("signal {}", number) : fmt::format("SIG{}", name);
}

}  // namespace everstep::launcher
