// Host sets under change: what a placement costs as nodes trade places. Inside of placement.cc.
#pragma once

#include <compare>
#include <cstdint>
#include <vector>

#include "checkpoint/core/placement.h"

namespace everstep::checkpoint {

// Domains of all kinds under one numbering. Those too small to hold a host set are left out.
struct Domains {
  struct Domain {
    std::uint32_t level = 0, number = 0, nodes = 0;
    // More nodes than the others could hold copies for: its loss alone is fatal, wherever copies
    // lie.
    bool hopeless = false;
  };
  Domains(const PlacementInput& input, std::uint32_t copies, std::uint32_t cap);

  std::vector<Domain> all;                     // by level, then number
  std::vector<std::vector<std::uint32_t>> of;  // by node, ascending
  const std::vector<std::vector<std::uint32_t>>& levels;
};

using HostSets = std::vector<std::vector<std::uint32_t>>;  // by node, each ascending, itself in it

// Compared in this order.
struct Cost {
  std::uint32_t fatal = 0;   // domains, hopeless ones left out, whose loss alone loses state
  std::uint32_t inside = 0;  // pairs of such a domain and a node whose every copy it holds
  std::uint64_t close = 0;   // pairs of one node's copies in one domain of a level
  auto operator<=>(const Cost&) const = default;
};

class Layout {
 public:
  // `domains` must outlive it.
  Layout(const Domains& domains, HostSets hosts);

  const HostSets& hosts() const { return hosts_; }
  const Cost& cost() const { return cost_; }
  std::uint32_t Held(std::uint32_t node) const {
    return static_cast<std::uint32_t>(held_[node].size());
  }
  const std::vector<std::uint32_t>& HeldBy(std::uint32_t node) const { return held_[node]; }
  // Lies within a domain that is not hopeless.
  bool Inside(std::uint32_t node) const;
  // a and b trade places in every host set. Its own inverse.
  void Swap(std::uint32_t a, std::uint32_t b);
  // REQUIRES node in `set`, ascending.
  void Rehost(std::uint32_t node, std::vector<std::uint32_t> set);
  std::vector<FatalDomain> Fatal() const;

 private:
  void Count(std::uint32_t node, bool add);  // its part of the cost, and of held_

  const Domains* domains_;
  HostSets hosts_;
  std::vector<std::vector<std::uint32_t>> held_;  // by node: whose copies, any order
  std::vector<std::uint32_t> inside_;             // by domain: nodes whose every copy it holds
  Cost cost_;
};

std::uint32_t DistinctSets(const HostSets& hosts);

}  // namespace everstep::checkpoint
