#include "checkpoint/core/swarm.h"

#include <algorithm>
#include <bit>

namespace everstep::checkpoint {
namespace {

// To how many others each passes the shard on.
std::size_t FanOut(std::uint64_t chunks, std::size_t takers) {
  const auto depth = static_cast<std::uint64_t>(std::bit_width(takers));  // ceil(log2(takers + 1))
  return chunks + takers - 1 <= 2 * (chunks + depth - 1) ? 1 : 2;
}

}  // namespace

std::vector<SwarmSource> PlanSwarm(std::size_t takers, std::uint64_t bytes,
                                   std::vector<std::uint64_t>* sent) {
  std::vector<SwarmSource> sources(takers);
  if (takers == 0) return sources;
  // A holder that sends a whole shard more than another is the slower start.
  std::vector<std::size_t> first;
  const std::uint64_t least = *std::min_element(sent->begin(), sent->end());
  for (std::size_t i = 0; i < sent->size(); ++i) {
    if ((*sent)[i] == least || (*sent)[i] - least < bytes) first.push_back(i);
  }
  std::stable_sort(first.begin(), first.end(),
                   [sent](std::size_t a, std::size_t b) { return (*sent)[a] < (*sent)[b]; });
  first.resize(std::min(first.size(), takers));
  const std::size_t lines = first.size();
  const std::size_t out =
      FanOut((bytes + kPassedOnBytes - 1) / kPassedOnBytes, (takers + lines - 1) / lines);
  for (std::size_t i = 0; i < takers; ++i) {
    SwarmSource& source = sources[i];
    const std::size_t place = i / lines;  // in its chain or tree
    source.holder = first[i % lines];
    if (place == 0) {
      (*sent)[source.holder] += bytes;
      continue;
    }
    source.taker = (place - 1) / out * lines + i % lines;
    source.depth = sources[source.taker].depth + 1;
  }
  return sources;
}

}  // namespace everstep::checkpoint
