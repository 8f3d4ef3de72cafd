#include "worker/agent/dial_backoff.h"

#include <algorithm>
#include <charconv>

namespace everstep::agent {
namespace {

constexpr std::size_t kMaxAddresses = 16;

bool IsHostPort(const std::string& s) {
  const auto colon = s.rfind(':');
  if (colon == std::string::npos || colon == 0) return false;
  int port = 0;
  const char* end = s.data() + s.size();
  const auto parsed = std::from_chars(s.data() + colon + 1, end, port);
  return parsed.ec == std::errc() && parsed.ptr == end && port > 0 && port < 65536;
}

}  // namespace

DialBackoff::Dial DialBackoff::Next(std::size_t addresses) {
  const std::size_t others = addresses - 1;
  if (begun_ && left_ > 0 && others > 0) {
    --left_;
    const std::size_t index = 1 + next_other_++ % others;
    return {{}, index, std::min(options_.patience_max, options_.patience * (round_ + 1))};
  }
  const Duration wait = begun_ ? Wait() : Duration{};
  round_ = begun_ ? round_ + 1 : 0;
  begun_ = true;
  left_ = std::min(options_.others, others);
  return {wait, 0, options_.patience_max};
}

Duration DialBackoff::Wait() {
  const Duration whole =
      std::min(options_.max, options_.first * (std::int64_t{1} << std::min(round_, 20u)));
  // xorshift64: half of the wait is drawn, so that no two agents keep step.
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  const std::int64_t half = whole.count() / 2;
  return Duration(half + static_cast<std::int64_t>(state_ % static_cast<std::uint64_t>(half + 1)));
}

std::vector<std::string> ParseAddresses(const std::string& text, std::vector<std::string>* bad) {
  std::vector<std::string> out;
  std::string word;
  bool comment = false;
  for (const char c : text + "\n") {
    if (c == '#') comment = true;
    const bool ends = c == ',' || c == ' ' || c == '\t' || c == '\r' || c == '\n' || comment;
    if (!ends) word += c;
    if (ends && !word.empty()) {
      if (!IsHostPort(word)) {
        bad->push_back(word);
      } else if (out.size() < kMaxAddresses &&
                 std::find(out.begin(), out.end(), word) == out.end()) {
        out.push_back(word);
      }
      word.clear();
    }
    if (c == '\n') comment = false;
  }
  return out;
}

}  // namespace everstep::agent
