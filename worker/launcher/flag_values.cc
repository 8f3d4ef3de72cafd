#include "worker/launcher/flag_values.h"

#include <charconv>
#include <cmath>
#include <cstdlib>

#include <fmt/format.h>

namespace everstep::launcher {
namespace {

std::string_view Strip(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

bool ParseDecimal(std::string_view text, std::int64_t* out) {
  text = Strip(text);
  if (text.size() > 1 && text.front() == '+' && text[1] != '-') text.remove_prefix(1);
  const char* end = text.data() + text.size();
  const std::from_chars_result read = std::from_chars(text.data(), end, *out);
  return read.ec == std::errc() && read.ptr == end;
}

constexpr std::string_view kKnownSignals[] = {"SIGTERM", "SIGINT",  "SIGHUP", "SIGQUIT",
                                              "SIGUSR1", "SIGUSR2", "SIGXCPU"};

}  // namespace

std::string ReadInteger(std::string_view text, std::int64_t low, std::int64_t high,
                        std::int64_t* out) {
  std::int64_t value = 0;
  if (!ParseDecimal(text, &value) || value < low || value > high) {
    return fmt::format("must be a whole number from {} to {}", low, high);
  }
  *out = value;
  return {};
}

std::string ReadSeconds(std::string_view text, double* out) {
  const std::string number(Strip(text));
  char* end = nullptr;
  const double value = std::strtod(number.c_str(), &end);
  if (number.empty() || *end != '\0' || !std::isfinite(value) || value < 0 || value > 86400) {
    return "must be seconds from 0 to 86400";
  }
  *out = value;
  return {};
}

std::string ReadInterval(std::string_view text, double* seconds, std::uint64_t* steps) {
  constexpr std::string_view kSteps = "steps";
  std::string_view number = Strip(text);
  if (number.ends_with(kSteps)) {
    number.remove_suffix(kSteps.size());
    std::int64_t count = 0;
    if (!ReadInteger(number, 1, 1'000'000'000'000, &count).empty()) {
      return "must be seconds, as in 600, or steps, as in 100steps";
    }
    *steps = static_cast<std::uint64_t>(count);
    *seconds = 0;
    return {};
  }
  double value = 0;
  if (!ReadSeconds(number, &value).empty() || value <= 0) {
    return "must be seconds up to 86400, as in 600, or steps, as in 100steps";
  }
  *seconds = value;
  *steps = 0;
  return {};
}

std::string ReadNodes(std::string_view text, std::uint32_t* min_nodes, std::uint32_t* max_nodes) {
  const std::vector<std::string_view> parts = Split(text, ':');
  std::int64_t low = 0;
  std::int64_t high = 0;
  if (parts.size() > 2 || !ParseDecimal(parts.front(), &low) ||
      !ParseDecimal(parts.back(), &high)) {
    return "must be a number of nodes or MIN:MAX, as in 4 or 2:8";
  }
  if (low < 1 || high > kMaxNodes) return fmt::format("nodes go from 1 to {}", kMaxNodes);
  if (low > high) {
    return fmt::format("the minimum {} is above the maximum {}; did you mean {}:{}", low, high,
                       high, low);
  }
  *min_nodes = static_cast<std::uint32_t>(low);
  *max_nodes = static_cast<std::uint32_t>(high);
  return {};
}

std::string ReadWorkerCount(std::string_view text, WorkerCount* out) {
  if (text == "auto") {
    *out = {WorkerCountKind::kAuto, 0};
  } else if (text == "cpu") {
    *out = {WorkerCountKind::kCpu, 0};
  } else if (text == "gpu") {
    *out = {WorkerCountKind::kGpu, 0};
  } else if (text == "xpu") {
    *out = {WorkerCountKind::kXpu, 0};
  } else {
    std::int64_t number = 0;
    if (!ReadInteger(text, 1, kMaxWorkersPerNode, &number).empty()) {
      return fmt::format("must be auto, cpu, gpu, xpu or a whole number from 1 to {}",
                         kMaxWorkersPerNode);
    }
    *out = {WorkerCountKind::kNumber, static_cast<std::uint32_t>(number)};
  }
  return {};
}

std::string ReadStreams(std::string_view text, StreamSpec* out) {
  constexpr std::string_view kForm =
      "must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), for all workers (3) or for each local "
      "rank (0:1,1:2)";
  const auto bits = [](std::string_view v, std::uint8_t* value) {
    if (v.size() != 1 || v[0] < '0' || v[0] > '3') return false;
    *value = static_cast<std::uint8_t>(v[0] - '0');
    return true;
  };
  StreamSpec spec;
  if (bits(text, &spec.all)) {
    *out = spec;
    return {};
  }
  for (const std::string_view entry : Split(text, ',')) {
    const std::size_t colon = entry.find(':');
    std::int64_t rank = 0;
    std::uint8_t value = 0;
    if (colon == std::string_view::npos ||
        !ReadInteger(entry.substr(0, colon), 0, kMaxWorkersPerNode - 1, &rank).empty() ||
        !bits(entry.substr(colon + 1), &value)) {
      return std::string(kForm);
    }
    spec.by_local_rank[static_cast<std::int32_t>(rank)] = value;
  }
  *out = spec;
  return {};
}

std::string ReadConfig(std::string_view text, std::map<std::string, std::string>* out) {
  std::map<std::string, std::string> config;
  if (!Strip(text).empty()) {
    for (const std::string_view entry : Split(Strip(text), ',')) {
      const std::size_t equals = entry.find('=');
      const std::string_view key = Strip(entry.substr(0, equals));
      const std::string_view value =
          equals == std::string_view::npos ? std::string_view() : Strip(entry.substr(equals + 1));
      if (key.empty() || value.empty()) {
        return fmt::format("'{}' is not KEY=VALUE; write KEY=VALUE,KEY=VALUE", entry);
      }
      config[std::string(key)] = std::string(value);
    }
  }
  *out = std::move(config);
  return {};
}

std::string ReadRanks(std::string_view text, std::vector<std::int32_t>* out) {
  std::vector<std::int32_t> ranks;
  if (!text.empty()) {
    for (const std::string_view entry : Split(text, ',')) {
      std::int64_t rank = 0;
      if (!ReadInteger(entry, 0, kMaxWorkersPerNode - 1, &rank).empty()) {
        return "must be local ranks with commas between them, as in 0,1,2";
      }
      ranks.push_back(static_cast<std::int32_t>(rank));
    }
  }
  *out = std::move(ranks);
  return {};
}

std::string ReadSignals(std::string_view text, std::vector<std::string>* out) {
  std::vector<std::string> signals;
  for (const std::string_view entry : Split(text, ',')) {
    const std::string_view name = Strip(entry);
    bool known = false;
    for (const std::string_view candidate : kKnownSignals) known = known || candidate == name;
    if (!known) {
      return fmt::format("'{}' cannot be handled; choose from {}", name,
                         fmt::join(kKnownSignals, ", "));
    }
    signals.emplace_back(name);
  }
  *out = std::move(signals);
  return {};
}

std::string ReadJobName(std::string_view text, std::string* out) {
  const bool fits = !text.empty() && text.size() <= 128 &&
                    text.find_first_not_of(
                        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                        "0123456789_.-") == std::string_view::npos;
  if (!fits) return "must be 1 to 128 characters of A-Z a-z 0-9 _ . -";
  *out = std::string(text);
  return {};
}

std::string ReadRedundancy(std::string_view text, std::optional<checkpoint::Redundancy>* out) {
  checkpoint::Redundancy policy;
  std::string wrong = checkpoint::ParseRedundancy(Strip(text), &policy);
  if (!wrong.empty()) return wrong;
  *out = policy;
  return {};
}

std::vector<std::string> ReadFilters(std::string_view text) {
  std::vector<std::string> items(1);
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ',') {
      items.back() += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      items.back() += ',';
      ++i;
    } else {
      items.emplace_back();
    }
  }
  return items;
}

}  // namespace everstep::launcher
