// The fewest host sets for nodes that each hold exactly m copies.
//
// Nodes that share a host set S are a block of c nodes of S; the other m - c members of S belong to
// other blocks. A node of block j holds c_j copies of its own block and c_i of each block i that
// has borrowed it, m in all. So a placement is: sizes c_1 >= ... >= c_q with sum N, and for each
// node the blocks that borrow it, of sizes that sum to m - c_j, each block i borrowing m - c_i
// nodes. All of these are looked at, fewest blocks first.
#include <algorithm>

#include "checkpoint/core/placement.h"
#include "proto/base/check.h"

namespace everstep::checkpoint {
namespace {

class BlockSearch {
 public:
  BlockSearch(std::uint32_t nodes, std::uint32_t m, std::uint32_t budget)
      : nodes_(nodes), m_(m), budget_(budget) {}

  bool Run() {
    for (std::uint32_t q = (nodes_ + m_ - 1) / m_; q <= nodes_ && q <= 32; ++q) {
      sizes_.clear();
      if (Partition(nodes_, q, m_)) return true;
      if (budget_ == 0) return false;
    }
    return false;
  }

  std::vector<std::vector<std::uint32_t>> Hosts() const {
    std::vector<std::vector<std::uint32_t>> of_block(sizes_.size());
    for (std::uint32_t v = 0; v < nodes_; ++v) {
      of_block[block_[v]].push_back(v);
      for (std::uint32_t i = 0; i < sizes_.size(); ++i) {
        if ((borrowed_[v] >> i & 1U) != 0) of_block[i].push_back(v);
      }
    }
    std::vector<std::vector<std::uint32_t>> hosts(nodes_);
    for (std::uint32_t v = 0; v < nodes_; ++v) hosts[v] = of_block[block_[v]];
    return hosts;
  }

 private:
  // The rest of the sizes, none larger than `most`, largest first.
  bool Partition(std::uint32_t rest, std::uint32_t parts, std::uint32_t most) {
    if (parts == 0) return rest == 0 && Feasible();
    if (rest < parts) return false;
    for (std::uint32_t c = std::min(most, rest - parts + 1); c > 0 && c * parts >= rest; --c) {
      sizes_.push_back(c);
      if (Partition(rest - c, parts - 1, c)) return true;
      sizes_.pop_back();
      if (budget_ == 0) return false;
    }
    return false;
  }

  bool Feasible() {
    const auto q = static_cast<std::uint32_t>(sizes_.size());
    choices_.assign(q, {});
    need_.resize(q);
    block_.clear();
    for (std::uint32_t j = 0; j < q; ++j) {
      need_[j] = m_ - sizes_[j];
      Subsets(j, 0, m_ - sizes_[j], 0);
      if (choices_[j].empty()) return false;
      block_.insert(block_.end(), sizes_[j], j);
    }
    borrowed_.assign(nodes_, 0);
    return Assign(0, 0);
  }

  // Sets of blocks but j whose sizes sum to `sum`.
  void Subsets(std::uint32_t j, std::uint32_t i, std::uint32_t sum, std::uint32_t mask) {
    if (sum == 0) {
      choices_[j].push_back(mask);
      return;
    }
    if (i == sizes_.size() || budget_ == 0) return;
    --budget_;
    if (i != j && sizes_[i] <= sum) Subsets(j, i + 1, sum - sizes_[i], mask | 1U << i);
    Subsets(j, i + 1, sum, mask);
  }

  // Nodes of a block are alike, so they take their choices in order.
  bool Assign(std::uint32_t v, std::size_t from) {
    if (v == nodes_) return std::all_of(need_.begin(), need_.end(), [](auto n) { return n == 0; });
    if (budget_ == 0) return false;
    --budget_;
    const std::vector<std::uint32_t>& choices = choices_[block_[v]];
    for (std::size_t c = from; c < choices.size(); ++c) {
      if (!Take(choices[c])) continue;
      borrowed_[v] = choices[c];
      const bool same = v + 1 < nodes_ && block_[v + 1] == block_[v];
      if (Assign(v + 1, same ? c : 0)) return true;
      Give(choices[c]);
    }
    return false;
  }
  bool Take(std::uint32_t mask) {
    for (std::uint32_t i = 0; i < need_.size(); ++i) {
      if ((mask >> i & 1U) != 0 && need_[i] == 0) return false;
    }
    for (std::uint32_t i = 0; i < need_.size(); ++i) need_[i] -= mask >> i & 1U;
    return true;
  }
  void Give(std::uint32_t mask) {
    for (std::uint32_t i = 0; i < need_.size(); ++i) need_[i] += mask >> i & 1U;
  }

  const std::uint32_t nodes_, m_;
  std::uint32_t budget_;
  std::vector<std::uint32_t> sizes_, need_, block_, borrowed_;
  std::vector<std::vector<std::uint32_t>> choices_;
};

}  // namespace

std::vector<std::vector<std::uint32_t>> FewestHostSets(std::uint32_t nodes, std::uint32_t m,
                                                       std::uint32_t budget) {
  EVERSTEP_CHECK(m >= 1 && m <= nodes);
  BlockSearch search(nodes, m, budget);
  if (!search.Run()) return {};
  auto hosts = search.Hosts();
  for (auto& set : hosts) std::sort(set.begin(), set.end());
  return hosts;
}

}  // namespace everstep::checkpoint
