#include "tests/sim/kernel/fault.h"

#include <charconv>

#include <fmt/format.h>

namespace everstep::sim {
namespace {

struct Unit {
  std::string_view name;
  std::int64_t ns;
};
constexpr Unit kUnits[] = {{"s", 1'000'000'000}, {"ms", 1'000'000}, {"us", 1'000}, {"ns", 1}};

std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

}  // namespace

std::string FormatDuration(Duration d) {
  for (const Unit& unit : kUnits) {
    if (d.count() % unit.ns == 0) return fmt::format("{}{}", d.count() / unit.ns, unit.name);
  }
  return "0s";  // not reached: every count is a multiple of 1 ns
}

std::optional<Duration> ParseDuration(std::string_view text) {
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || number < 0) return std::nullopt;
  const std::string_view rest(end, static_cast<std::size_t>(text.data() + text.size() - end));
  for (const Unit& unit : kUnits) {
    if (rest != unit.name) continue;
    if (number > INT64_MAX / unit.ns) return std::nullopt;
    return Duration(number * unit.ns);
  }
  return std::nullopt;
}

std::string FormatFault(const Fault& fault) {
  std::string text = fmt::format("{}:{}", FormatDuration(fault.at), fault.kind);
  if (!fault.target.empty() || fault.lasts.count() != 0) text += ":" + fault.target;
  if (fault.lasts.count() != 0) text += ":" + FormatDuration(fault.lasts);
  return text;
}

std::string FormatFaults(const std::vector<Fault>& faults) {
  if (faults.empty()) return "none";
  std::string text;
  for (const Fault& fault : faults) {
    if (!text.empty()) text += ",";
    text += FormatFault(fault);
  }
  return text;
}

std::optional<std::vector<Fault>> ParseFaults(std::string_view text, std::string* error) {
  std::vector<Fault> faults;
  if (text.empty() || text == "none") return faults;
  for (const std::string_view item : Split(text, ',')) {
    const std::vector<std::string_view> parts = Split(item, ':');
    Fault fault;
    const std::optional<Duration> at = ParseDuration(parts[0]);
    std::optional<Duration> lasts = Duration(0);
    if (parts.size() == 4) lasts = ParseDuration(parts[3]);
    if (parts.size() < 2 || parts.size() > 4 || !at || !lasts || parts[1].empty()) {
      *error = fmt::format(
          "fault '{}' is not TIME:KIND[:TARGET[:LASTS]]; write it as in 1250ms:partition:n2:800ms",
          item);
      return std::nullopt;
    }
    fault.at = *at;
    fault.kind = parts[1];
    if (parts.size() > 2) fault.target = parts[2];
    fault.lasts = *lasts;
    faults.push_back(std::move(fault));
  }
  return faults;
}

std::string ReproduceCommand(std::uint64_t seed, const std::vector<Fault>& faults,
                             std::string_view bug) {
  std::string command =
      fmt::format("tests/run.sh sim --seed {} --faults {}", seed, FormatFaults(faults));
  if (!bug.empty()) command += fmt::format(" --bug {}", bug);
  return command;
}

}  // namespace everstep::sim
