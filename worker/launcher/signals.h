// The signals of --signals-to-handle as a descriptor. Blocks them in this thread and in those it
// starts, so it is made before any other thread.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace everstep::launcher {

class Signals {
 public:
  explicit Signals(const std::vector<std::string>& names);
  ~Signals();
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  int descriptor() const { return descriptor_; }
  // The next one that came, by number; does not wait.
  std::optional<int> Take();

 private:
  int descriptor_ = -1;
};

// "SIGTERM"; "signal 77" for one without a name.
std::string SignalLabel(int number);

}  // namespace everstep::launcher
