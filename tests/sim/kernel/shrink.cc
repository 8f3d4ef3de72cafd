#include "tests/sim/kernel/shrink.h"

#include <algorithm>

namespace everstep::sim {

ShrinkResult Shrink(std::vector<Fault> faults,
                    const std::function<bool(const std::vector<Fault>&)>& fails,
                    std::uint32_t max_runs) {
  ShrinkResult result;
  std::size_t chunks = 1;  // 1: first try without any fault at all
  while (!faults.empty()) {
    const std::size_t size = (faults.size() + chunks - 1) / chunks;
    bool reduced = false;
    for (std::size_t from = 0; from < faults.size(); from += size) {
      if (result.runs >= max_runs) {
        result.faults = std::move(faults);
        return result;
      }
      const std::size_t to = std::min(from + size, faults.size());
      std::vector<Fault> rest(faults.begin(), faults.begin() + static_cast<std::ptrdiff_t>(from));
      rest.insert(rest.end(), faults.begin() + static_cast<std::ptrdiff_t>(to), faults.end());
      ++result.runs;
      if (fails(rest)) {
        faults = std::move(rest);
        chunks = std::max<std::size_t>(chunks - 1, std::min<std::size_t>(2, faults.size()));
        chunks = std::max<std::size_t>(chunks, 1);
        reduced = true;
        break;
      }
    }
    if (reduced) continue;
    if (size == 1) break;  // every single fault is needed
    chunks = std::min(chunks * 2, faults.size());
  }
  result.faults = std::move(faults);
  result.minimal = true;
  return result;
}

}  // namespace everstep::sim
