#include "controller/planner/best_sum.h"

#include <algorithm>
#include <map>
#include <utility>

#include "proto/base/check.h"

namespace everstep::planner {
namespace {

constexpr std::int64_t kNone = -1;

// Two neighbours on the concave hull with total / q between them.
struct Support {
  bool any = false;
  Item left, right;  // the same where the hull is one point

  std::int64_t run() const { return right.size == left.size ? 1 : right.size - left.size; }
  std::int64_t rise() const { return right.value - left.value; }
  // How far below the line an item is, in 1/run.
  std::int64_t Gap(const Item& item) const {
    return (left.value - item.value) * run() +
           rise() * (static_cast<std::int64_t>(item.size) - left.size);
  }
  // How far q items on the line are above the goal, in 1/run.
  std::int64_t Slack(std::uint32_t q, std::uint32_t total, std::int64_t goal) const {
    return (static_cast<std::int64_t>(q) * left.value - goal) * run() +
           rise() * (static_cast<std::int64_t>(total) - static_cast<std::int64_t>(q) * left.size);
  }
};

Support SupportOf(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total) {
  Support out;
  if (items.empty() || std::uint64_t{items.front().size} * q > total ||
      std::uint64_t{items.back().size} * q < total) {
    return out;
  }
  // The upper hull, as a stack of indexes.
  std::vector<const Item*> hull;
  hull.reserve(items.size());
  for (const Item& item : items) {
    while (hull.size() >= 2) {
      const Item& a = *hull[hull.size() - 2];
      const Item& b = *hull.back();
      const std::int64_t above =
          (b.value - a.value) * (item.size - a.size) - (item.value - a.value) * (b.size - a.size);
      if (above > 0) break;
      hull.pop_back();
    }
    hull.push_back(&item);
  }
  std::size_t at = 0;
  while (at + 1 < hull.size() && std::uint64_t{hull[at + 1]->size} * q < total) ++at;
  out.any = true;
  out.left = *hull[at];
  out.right = at + 1 < hull.size() ? *hull[at + 1] : *hull[at];
  return out;
}

// The best sums of `count` items, for totals of a window.
struct Sums {
  std::uint32_t count = 0;
  std::int64_t first = 0;             // the window's first total
  std::vector<std::int64_t> best;     // kNone: no such items
  std::vector<std::int64_t> of_left;  // the total of the first half of the items

  std::int64_t At(std::int64_t total) const {
    const std::int64_t i = total - first;
    return i < 0 || i >= static_cast<std::int64_t>(best.size()) ? kNone
                                                                : best[static_cast<std::size_t>(i)];
  }
};

// Sums of counts q, and of the halves that lead there.
class Doubling {
 public:
  Doubling(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total)
      : items_(items), q_(q), total_(total) {
    range_ = items.back().size - items.front().size;
    Make(q);
  }

  std::int64_t Best() const { return sums_.at(q_).At(total_); }

  void Trace(std::uint32_t count, std::int64_t total, std::vector<std::uint32_t>* sizes) const {
    if (count == 1) {
      sizes->push_back(static_cast<std::uint32_t>(total));
      return;
    }
    const Sums& sums = sums_.at(count);
    const std::int64_t left = sums.of_left[static_cast<std::size_t>(total - sums.first)];
    Trace(count / 2, left, sizes);
    Trace(count - count / 2, total - left, sizes);
  }

 private:
  const Sums& Make(std::uint32_t count) {
    const auto known = sums_.find(count);
    if (known != sums_.end()) return known->second;
    Sums sums;
    sums.count = count;
    // Within range_ of where `count` of q equal items would be.
    const std::int64_t middle = static_cast<std::int64_t>(count) * total_ / q_;
    sums.first = std::max<std::int64_t>(middle - range_,
                                        static_cast<std::int64_t>(count) * items_.front().size);
    const std::int64_t last = std::min<std::int64_t>(
        middle + 1 + range_, static_cast<std::int64_t>(count) * items_.back().size);
    sums.best.assign(static_cast<std::size_t>(std::max<std::int64_t>(0, last - sums.first + 1)),
                     kNone);
    if (count == 1) {
      for (const Item& item : items_) {
        const std::int64_t i = item.size - sums.first;
        if (i >= 0 && item.size <= last) sums.best[static_cast<std::size_t>(i)] = item.value;
      }
    } else {
      const Sums& left = Make(count / 2);
      const Sums& right = Make(count - count / 2);
      sums.of_left.assign(sums.best.size(), 0);
      for (std::size_t i = 0; i < left.best.size(); ++i) {
        if (left.best[i] == kNone) continue;
        const std::int64_t of_left = left.first + static_cast<std::int64_t>(i);
        const std::int64_t from = std::max(sums.first, of_left + right.first);
        const std::int64_t to = std::min(
            last, of_left + right.first + static_cast<std::int64_t>(right.best.size()) - 1);
        for (std::int64_t total = from; total <= to; ++total) {
          const std::int64_t more =
              right.best[static_cast<std::size_t>(total - of_left - right.first)];
          if (more == kNone) continue;
          const auto at = static_cast<std::size_t>(total - sums.first);
          if (left.best[i] + more > sums.best[at]) {
            sums.best[at] = left.best[i] + more;
            sums.of_left[at] = of_left;
          }
        }
      }
    }
    return sums_.emplace(count, std::move(sums)).first->second;
  }

  const std::vector<Item>& items_;
  const std::uint32_t q_;
  const std::int64_t total_;
  std::int64_t range_ = 0;
  std::map<std::uint32_t, Sums> sums_;  // by count; references stay valid
};

}  // namespace

bool MayReach(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total,
              std::int64_t goal) {
  const Support support = SupportOf(items, q, total);
  return support.any && support.Slack(q, total, goal) >= 0;
}

bool Reaches(const std::vector<Item>& items, std::uint32_t q, std::uint32_t total,
             std::int64_t goal, std::vector<std::uint32_t>* sizes) {
  const Support support = SupportOf(items, q, total);
  if (!support.any) return false;
  const std::int64_t slack = support.Slack(q, total, goal);
  if (slack < 0) return false;
  // Both ends of the hull's edge alone, where they sum to it.
  const std::int64_t over =
      static_cast<std::int64_t>(total) - static_cast<std::int64_t>(q) * support.left.size;
  if (over % support.run() == 0) {
    if (sizes != nullptr) {
      const auto of_right = static_cast<std::size_t>(over / support.run());
      sizes->assign(q - of_right, support.left.size);
      sizes->insert(sizes->end(), of_right, support.right.size);
    }
    return true;
  }
  std::vector<Item> left;
  left.reserve(items.size());
  for (const Item& item : items) {
    if (support.Gap(item) <= slack) left.push_back(item);
  }
  EVERSTEP_CHECK(!left.empty(), "the ends of a hull's edge lie on it");
  const Doubling sums(left, q, total);
  if (sums.Best() < goal) return false;
  if (sizes != nullptr) {
    sizes->clear();
    sums.Trace(q, total, sizes);
  }
  return true;
}

}  // namespace everstep::planner
