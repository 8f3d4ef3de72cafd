// Nodes that fail together, dealt apart: what placements of copies and of parity groups start from.
// Pure and deterministic.
#pragma once

#include <cstdint>
#include <vector>

namespace everstep::checkpoint {

// Nodes by their domains, widest first: neighbours are what fails together. `levels` and `together`
// as in PlacementInput.
std::vector<std::uint32_t> ByDomain(const std::vector<std::vector<std::uint32_t>>& levels,
                                    const std::vector<std::vector<std::uint32_t>>& together,
                                    const std::vector<std::uint32_t>& nodes);

// Deals nodes to buckets in proportion to their sizes, so that the nodes of a bucket are as far
// apart in `nodes` as can be. By position: bucket after bucket. REQUIRES sizes > 0 that sum to the
// number of nodes.
std::vector<std::uint32_t> Deal(const std::vector<std::uint32_t>& buckets,
                                const std::vector<std::uint32_t>& nodes);

}  // namespace everstep::checkpoint
