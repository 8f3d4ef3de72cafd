// The plans for every single loss, made while nothing is lost: at a loss the plan is looked up.
//
//   entry of node n           Replan(lost = {n})
//   and, with a newcomer,     Replan(lost = {n}, joined = {newcomer}): a spare, a worker that is
//                             started again
//   and, with speeds,         PlanForPaces of what is left, at the speeds of those who are left
//
// An entry is what those answer, a refusal too; a loss that Replan would be told more about (what
// of the step under way is done, two losses at once) is no entry's. What losses have in common, the
// compositions, is computed once for all of them: that is most of the work.
//
// A book is of one plan: of its library, seats, prices and speeds. Its fingerprint is of all of
// those, and who looks up says the fingerprint of the plan that a node was lost from, so a stale
// book answers nothing.
//
// Pure and deterministic. One thread may make entries while others look them up.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "controller/planner/pace.h"
#include "controller/planner/replan.h"

namespace everstep::planner {

// Of a plan with a book: 30 MiB and 10 s of a core.
inline constexpr std::uint32_t kMaxBookNodes = 1024;

struct BookInput {
  Seated now;
  std::int64_t horizon_ns = 0, loss_gap_ns = 0;  // as ReplanInput has them
  std::vector<NodePace> paces;                   // none: everybody at the usual speed
  std::optional<NodeId> newcomer;                // who would take a lost node's place
};

struct BookEntry {
  Answer<Replanned> plan;
  std::optional<Answer<PacedChoice>> paced;  // of plan's seats; where there are speeds and a plan
};

// What one entry is, made without a book.
BookEntry PlanOfLoss(Composer* composer, const BookInput& input, NodeId lost, bool replaced);

// Of the library's profile and fleet, the seats, prices, speeds and newcomer.
std::uint64_t BookFingerprint(const Library& library, const BookInput& input);

class PlanBook {
 public:
  // `library` must outlive it. REQUIRES kMaxBookNodes seats at most, each node once.
  PlanBook(const Library& library, BookInput input);
  PlanBook(const PlanBook&) = delete;
  PlanBook& operator=(const PlanBook&) = delete;

  std::uint64_t fingerprint() const { return fingerprint_; }
  std::optional<NodeId> newcomer() const { return input_.newcomer; }
  std::size_t size() const { return entries_.size(); }  // once it is whole
  std::size_t made() const { return made_.load(std::memory_order_acquire); }

  // Makes the next entry: every loss first, then every replacement. False: it is whole.
  bool MakeNext();

  // Null: a book of another plan, a node without a seat, or an entry that is not made yet.
  const BookEntry* Find(std::uint64_t fingerprint, NodeId lost, bool replaced = false) const;

 private:
  const BookInput input_;
  const std::uint64_t fingerprint_;
  Composer composer_;
  std::vector<NodeId> nodes_;         // ascending
  std::vector<BookEntry> entries_;    // by nodes_; then replaced, by nodes_
  std::atomic<std::size_t> made_{0};  // of entries_
};

}  // namespace everstep::planner
