#include "controller/policy/table_text.h"

#include <charconv>
#include <cmath>
#include <utility>

#include <fmt/format.h>

namespace everstep::policy {
namespace {

std::vector<std::string> Cells(std::string_view line) {
  std::vector<std::string> cells;
  for (;;) {
    const std::size_t comma = line.find(',');
    cells.emplace_back(line.substr(0, comma));
    if (comma == std::string_view::npos) return cells;
    line.remove_prefix(comma + 1);
  }
}

}  // namespace

std::optional<std::size_t> TextTable::Column(std::string_view name) const {
  for (std::size_t i = 0; i < columns.size(); ++i) {
    if (columns[i] == name) return i;
  }
  return std::nullopt;
}

planner::Answer<TextTable> ParseTable(std::string_view text) {
  if (text.size() > kMaxTableBytes) {
    return planner::Refusal{fmt::format("a table of {} bytes", text.size()),
                            fmt::format("at most {}", kMaxTableBytes)};
  }
  TextTable table;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.empty() || line[0] == '#') continue;
    std::vector<std::string> cells = Cells(line);
    if (table.columns.empty()) {
      table.columns = std::move(cells);
    } else if (cells.size() != table.columns.size()) {
      return planner::Refusal{fmt::format("line {} has {} columns", number, cells.size()),
                              fmt::format("{}, as the first line", table.columns.size())};
    } else {
      table.rows.push_back(std::move(cells));
    }
  }
  return table;
}

std::optional<double> ParseNumber(std::string_view text) {
  double value = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || rest != text.data() + text.size() || !std::isfinite(value) ||
      value < 0) {
    return std::nullopt;
  }
  return value;
}

}  // namespace everstep::policy
