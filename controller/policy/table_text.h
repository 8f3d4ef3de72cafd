// Tables in text, as models' figures are kept: a header that names the columns, commas between
// them. Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "controller/planner/answer.h"

namespace everstep::policy {

inline constexpr std::size_t kMaxTableBytes = std::size_t{1} << 20;

struct TextTable {
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> rows;  // each as wide as the columns

  // Nothing: no column of that name.
  std::optional<std::size_t> Column(std::string_view name) const;
};

// A refusal names the line. Empty lines and those that begin with '#' are left out.
planner::Answer<TextTable> ParseTable(std::string_view text);

// A finite number of at least 0, no more and no less. Nothing: it is none.
std::optional<double> ParseNumber(std::string_view text);

}  // namespace everstep::policy
