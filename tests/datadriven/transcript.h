// A transcript: commands, and below each what they print. The format is that of etcd raft's
// testdata (cockroachdb/datadriven):
//
//   # a comment, kept as it stands
//   command word key=value key="two words"
//   ----
//   what it printed, up to the next empty line
//
// Compares or rewrites; knows nothing of what the commands do.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace everstep::datadriven {

struct Command {
  std::string name;
  std::vector<std::string> words;             // without '='
  std::map<std::string, std::string> values;  // key=value
  int line = 0;                               // in the file, from 1

  bool Has(std::string_view word) const;
  std::string Get(const std::string& key, const std::string& otherwise = "") const;
};

// "advance 1s beat=n1" as a command. False: a quote is not closed.
bool ParseCommand(std::string_view text, Command* out);

// Runs every command of `text` through `run`, which answers the lines that it prints. The result is
// the transcript as it should read; an equal text means that the test passed.
std::string Replay(std::string_view text,
                   const std::function<std::vector<std::string>(const Command&)>& run);

// The first differing line with its neighbours, "" when equal: for the error message.
std::string FirstDifference(std::string_view expected, std::string_view actual);

}  // namespace everstep::datadriven
