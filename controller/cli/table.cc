#include "controller/cli/table.h"

#include <algorithm>
#include <utility>

#include "controller/cli/units.h"

namespace everstep::cli {
namespace {

std::string Clean(std::string text) {
  for (char& c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (u < 0x20 || u == 0x7f) c = '?';
  }
  return OrDash(text);
}

std::string Cut(const std::string& line, std::size_t width) {
  if (width < 4 || DisplayWidth(line) <= width) return line;
  std::size_t kept = 0;
  std::size_t i = 0;
  while (i < line.size() && kept < width - 3) {
    ++i;
    while (i < line.size() && (static_cast<unsigned char>(line[i]) & 0xC0) == 0x80) ++i;
    ++kept;
  }
  return line.substr(0, i) + "...";
}

}  // namespace

std::size_t DisplayWidth(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

void Table::Add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  for (std::string& cell : cells) cell = Clean(std::move(cell));
  rows_.push_back(std::move(cells));
}

std::string Table::Format(bool headers, std::size_t max_width) const {
  std::vector<std::size_t> widths(columns_.size(), 0);
  std::vector<std::string> names;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    names.push_back(columns_[c].header);
    if (headers) widths[c] = DisplayWidth(columns_[c].header);
    for (const auto& row : rows_) widths[c] = std::max(widths[c], DisplayWidth(row[c]));
  }
  std::string out;
  const auto add = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (std::size_t c = 0; c < cells.size(); ++c) {
      if (c > 0) line += "  ";
      const std::string padding(widths[c] - DisplayWidth(cells[c]), ' ');
      line += columns_[c].align == Align::kRight ? padding + cells[c] : cells[c] + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += Cut(line, max_width) + "\n";
  };
  if (headers) add(names);
  for (const auto& row : rows_) add(row);
  return out;
}

std::string FormatPairs(const std::vector<std::pair<std::string, std::string>>& pairs) {
  std::size_t width = 0;
  for (const auto& pair : pairs) width = std::max(width, DisplayWidth(pair.first));
  std::string out;
  for (const auto& pair : pairs) {
    out += pair.first + ":" + std::string(width - DisplayWidth(pair.first) + 2, ' ') +
           Clean(pair.second) + "\n";
  }
  return out;
}

}  // namespace everstep::cli
