#include "checkpoint/core/gap_trace.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

namespace everstep::checkpoint {
namespace {

std::string_view NextWord(std::string_view* line) {
  const auto begin = line->find_first_not_of(" \t\r");
  if (begin == std::string_view::npos) return *line = {};
  const auto end = std::min(line->find_first_of(" \t\r", begin), line->size());
  const std::string_view word = line->substr(begin, end - begin);
  line->remove_prefix(end);
  return word;
}

// A decimal figure of at most an hour of milliseconds, not negative.
std::optional<double> Figure(std::string_view word) {
  double value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size() || !(value >= 0 && value <= 3.6e6)) {
    return std::nullopt;
  }
  return value;
}

}  // namespace

std::string ParseGapTrace(std::string_view text, PacerOptions* options) {
  PacerOptions out = *options;
  out.busy_then_idle_s.clear();
  double layer_s = 0, collective_s = 0;
  std::size_t number = 0;
  while (!text.empty()) {
    ++number;
    const auto end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    line = line.substr(0, line.find('#'));
    std::string_view word = NextWord(&line);
    if (word.empty()) continue;
    const std::string_view kind = word == "link" || word == "layer" ? word : "";
    if (!kind.empty()) word = NextWord(&line);
    const auto first = Figure(word);
    const auto second = Figure(NextWord(&line));
    if (!first || !second || !NextWord(&line).empty() || (kind == "link" && *second == 0)) {
      return "line " + std::to_string(number) +
             ": wanted two figures, 'link MICROSECONDS GB/s', 'layer MS MS' or 'BUSY_MS IDLE_MS'";
    }
    if (kind == "link") {
      out.link = {.alpha_s = *first / 1e6, .bytes_per_s = *second * 1e9};
    } else if (kind == "layer") {
      layer_s = *first / 1e3;
      collective_s = *second / 1e3;
    } else if (out.busy_then_idle_s.size() >= 2 * kMostSpans) {
      return "more than " + std::to_string(kMostSpans) + " spans";
    } else {
      out.busy_then_idle_s.push_back(*first / 1e3);
      out.busy_then_idle_s.push_back(*second / 1e3);
    }
  }
  out.in_flight_bytes = InFlightBytes(layer_s, collective_s, out.link.bytes_per_s);
  *options = std::move(out);
  return "";
}

}  // namespace everstep::checkpoint
