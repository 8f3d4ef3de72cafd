// The nearest name for a mistyped one.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace everstep::cli {

// Damerau-Levenshtein distance, optimal string alignment: insert, delete, replace, swap neighbours.
std::size_t EditDistance(std::string_view a, std::string_view b);

// The nearest of `names` within distance 2 (and less than the typed length), the first of equals;
// empty: none is near.
std::string Nearest(std::string_view typed, const std::vector<std::string>& names);

}  // namespace everstep::cli
