// The program of a kind of transcripts: replays files and compares, or writes what it got back into
// them for a person to read in `git diff`.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tests/datadriven/transcript.h"

namespace everstep::datadriven {

using Runner = std::function<std::vector<std::string>(const Command&)>;

// PROGRAM [--rewrite] FILE...; `make` gives each file a runner of its own. Returns the exit code: 0
// all equal (or rewritten), 1 a transcript differs, 2 wrong usage or a file that cannot be read or
// written.
int ReplayFiles(int argc, char** argv, const std::function<Runner()>& make);

}  // namespace everstep::datadriven
