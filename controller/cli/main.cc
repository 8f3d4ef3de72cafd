// `everstep`: the one command a person types.
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "controller/cli/app.h"
#include "proto/base/errno_text.h"

namespace {

using everstep::cli::Environment;
using everstep::cli::Io;

bool output_failed = false;

// Each piece at once: what follows a stream sees it now, and a reader that left ends us by SIGPIPE.
void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (fd == STDOUT_FILENO && !output_failed) {
        std::fprintf(stderr, "error: cannot write the output: %s\n",
                     everstep::ErrnoText(errno).c_str());
      }
      output_failed = output_failed || fd == STDOUT_FILENO;
      return;
    }
    text.remove_prefix(static_cast<std::size_t>(n));
  }
}

std::size_t TerminalWidth() {
  winsize size{};
  if (::isatty(STDOUT_FILENO) == 0) return 0;
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

int main(int argc, char** argv) {
  Environment environment;
  for (const char* const* entry = environ; *entry != nullptr; ++entry) {
    if (const char* equals = std::strchr(*entry, '=')) {
      environment.emplace(std::string(*entry, equals), equals + 1);
    }
  }
  Io io;
  io.out = [](std::string_view text) { WriteAll(STDOUT_FILENO, text); };
  io.err = [](std::string_view text) { WriteAll(STDERR_FILENO, text); };
  io.width = TerminalWidth();
  io.err_terminal = ::isatty(STDERR_FILENO) != 0;
  const int code = everstep::cli::RunCli(argc > 0 ? argv[0] : "everstep",
                                         std::vector<std::string>(argv + (argc > 0), argv + argc),
                                         environment, &io);
  return output_failed && code == 0 ? 1 : code;
}
