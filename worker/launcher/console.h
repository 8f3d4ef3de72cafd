// What a person sees: workers' bytes on stdout and stderr as they come, Everstep's own lines on
// stderr, and on a terminal one live line below them that is redrawn in place.
//
// One thread. Writes block, as the workers' own would: a reader that stops reading stops the
// console, not the training.
#pragma once

#include <string>
#include <string_view>

namespace everstep::launcher {

class Console {
 public:
  // `live`: stderr is a terminal.
  explicit Console(bool live) : live_(live) {}
  ~Console() { SetLive({}); }

  void Worker(bool from_stderr, std::string_view bytes);
  // One line, "everstep: " before it.
  void Say(std::string_view text);
  // Several lines as they are (the summary).
  void Text(std::string_view text);
  // The live line, cut to the terminal's width; empty takes it away. Without a terminal: nothing.
  void SetLive(std::string text);

 private:
  void Erase();
  void Draw();

  const bool live_;
  std::string line_;
  bool drawn_ = false;
  bool at_line_start_ = true;  // of what the terminal shows; a live line is drawn there only
};

}  // namespace everstep::launcher
