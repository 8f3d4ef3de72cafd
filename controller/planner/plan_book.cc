#include "controller/planner/plan_book.h"

#include <algorithm>
#include <utility>

#include "proto/base/check.h"

namespace everstep::planner {
namespace {

// FNV-1a over whole numbers.
class Hash {
 public:
  explicit Hash(std::uint64_t seed) : value_(seed) {}
  void Add(std::uint64_t number) {
    for (int i = 0; i < 8; ++i) {
      value_ = (value_ ^ ((number >> (8 * i)) & 0xFF)) * 0x100000001B3ULL;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_;
};

}  // namespace

BookEntry PlanOfLoss(Composer* composer, const BookInput& input, NodeId lost, bool replaced) {
  ReplanInput change{.lost = {lost},
                     .joined = {},
                     .horizon_ns = input.horizon_ns,
                     .loss_gap_ns = input.loss_gap_ns};
  if (replaced) {
    EVERSTEP_CHECK(input.newcomer.has_value());
    change.joined.push_back(*input.newcomer);
  }
  BookEntry out{.plan = Replan(composer, input.now, change), .paced = {}};
  if (input.paces.empty() || !out.plan.ok()) return out;
  std::vector<NodePace> paces = input.paces;
  std::erase_if(paces, [lost](const NodePace& pace) { return pace.node == lost; });
  out.paced = PlanForPaces(composer, out.plan.value().seated, paces, input.horizon_ns);
  return out;
}

std::uint64_t BookFingerprint(const Library& library, const BookInput& input) {
  Hash hash(library.fingerprint);
  const Composition& composition = input.now.composition;
  hash.Add(composition.microbatches);
  for (std::size_t i = 0; i < input.now.nodes.size(); ++i) {
    hash.Add(composition.pipelines[i].form);
    for (const NodeId node : input.now.nodes[i]) hash.Add(node);
  }
  hash.Add(static_cast<std::uint64_t>(input.horizon_ns));
  hash.Add(static_cast<std::uint64_t>(input.loss_gap_ns));
  hash.Add(input.paces.size());
  for (const NodePace& pace : input.paces) {
    hash.Add(pace.node);
    hash.Add(pace.permille);
  }
  hash.Add(input.newcomer ? std::uint64_t{1} << 32 | *input.newcomer : 0);
  return hash.value();
}

PlanBook::PlanBook(const Library& library, BookInput input)
    : input_(std::move(input)), fingerprint_(BookFingerprint(library, input_)), composer_(library) {
  for (const auto& pipeline : input_.now.nodes) {
    nodes_.insert(nodes_.end(), pipeline.begin(), pipeline.end());
  }
  std::sort(nodes_.begin(), nodes_.end());
  EVERSTEP_CHECK(nodes_.size() <= kMaxBookNodes);
  EVERSTEP_CHECK(std::adjacent_find(nodes_.begin(), nodes_.end()) == nodes_.end());
  entries_.resize(nodes_.size() * (input_.newcomer ? 2 : 1), {.plan = Refusal{}, .paced = {}});
}

bool PlanBook::MakeNext() {
  const std::size_t at = made_.load(std::memory_order_relaxed);
  if (at == entries_.size()) return false;
  const bool replaced = at >= nodes_.size();
  entries_[at] = PlanOfLoss(&composer_, input_, nodes_[at % nodes_.size()], replaced);
  made_.store(at + 1, std::memory_order_release);
  return true;
}

const BookEntry* PlanBook::Find(std::uint64_t fingerprint, NodeId lost, bool replaced) const {
  if (fingerprint != fingerprint_ || (replaced && !input_.newcomer)) return nullptr;
  const auto found = std::lower_bound(nodes_.begin(), nodes_.end(), lost);
  if (found == nodes_.end() || *found != lost) return nullptr;
  const auto at = static_cast<std::size_t>(found - nodes_.begin()) + (replaced ? nodes_.size() : 0);
  return at < made() ? &entries_[at] : nullptr;
}

}  // namespace everstep::planner
