// everstep_events_doc [--rewrite FILE | --check FILE]: docs/reference/events.md, printed from the
// controller's own vocabulary.
//
// Exit codes: 0 printed, written or equal; 1 the file differs; 2 wrong usage or an unusable file.
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string_view>

#include <fmt/format.h>

#include "controller/core/vocabulary.h"

int main(int argc, char** argv) {
  const std::string text = everstep::controller::EventsReference();
  const std::string_view mode = argc > 1 ? argv[1] : "";
  if (argc == 1) {
    fmt::print("{}", text);
    return 0;
  }
  if (argc != 3 || (mode != "--rewrite" && mode != "--check")) {
    fmt::print(stderr, "usage: everstep_events_doc [--rewrite FILE | --check FILE]\n");
    return 2;
  }
  if (mode == "--rewrite") {
    std::ofstream out(argv[2], std::ios::binary | std::ios::trunc);
    out << text;
    out.close();
    if (out.good()) return 0;
    fmt::print(stderr, "error: cannot write {}\n", argv[2]);
    return 2;
  }
  std::ifstream in(argv[2], std::ios::binary);
  std::stringstream there;
  there << in.rdbuf();
  if (there.str() == text) return 0;
  fmt::print(stderr,
             "error: {} is not what the program says; everstep_events_doc --rewrite {} and read "
             "the diff\n",
             argv[2], argv[2]);
  return 1;
}
