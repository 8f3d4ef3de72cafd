#include "controller/planner/partition.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "controller/planner/stage_rules.h"
#include "proto/base/check.h"

namespace everstep::planner {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 4;

std::int64_t CeilDiv(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// How far stages before the slowest reach, and from where those after it do, for one W.
struct Reach {
  std::int64_t w = 0;
  std::vector<std::uint32_t> ends;    // [i]: the last boundary that stages 0..i-1 reach, each <= W
  std::vector<std::uint32_t> starts;  // [j]: the first from which stages j..S-1 reach the end, < W
  // Layers too long for any stage but the first (<= W) or the last (< W): the last such layer + 1
  // before each boundary, the first at or after it.
  std::vector<std::uint32_t> too_long_before, too_long_after;
};

// A layer range that may be the slowest stage, with the T it then makes.
struct Candidate {
  std::int64_t t = 0;
  std::int64_t w = 0;
  std::uint32_t k = 0, first = 0, end = 0;
};

// Transfers cost the same at every boundary, so a stage's time depends on its place by a constant
// and grows with its layers: a greedy pass tells what can be reached.
class Greedy {
 public:
  explicit Greedy(const StageRules& rules)
      : r_(rules), stages_(rules.stages()), layers_(rules.layers()), toll_(stages_) {
    for (std::uint32_t i = 0; i < stages_; ++i) {
      toll_[i] = r_.Edge(i, 1) + r_.Edge(i + 1, 1);
      tolls_ += toll_[i];
      most_toll_ = std::max(most_toll_, toll_[i]);
    }
    least_toll_ = *std::min_element(toll_.begin(), toll_.end());
    inner_toll_ = stages_ > 2 ? toll_[1] : most_toll_;
    even_ = std::all_of(toll_.begin(), toll_.end(),
                        [this](std::int64_t t) { return t == inner_toll_; }) ||
            (stages_ > 2 && std::all_of(toll_.begin() + 1, toll_.end() - 1,
                                        [this](std::int64_t t) { return t == inner_toll_; }));
    t1_ = r_.costs().time.back() + tolls_;
  }

  // False: the greedy pass cannot tell; ask the tables.
  bool Best(std::optional<Partition>* found) {
    if (!r_.EveryLayerFitsEverywhere()) return false;
    const std::int64_t least = LeastW();
    if (least == kNever) return true;
    if (!even_ && least <= r_.costs().longest_layer + most_toll_) return false;
    std::int64_t most_t = kNever;
    if (const auto cuts = Packed(least)) most_t = Measured(*cuts).TimeNs(4LL * stages_);
    std::vector<Candidate> candidates = Candidates(least, most_t);
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return std::tie(a.t, a.w, a.k, a.first) < std::tie(b.t, b.w, b.k, b.first);
    });
    for (const Candidate& c : candidates) {
      if (!Possible(c)) continue;
      *found = Measured(Cuts(c));
      EVERSTEP_CHECK((*found)->TimeNs(4LL * stages_) == c.t,
                     "a division is not what was looked for");
      break;
    }
    return true;
  }

 private:
  Partition Measured(std::vector<std::uint32_t> cuts) const {
    return Measure(r_.costs(), std::move(cuts));
  }

  // The last boundary that stage i reaches from `a` within `limit`; `a`: none.
  std::uint32_t Far(std::uint32_t i, std::uint32_t a, std::int64_t limit) const {
    const auto& time = r_.costs().time;
    const std::int64_t upto = time[a] + limit - toll_[i];
    const auto past = std::upper_bound(time.begin() + a, time.end(), upto);
    if (past == time.begin() + a) return a;
    auto b = static_cast<std::uint32_t>(past - time.begin()) - 1;
    if (b == a || r_.Fits(i, a, b)) return b;
    for (std::uint32_t low = a; low < b;) {  // low fits, b does not
      const std::uint32_t middle = low + (b - low) / 2;
      if (middle == low) return low;
      (r_.Fits(i, a, middle) ? low : b) = middle;
    }
    return a;
  }
  // The first boundary from which stage i reaches `b` within `limit`; `b`: none.
  std::uint32_t Near(std::uint32_t i, std::uint32_t b, std::int64_t limit) const {
    const auto& time = r_.costs().time;
    const std::int64_t from = time[b] - (limit - toll_[i]);
    auto a = static_cast<std::uint32_t>(std::lower_bound(time.begin(), time.begin() + b, from) -
                                        time.begin());
    if (a == b || r_.Fits(i, a, b)) return a;
    for (std::uint32_t high = b; a < high;) {  // high fits, a does not
      const std::uint32_t middle = a + (high - a) / 2;
      if (middle == a) return high;
      (r_.Fits(i, middle, b) ? high : a) = middle;
    }
    return b;
  }

  // Whether greedy stages reach the end: necessary for a division with every stage <= W.
  bool Reaches(std::int64_t w) const {
    std::uint32_t at = 0;
    for (std::uint32_t i = 0; i < stages_; ++i) at = Far(i, at, w);
    return at == layers_;
  }

  // No division has a smaller W.
  std::int64_t LeastW() const {
    std::int64_t low = std::max(CeilDiv(t1_, stages_), r_.costs().longest_layer + least_toll_);
    if (Reaches(low)) return low;
    std::int64_t high = r_.costs().time.back() + most_toll_;
    if (!Reaches(high)) return kNever;
    for (std::int64_t step = r_.costs().longest_layer / 4 + 1; low + step < high; step *= 2) {
      if (Reaches(low + step)) {
        high = low + step;
        break;
      }
      low += step;
    }
    while (low + 1 < high) {
      const std::int64_t middle = low + (high - low) / 2;
      (Reaches(middle) ? high : low) = middle;
    }
    return high;
  }

  // A division with every stage <= W, where one lies at hand.
  std::optional<std::vector<std::uint32_t>> Packed(std::int64_t w) const {
    std::vector<std::uint32_t> cuts = {0};
    cuts.reserve(stages_ + 1);
    for (std::uint32_t i = 0; i < stages_; ++i) {
      const std::uint32_t at = std::min(Far(i, cuts.back(), w), layers_ - (stages_ - 1 - i));
      if (at <= cuts.back()) return std::nullopt;
      cuts.push_back(at);
    }
    if (cuts.back() != layers_) return std::nullopt;
    return cuts;
  }

  std::vector<Candidate> Candidates(std::int64_t least, std::int64_t most_t) const {
    // T >= 2 T1 + (m - S - 1) W: stages before k take at most W each.
    const std::int64_t m = 4LL * stages_;
    const std::int64_t most = most_t == kNever ? kNever : (most_t - 2 * t1_) / (m - stages_ - 1);
    const auto& time = r_.costs().time;
    const std::int64_t total = time.back();
    std::vector<std::int64_t> tolls_from(stages_ + 1, 0);
    for (std::uint32_t i = stages_; i-- > 0;) tolls_from[i] = tolls_from[i + 1] + toll_[i];
    std::vector<Candidate> out;
    out.reserve(layers_);
    std::uint32_t y_from = 1;
    for (std::uint32_t x = 0; x < layers_; ++x) {
      y_from = std::max(y_from, x + 1);
      while (y_from <= layers_ && time[y_from] - time[x] + most_toll_ < least) ++y_from;
      if (y_from > layers_) break;
      for (std::uint32_t y = y_from; y <= layers_; ++y) {
        const std::int64_t range = time[y] - time[x];
        if (range + least_toll_ > most) break;
        // Each stage on either side takes at most W, and at least one layer.
        const std::int64_t w_most = range + most_toll_;
        std::int64_t k_low = x == 0 ? 0 : std::max<std::int64_t>(1, CeilDiv(time[x], w_most));
        std::int64_t k_high = std::min<std::int64_t>(
            x, y == layers_
                   ? stages_ - 1
                   : stages_ - 1 - std::max<std::int64_t>(1, CeilDiv(total - time[y], w_most)));
        k_low =
            std::max<std::int64_t>(k_low, static_cast<std::int64_t>(stages_) - 1 - (layers_ - y));
        if (x == 0) k_high = std::min<std::int64_t>(k_high, 0);
        if (y == layers_) k_low = std::max<std::int64_t>(k_low, stages_ - 1);
        for (std::int64_t at = k_low; at <= k_high; ++at) {
          const auto k = static_cast<std::uint32_t>(at);
          const std::int64_t w = range + toll_[k];
          if (w < least || !r_.Fits(k, x, y)) continue;
          const std::int64_t t = t1_ + (m - stages_ + k - 1) * w + total - time[x] + tolls_from[k];
          if (t <= most_t) out.push_back({t, w, k, x, y});
        }
      }
    }
    return out;
  }

  const Reach& ReachOf(std::int64_t w) {
    for (const Reach& known : known_) {
      if (known.w == w) return known;
    }
    Reach reach{.w = w, .ends = {0}, .starts = {}, .too_long_before = {}, .too_long_after = {}};
    reach.ends.reserve(stages_ + 1);
    for (std::uint32_t i = 0; i < stages_; ++i) {
      reach.ends.push_back(Far(i, reach.ends.back(), w));
    }
    reach.starts.assign(stages_ + 1, layers_);
    for (std::uint32_t j = stages_; j-- > 0;) {
      reach.starts[j] = Near(j, reach.starts[j + 1], w - 1);
    }
    if (r_.costs().longest_layer + inner_toll_ >= w) {
      reach.too_long_before.assign(layers_ + 1, 0);
      reach.too_long_after.assign(layers_ + 1, layers_ + 1);
      const auto& time = r_.costs().time;
      for (std::uint32_t l = 0; l < layers_; ++l) {
        const bool longer = time[l + 1] - time[l] + inner_toll_ > w;
        reach.too_long_before[l + 1] = longer ? l + 1 : reach.too_long_before[l];
      }
      for (std::uint32_t l = layers_; l-- > 0;) {
        const bool as_long = time[l + 1] - time[l] + inner_toll_ >= w;
        reach.too_long_after[l] = as_long ? l : reach.too_long_after[l + 1];
      }
    }
    known_.push_back(std::move(reach));
    return known_.back();
  }

  // Whether the layers before and after the candidate can be divided among the stages there.
  bool Possible(const Candidate& c) {
    const Reach& reach = ReachOf(c.w);
    const std::uint32_t after = stages_ - 1 - c.k;
    if (c.first > reach.ends[c.k] || c.end < reach.starts[c.k + 1]) return false;
    if (reach.too_long_before.empty()) return true;
    // A layer too long for a stage in the middle lies in the first or the last one.
    const std::uint32_t before = reach.too_long_before[c.first];
    if (before > 0 && c.first < before + c.k - 1) return false;
    const std::uint32_t next = reach.too_long_after[c.end];
    return after == 0 || next > layers_ || c.end + after - 1 <= next;
  }

  std::vector<std::uint32_t> Cuts(const Candidate& c) {
    const Reach& reach = ReachOf(c.w);
    std::vector<std::uint32_t> cuts(stages_ + 1, 0);
    for (std::uint32_t i = 1; i <= c.k; ++i) {
      cuts[i] = std::min(reach.ends[i], c.first - (c.k - i));
    }
    for (std::uint32_t j = c.k + 1; j <= stages_; ++j) {
      cuts[j] = std::max(reach.starts[j], c.end + (j - c.k - 1));
    }
    return cuts;
  }

  const StageRules& r_;
  const std::uint32_t stages_, layers_;
  std::vector<std::int64_t> toll_;  // transfers of stage i
  std::int64_t tolls_ = 0, most_toll_ = 0, least_toll_ = 0, inner_toll_ = 0, t1_ = 0;
  bool even_ = false;  // stages between the first and the last have one toll
  std::vector<Reach> known_;
};

// Any costs: for each W the cheapest divisions of every beginning and every end.
class Tables {
 public:
  explicit Tables(const StageRules& rules)
      : r_(rules), stages_(rules.stages()), layers_(rules.layers()), none_(layers_ + 1, 0) {}

  std::optional<Partition> Best() {
    const std::vector<std::int64_t> ws = EveryW();
    std::int64_t t1 = r_.costs().time.back();
    for (std::uint32_t j = 1; j < stages_; ++j) {
      std::int64_t least = kNever;
      for (std::uint32_t x = 1; x < layers_; ++x) least = std::min(least, r_.Edge(j, x));
      t1 += 2 * least;
    }
    // The first W with any division at all.
    auto low = std::lower_bound(ws.begin(), ws.end(), CeilDiv(t1, stages_));
    low = std::partition_point(low, ws.end(), [this](std::int64_t w) {
      FillBefore(w);
      return before_[At(stages_, layers_)] >= kNever;
    });
    // T >= 2 T1 + (m - S - 1) W. Within the largest W that is left, T1 may have to be larger than
    // the cheapest transfers would make it.
    const std::int64_t m = 4LL * stages_;
    const std::int64_t each = m - stages_ - 1;
    Candidate best{.t = kNever};
    for (auto w = low; w != ws.end() && 2 * t1 + each * *w < best.t; ++w) {
      const std::int64_t before = best.t;
      FillBefore(*w);
      FillAfter(*w);
      Look(*w, &best);
      for (bool tighter = best.t < before; tighter;) {
        FillBefore((best.t - 2 * t1) / each);
        tighter = before_[At(stages_, layers_)] > t1;
        t1 = std::max(t1, before_[At(stages_, layers_)]);
      }
    }
    if (best.t == kNever) return std::nullopt;
    Partition found = Measure(r_.costs(), Cuts(best));
    EVERSTEP_CHECK(found.TimeNs(m) == best.t, "a division is not what was looked for");
    return found;
  }

 private:
  std::size_t At(std::uint32_t stage, std::uint32_t boundary) const {
    return static_cast<std::size_t>(stage) * (layers_ + 1) + boundary;
  }

  // Transfers over each boundary, between stages j - 1 and j.
  const std::int64_t* Edges(std::uint32_t j) const {
    const int kind = r_.EdgeKind(j);
    return (kind == 0 ? none_ : kind == 1 ? r_.costs().inside : r_.costs().between).data();
  }

  std::vector<std::int64_t> EveryW() const {
    std::vector<std::int64_t> ws;
    // Stages whose edges are of the same kind have the same times.
    std::vector<std::pair<int, int>> kinds;
    for (std::uint32_t i = 0; i < stages_; ++i) {
      const std::pair<int, int> kind = {r_.EdgeKind(i), r_.EdgeKind(i + 1)};
      if (std::find(kinds.begin(), kinds.end(), kind) != kinds.end()) continue;
      kinds.push_back(kind);
      for (std::uint32_t a = 0; a < layers_; ++a) {
        for (std::uint32_t b = a + 1; b <= layers_; ++b) ws.push_back(r_.Time(i, a, b));
      }
    }
    std::sort(ws.begin(), ws.end());
    ws.erase(std::unique(ws.begin(), ws.end()), ws.end());
    return ws;
  }

  // before_[i][x]: least sum of w of stages 0..i-1 over layers [0, x), each <= W.
  void FillBefore(std::int64_t w) {
    before_.assign(At(stages_ + 1, 0), kNever);
    before_[At(0, 0)] = 0;
    const std::int64_t* const sums = r_.costs().time.data();
    for (std::uint32_t i = 0; i < stages_; ++i) {
      const std::int64_t* const right = Edges(i + 1);
      for (std::uint32_t a = i; a + (stages_ - i) <= layers_; ++a) {
        const std::int64_t sum = before_[At(i, a)];
        if (sum >= kNever) continue;
        const std::int64_t from = r_.Edge(i, a) - sums[a];
        for (std::uint32_t b = a + 1; b <= layers_ && from + sums[b] <= w; ++b) {
          const std::int64_t time = from + sums[b] + right[b];
          if (time > w || !r_.Fits(i, a, b)) continue;
          std::int64_t& to = before_[At(i + 1, b)];
          to = std::min(to, sum + time);
        }
      }
    }
  }
  // after_[j][y]: least sum of w of stages j..S-1 over layers [y, L), each < W.
  void FillAfter(std::int64_t w) {
    after_.assign(At(stages_ + 1, 0), kNever);
    after_[At(stages_, layers_)] = 0;
    const std::int64_t* const sums = r_.costs().time.data();
    for (std::uint32_t j = stages_; j-- > 0;) {
      const std::int64_t* const left = Edges(j);
      for (std::uint32_t b = layers_ - (stages_ - 1 - j); b > j; --b) {
        const std::int64_t sum = after_[At(j + 1, b)];
        if (sum >= kNever) continue;
        const std::int64_t upto = r_.Edge(j + 1, b) + sums[b];
        for (std::uint32_t a = b; a-- > j && upto - sums[a] < w;) {
          const std::int64_t time = upto - sums[a] + left[a];
          if (time >= w || !r_.Fits(j, a, b)) continue;
          std::int64_t& to = after_[At(j, a)];
          to = std::min(to, sum + time);
        }
      }
    }
  }

  void Look(std::int64_t w, Candidate* best) const {
    const std::int64_t m = 4LL * stages_;
    for (std::uint32_t k = 0; k < stages_; ++k) {
      for (std::uint32_t x = k; x < layers_; ++x) {
        const std::int64_t before = before_[At(k, x)];
        if (before >= kNever) continue;
        for (std::uint32_t y = x + 1; y <= layers_ && r_.Plain(x, y) <= w; ++y) {
          const std::int64_t after = after_[At(k + 1, y)];
          if (after >= kNever || r_.Time(k, x, y) != w || !r_.Fits(k, x, y)) continue;
          const std::int64_t t = before + 2 * (w + after) + (m - stages_ + k - 1) * w;
          if (std::tie(t, w, k, x) < std::tie(best->t, best->w, best->k, best->first)) {
            *best = {t, w, k, x, y};
          }
        }
      }
    }
  }

  // Follows the sums back to the divisions that made them.
  std::vector<std::uint32_t> Cuts(const Candidate& c) {
    FillBefore(c.w);
    FillAfter(c.w);
    std::vector<std::uint32_t> cuts(stages_ + 1, 0);
    cuts[c.k] = c.first;
    cuts[c.k + 1] = c.end;
    for (std::uint32_t i = c.k; i-- > 0;) {
      for (std::uint32_t a = cuts[i + 1]; a-- > 0;) {
        const std::int64_t time = r_.Time(i, a, cuts[i + 1]);
        if (before_[At(i, a)] >= kNever || time > c.w || !r_.Fits(i, a, cuts[i + 1]) ||
            before_[At(i, a)] + time != before_[At(i + 1, cuts[i + 1])]) {
          continue;
        }
        cuts[i] = a;
        break;
      }
    }
    for (std::uint32_t j = c.k + 1; j < stages_; ++j) {
      for (std::uint32_t b = cuts[j] + 1; b <= layers_; ++b) {
        const std::int64_t time = r_.Time(j, cuts[j], b);
        if (after_[At(j + 1, b)] >= kNever || time >= c.w || !r_.Fits(j, cuts[j], b) ||
            after_[At(j + 1, b)] + time != after_[At(j, cuts[j])]) {
          continue;
        }
        cuts[j + 1] = b;
        break;
      }
    }
    return cuts;
  }

  const StageRules& r_;
  const std::uint32_t stages_, layers_;
  const std::vector<std::int64_t> none_;
  std::vector<std::int64_t> before_, after_;
};

// Moves boundaries where that shortens the longer of two neighbours and costs nothing: T stays, but
// a stage almost as slow as the slowest delays a real pipeline. The slowest stage stays as it is.
void EvenOut(const StageRules& r, Partition* p) {
  const std::int64_t t = p->TimeNs(4LL * r.stages());
  std::uint32_t budget = 4 * r.layers();
  for (bool progress = true; progress && budget > 0;) {
    progress = false;
    for (std::uint32_t j = 1; j < r.stages(); ++j) {
      if (j == p->slowest || j == p->slowest + 1) continue;
      const std::uint32_t from = p->cuts[j - 1], to = p->cuts[j + 1];
      const std::int64_t left = r.Time(j - 1, from, p->cuts[j]), right = r.Time(j, p->cuts[j], to);
      const std::uint32_t at = left > right ? p->cuts[j] - 1 : p->cuts[j] + 1;
      if (at == from || at == to || !r.Fits(j - 1, from, at) || !r.Fits(j, at, to) ||
          std::max(r.Time(j - 1, from, at), r.Time(j, at, to)) >= std::max(left, right)) {
        continue;
      }
      std::vector<std::uint32_t> cuts = p->cuts;
      cuts[j] = at;
      Partition moved = Measure(r.costs(), std::move(cuts));
      if (moved.TimeNs(4LL * r.stages()) > t) continue;
      *p = std::move(moved);
      progress = --budget > 0;
    }
  }
}

}  // namespace

std::optional<Partition> BestPartition(const ShapeCosts& costs, const PartitionInput& input) {
  if (input.stages == 0 || input.stages > costs.layers()) return std::nullopt;
  const StageRules rules(costs, input);
  std::optional<Partition> found;
  if (!costs.uniform || input.by_tables || !Greedy(rules).Best(&found)) {
    found = Tables(rules).Best();
  }
  if (found) EvenOut(rules, &*found);
  return found;
}

}  // namespace everstep::planner
