#include "worker/launcher/console.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <utility>

#include <fmt/format.h>

namespace everstep::launcher {
namespace {

// A closed reader (a pipe to `head`) loses output, it does not end the training.
void WriteAll(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(descriptor, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) {
      pollfd ready{descriptor, POLLOUT, 0};
      ::poll(&ready, 1, 1000);
      continue;
    }
    if (count <= 0) return;
    bytes.remove_prefix(static_cast<std::size_t>(count));
  }
}

std::size_t Columns() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

void Console::Worker(bool from_stderr, std::string_view bytes) {
  if (bytes.empty()) return;
  Erase();
  WriteAll(from_stderr ? STDERR_FILENO : STDOUT_FILENO, bytes);
  at_line_start_ = bytes.back() == '\n';
  Draw();
}

void Console::Say(std::string_view text) {
  Text(fmt::format("everstep: {}\n", text));
}

void Console::Text(std::string_view text) {
  if (text.empty()) return;
  Erase();
  WriteAll(STDERR_FILENO, text);
  at_line_start_ = text.back() == '\n';
  Draw();
}

void Console::SetLive(std::string text) {
  if (!live_ || text == line_) return;
  Erase();
  line_ = std::move(text);
  Draw();
}

void Console::Erase() {
  if (!drawn_) return;
  WriteAll(STDERR_FILENO, "\r\x1b[K");
  drawn_ = false;
}

void Console::Draw() {
  if (!live_ || line_.empty() || !at_line_start_) return;
  WriteAll(STDERR_FILENO, std::string_view(line_).substr(0, Columns() - 1));
  drawn_ = true;
}

}  // namespace everstep::launcher
