#include "controller/cli/units.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace everstep::cli {

std::string HumanSeconds(double seconds) {
  if (!(seconds >= 0) || seconds > 1e12) return "-";
  // Each limit is where rounding would spill into the next unit.
  if (seconds < 0.9995) return fmt::format("{}ms", std::lround(seconds * 1000));
  if (seconds < 59.95) return fmt::format("{:.1f}s", seconds);
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60);
  return fmt::format("{}d{}h", whole / 86400, whole / 3600 % 24);
}

std::string HumanCount(std::int64_t count) {
  if (count < 0) return "-";
  std::string digits;
  for (int n = 0; count > 0 || n == 0; ++n, count /= 10) {
    if (n > 0 && n % 3 == 0) digits += ',';
    digits += static_cast<char>('0' + count % 10);
  }
  std::reverse(digits.begin(), digits.end());
  return digits;
}

std::string HumanBytes(std::uint64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  auto value = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB", "PiB"}) {
    if (value < 1023.5) break;
    value /= 1024;
    unit = next;
  }
  return value < 9.995   ? fmt::format("{:.2f} {}", value, unit)
         : value < 99.95 ? fmt::format("{:.1f} {}", value, unit)
                         : fmt::format("{:.0f} {}", value, unit);
}

std::string Plural(std::int64_t count, const std::string& noun) {
  return HumanCount(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string OrDash(const std::string& text) {
  return text.empty() ? "-" : text;
}

}  // namespace everstep::cli
