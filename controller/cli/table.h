// A table as the CLI prints it: upper-case headers, two spaces between columns, no box art, "-" for
// what is empty, no trailing spaces.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace everstep::cli {

enum class Align { kLeft, kRight };

// Not thread-safe.
class Table {
 public:
  struct Column {
    std::string header;
    Align align = Align::kLeft;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // Cells beyond the columns are dropped, missing ones are "-". Control characters are shown as
  // '?'.
  void Add(std::vector<std::string> cells);

  std::size_t rows() const { return rows_.size(); }

  // max_width: columns of the terminal, lines are cut there with "..."; 0: no limit (not a
  // terminal).
  std::string Format(bool headers = true, std::size_t max_width = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

// Columns of a terminal that `text` takes, one per code point.
std::size_t DisplayWidth(std::string_view text);

// "KEY:   value" lines with the values in one column, keys padded to the longest.
std::string FormatPairs(const std::vector<std::pair<std::string, std::string>>& pairs);

}  // namespace everstep::cli
