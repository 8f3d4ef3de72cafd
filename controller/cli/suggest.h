// The nearest name for a mistyped one.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace everstep::cli {

// Damerau-Levenshtein distance, optimal string alignment: insert, delete, replace, swap neighbours.
std::size_t EditDistance(std::string_view a, std::string_view b);

// The nearest of `names`, the first of equals: within distance 1 of up to four letters, 2 of more;
// else the shortest that goes on from what was typed ("ok" for "ok-bfea0d"). Empty: none is near,
// or a single letter was typed.
std::string Nearest(std::string_view typed, const std::vector<std::string>& names);

}  // namespace everstep::cli
