// everstep_datadriven [--rewrite] FILE...: replays transcripts through the production controller
// and compares, or writes what it got back into the files for a person to read in `git diff`.
//
// Exit codes: 0 all equal (or rewritten), 1 a transcript differs, 2 wrong usage or a file that
// cannot be read or written.
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string_view>

#include <fmt/format.h>

#include "tests/datadriven/cluster.h"

int main(int argc, char** argv) {
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
    everstep::datadriven::Cluster cluster;
    const std::string actual = everstep::datadriven::Replay(
        text.str(),
        [&cluster](const everstep::datadriven::Command& command) { return cluster.Run(command); });
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
    fmt::print(stderr, "{}: {}", path, everstep::datadriven::FirstDifference(text.str(), actual));
  }
  if (replayed == 0) {
    fmt::print(stderr, "usage: everstep_datadriven [--rewrite] FILE...\n");
    return 2;
  }
  if (differ > 0) {
    fmt::print(stderr,
               "{} of {} transcripts differ; if the new text is right: "
               "everstep_datadriven --rewrite FILE, then read the diff\n",
               differ, replayed);
    return 1;
  }
  fmt::print("{} transcripts replayed\n", replayed);
  return 0;
}
