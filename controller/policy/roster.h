// The nodes of a job whose policy counts them only: as many work as its curve is fastest with, in
// the order in which they came; the rest are spares. Pure; not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "controller/policy/model.h"
#include "controller/policy/trace.h"

namespace everstep::policy {

class Roster {
 public:
  void Join(const std::vector<NodeId>& nodes) {
    spares_.insert(spares_.end(), nodes.begin(), nodes.end());
  }
  // Takes them out; the places of those that worked, ascending.
  std::vector<std::size_t> Lose(const std::vector<NodeId>& nodes) {
    std::vector<std::size_t> places;
    for (std::size_t place = 0; place < active_.size(); ++place) {
      if (Has(nodes, active_[place])) places.push_back(place);
    }
    for (std::vector<NodeId>* list : {&active_, &spares_}) {
      list->erase(
          std::remove_if(list->begin(), list->end(), [&](NodeId node) { return Has(nodes, node); }),
          list->end());
    }
    return places;
  }
  // Those of them that work.
  std::vector<NodeId> WorkingOf(const std::vector<NodeId>& nodes) const {
    std::vector<NodeId> working;
    std::copy_if(nodes.begin(), nodes.end(), std::back_inserter(working),
                 [this](NodeId node) { return Has(active_, node); });
    return working;
  }
  // Takes spares in, or puts the last ones out, until `count` work. REQUIRES count <= all().
  void Use(std::uint32_t count) {
    while (active_.size() > count) {
      spares_.insert(spares_.begin(), active_.back());
      active_.pop_back();
    }
    const auto more = static_cast<std::ptrdiff_t>(count - active_.size());
    active_.insert(active_.end(), spares_.begin(), spares_.begin() + more);
    spares_.erase(spares_.begin(), spares_.begin() + more);
  }

  std::uint32_t active() const { return static_cast<std::uint32_t>(active_.size()); }
  std::uint32_t all() const { return active() + static_cast<std::uint32_t>(spares_.size()); }

 private:
  static bool Has(const std::vector<NodeId>& nodes, NodeId node) {
    return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
  }

  std::vector<NodeId> active_, spares_;
};

}  // namespace everstep::policy
