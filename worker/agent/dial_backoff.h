// When to dial which controller: at once after a loss, the one that stood last more often than the
// others, then doubling waits with jitter, bounded.
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "proto/base/time.h"

namespace everstep::agent {

// Dials come in rounds: address 0, then up to `others` further ones without a wait between them
// (the next ones in the next round), then a wait. With the address that stood last in front, a
// controller that starts again is met within `max` and some failing dials, however many addresses
// there are: it takes nodes that stay away for its rejoin grace (2 s) for lost.
class DialBackoff {
 public:
  struct Options {
    Duration first = Milliseconds(50);
    Duration max = Milliseconds(500);
    std::size_t others = 3;
    // Of a dial of another address; each round it gets as much more, up to what address 0 always
    // has.
    Duration patience = Milliseconds(300);
    Duration patience_max = Seconds(10);
  };

  struct Dial {
    Duration wait = {};  // before it
    std::size_t index = 0;
    Duration patience = Seconds(10);  // until a registration has to stand
  };

  // `seed` spreads agents that lose the same controller at the same instant.
  DialBackoff(Options options, std::uint64_t seed) : options_(options), state_(seed | 1) {}

  // The next dial of one of so many addresses (> 0), when the one before failed or what stood
  // broke. The first after Succeeded (or ever) is of address 0, at once.
  Dial Next(std::size_t addresses);
  // A registration stood, or the addresses are others now.
  void Succeeded() { begun_ = false; }

 private:
  Duration Wait();  // between two rounds

  const Options options_;
  std::uint64_t state_;
  bool begun_ = false;
  std::uint32_t round_ = 0;     // since Succeeded
  std::size_t left_ = 0;        // dials of this round
  std::size_t next_other_ = 0;  // whose turn it is, less 1
};

// "a:1,b:2" or one a line, blanks and '#' comments ignored; at most 16. Entries that are not
// host:port (port 1..65535) go to *bad.
std::vector<std::string> ParseAddresses(const std::string& text, std::vector<std::string>* bad);

}  // namespace everstep::agent
