// A fault of a simulated run as a value: when, what, whom, how long. A run's faults are a list,
// drawn from its seed or written by hand, and print to one word, so that a failing run is one
// command:
//
//   tests/run.sh sim --seed 17 --faults 1250ms:node_crash:n2,3s:partition:n1:800ms
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "proto/base/time.h"

namespace everstep::sim {

struct Fault {
  Duration at = {};     // since the run's start
  std::string kind;     // [a-z_]+
  std::string target;   // a node, "controller", "n2/1" for local rank 1; may be empty
  Duration lasts = {};  // 0: for an instant, or for good
  friend bool operator==(const Fault&, const Fault&) = default;
};

// "1250ms:node_crash:n2" or "3s:partition:n1:800ms". Exact: ParseFaults gives back the same faults.
std::string FormatFault(const Fault& fault);
std::string FormatFaults(const std::vector<Fault>& faults);  // comma-separated; "none" when empty

// None when the text is not a list of faults; *error says which item and why.
std::optional<std::vector<Fault>> ParseFaults(std::string_view text, std::string* error);

// "1500ms", "2s", "30us", "7ns". Exact.
std::string FormatDuration(Duration d);
std::optional<Duration> ParseDuration(std::string_view text);

// The command that runs exactly this again. `bug` may be empty.
std::string ReproduceCommand(std::uint64_t seed, const std::vector<Fault>& faults,
                             std::string_view bug);

}  // namespace everstep::sim
