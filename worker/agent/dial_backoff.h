// When to dial which controller: at once after a loss, then doubling waits with jitter, bounded.
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "proto/base/time.h"

namespace everstep::agent {

class DialBackoff {
 public:
  struct Options {
    Duration first = Milliseconds(50);
    Duration max = Seconds(1);
  };

  // `seed` spreads agents that lose the same controller at the same instant.
  DialBackoff(Options options, std::uint64_t seed) : options_(options), state_(seed | 1) {}

  // Wait before the next dial. The first after Succeeded (or ever) is 0.
  Duration Next();
  // A registration stood: the next loss dials at once again.
  void Succeeded() { failures_ = 0; }
  std::uint32_t failures() const { return failures_; }

 private:
  const Options options_;
  std::uint64_t state_;
  std::uint32_t failures_ = 0;
};

// "a:1,b:2" or one a line, blanks and '#' comments ignored; at most 16. Entries that are not
// host:port (port 1..65535) go to *bad.
std::vector<std::string> ParseAddresses(const std::string& text, std::vector<std::string>* bad);

}  // namespace everstep::agent
