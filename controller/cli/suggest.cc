#include "controller/cli/suggest.h"

#include <algorithm>

namespace everstep::cli {

std::size_t EditDistance(std::string_view a, std::string_view b) {
  const std::size_t width = b.size() + 1;
  std::vector<std::size_t> d((a.size() + 1) * width);
  for (std::size_t i = 0; i <= a.size(); ++i) d[i * width] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) d[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      std::size_t best = d[(i - 1) * width + j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      best = std::min({best, d[(i - 1) * width + j] + 1, d[i * width + j - 1] + 1});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        best = std::min(best, d[(i - 2) * width + j - 2] + 1);
      }
      d[i * width + j] = best;
    }
  }
  return d.back();
}

std::string Nearest(std::string_view typed, const std::vector<std::string>& names) {
  if (typed.empty() || typed.size() > 64) return "";
  if (typed.size() < 2) return "";
  std::size_t best = typed.size() <= 4 ? 2 : 3;  // one slip in a short name, two in a long one
  std::string found;
  for (const std::string& name : names) {
    const std::size_t distance = EditDistance(typed, name);
    if (distance < best) {
      best = distance;
      found = name;
    }
  }
  if (!found.empty()) return found;
  for (const std::string& name : names) {
    if (name.starts_with(typed) && (found.empty() || name.size() < found.size())) found = name;
  }
  return found;
}

}  // namespace everstep::cli
