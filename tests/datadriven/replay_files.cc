#include "tests/datadriven/replay_files.h"

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string_view>

#include <fmt/format.h>

namespace everstep::datadriven {

int ReplayFiles(int argc, char** argv, const std::function<Runner()>& make) {
  bool rewrite = false;
  int differ = 0, replayed = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    if (path == "--rewrite") {
      rewrite = true;
      continue;
    }
    std::ifstream in(path, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    if (!in.good()) {
      fmt::print(stderr, "error: cannot read the transcript {}\n", path);
      return 2;
    }
    const std::string actual = Replay(text.str(), make());
    ++replayed;
    if (actual == text.str()) continue;
    if (rewrite) {
      std::ofstream out(path, std::ios::binary | std::ios::trunc);
      out << actual;
      out.close();
      if (!out.good()) {
        fmt::print(stderr, "error: cannot write the transcript {}\n", path);
        return 2;
      }
      fmt::print("rewrote {}\n", path);
      continue;
    }
    ++differ;
    fmt::print(stderr, "{}: {}", path, FirstDifference(text.str(), actual));
  }
  if (replayed == 0) {
    fmt::print(stderr, "usage: {} [--rewrite] FILE...\n", argv[0]);
    return 2;
  }
  if (differ > 0) {
    fmt::print(stderr,
               "{} of {} transcripts differ; if the new text is right: "
               "{} --rewrite FILE, then read the diff\n",
               differ, replayed, argv[0]);
    return 1;
  }
  fmt::print("{} transcripts replayed\n", replayed);
  return 0;
}

}  // namespace everstep::datadriven
