#include "controller/planner/pace.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <queue>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "controller/planner/stage_rules.h"
#include "proto/base/check.h"

namespace everstep::planner {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 8;

// What stages cost whose nodes have paces.
class PacedRules {
 public:
  // All must outlive it.
  PacedRules(const ShapeCosts& costs, const PartitionInput& input,
             const std::vector<std::uint32_t>& paces)
      : rules_(costs, input), paces_(paces) {
    EVERSTEP_CHECK(paces.size() == input.stages);
  }

  std::int64_t Time(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    const std::int64_t plain = rules_.Plain(a, b);
    const std::int64_t paced = (plain * kUsualPace + paces_[i] - 1) / paces_[i];
    return paced + rules_.Time(i, a, b) - plain;
  }
  bool Fits(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    return rules_.Fits(i, a, b);
  }
  std::uint32_t stages() const { return rules_.stages(); }
  std::uint32_t layers() const { return rules_.layers(); }

  // The least sum of times of stages [0, k) over layers [0, x), for every x, each at most `most`;
  // and of stages [k + 1, S) over [x, L), each less. `from[i][x]`: where stage i - 1 begins, or
  // where stage i ends.
  struct Side {
    std::vector<std::vector<std::int64_t>> sum;
    std::vector<std::vector<std::uint32_t>> from;
  };
  Side Before(std::uint32_t k, std::int64_t most) const {
    Side side = Empty(k + 1);
    side.sum[0][0] = 0;
    for (std::uint32_t i = 0; i < k; ++i) {
      for (std::uint32_t a = i; a < layers(); ++a) {
        if (side.sum[i][a] >= kNever) continue;
        for (std::uint32_t b = a + 1; b <= layers(); ++b) {
          const std::int64_t time = Time(i, a, b);
          if (time > most && Plainly(i, a, b) > most) break;
          if (time > most || !Fits(i, a, b)) continue;
          if (side.sum[i][a] + time >= side.sum[i + 1][b]) continue;
          side.sum[i + 1][b] = side.sum[i][a] + time;
          side.from[i + 1][b] = a;
        }
      }
    }
    return side;
  }
  Side After(std::uint32_t k, std::int64_t below) const {
    const std::uint32_t count = stages() - k;  // row j: stages S - j .. S - 1
    Side side = Empty(count);
    side.sum[0][layers()] = 0;
    for (std::uint32_t j = 0; j + 1 < count; ++j) {
      const std::uint32_t i = stages() - 1 - j;
      for (std::uint32_t b = layers(); b > 0; --b) {
        if (side.sum[j][b] >= kNever) continue;
        for (std::uint32_t a = b; a-- > 0;) {
          const std::int64_t time = Time(i, a, b);
          if (time >= below && Plainly(i, a, b) >= below) break;
          if (time >= below || !Fits(i, a, b)) continue;
          if (side.sum[j][b] + time >= side.sum[j + 1][a]) continue;
          side.sum[j + 1][a] = side.sum[j][b] + time;
          side.from[j + 1][a] = b;
        }
      }
    }
    return side;
  }

 private:
  // Without transfers, which may shrink as a stage grows: once it is too long, it stays so.
  std::int64_t Plainly(std::uint32_t i, std::uint32_t a, std::uint32_t b) const {
    return (rules_.Plain(a, b) * kUsualPace + paces_[i] - 1) / paces_[i];
  }
  Side Empty(std::uint32_t rows) const {
    return {std::vector(rows, std::vector<std::int64_t>(layers() + 1, kNever)),
            std::vector(rows, std::vector<std::uint32_t>(layers() + 1, 0))};
  }

  const StageRules rules_;
  const std::vector<std::uint32_t>& paces_;
};

struct Range3 {
  std::int64_t w = 0;
  std::uint32_t k = 0, first = 0, end = 0;
};

}  // namespace

Partition MeasurePaced(const ShapeCosts& costs, std::vector<std::uint32_t> cuts,
                       const std::vector<std::uint32_t>& paces) {
  const PartitionInput input{.stages = static_cast<std::uint32_t>(paces.size())};
  const PacedRules rules(costs, input, paces);
  EVERSTEP_CHECK(cuts.size() == paces.size() + 1);
  Partition out;
  for (std::uint32_t i = 0; i < paces.size(); ++i) {
    const std::int64_t time = rules.Time(i, cuts[i], cuts[i + 1]);
    out.t1_ns += time;
    if (time >= out.slowest_ns) {
      out.slowest_ns = time;
      out.slowest = i;
      out.t3_ns = 0;
    }
    out.t3_ns += time;
  }
  out.cuts = std::move(cuts);
  return out;
}

std::optional<Partition> BestPacedPartition(const ShapeCosts& costs, const PartitionInput& input,
                                            const std::vector<std::uint32_t>& paces) {
  const PacedRules rules(costs, input, paces);
  const std::uint32_t stages = rules.stages(), layers = rules.layers();
  if (stages == 0 || stages > layers) return std::nullopt;
  // Some stage takes at least its pace's part of all the work.
  std::int64_t all_paces = 0;
  for (const std::uint32_t pace : paces) all_paces += pace;
  EVERSTEP_CHECK(all_paces > 0);
  const std::int64_t least = costs.time.back() * kUsualPace / all_paces;
  std::vector<Range3> ranges;
  for (std::uint32_t k = 0; k < stages; ++k) {
    for (std::uint32_t a = k; a < layers; ++a) {
      for (std::uint32_t b = a + 1; b + (stages - 1 - k) <= layers; ++b) {
        const std::int64_t time = rules.Time(k, a, b);
        if (time >= least && rules.Fits(k, a, b)) ranges.push_back({time, k, a, b});
      }
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range3& x, const Range3& y) {
    return std::tie(x.w, x.k, x.first, x.end) < std::tie(y.w, y.k, y.first, y.end);
  });
  // T(4S) = sum before k + 2 (w_k + sum after k) + (3S + k - 1) w_k.
  std::int64_t best = kNever;
  std::vector<std::uint32_t> cuts;
  for (std::size_t r = 0; r < ranges.size();) {
    const std::int64_t w = ranges[r].w;
    // The smallest that any k with this W can make: sums of at least nothing.
    if ((3LL * stages + 1) * w >= best) break;
    std::map<std::uint32_t, std::pair<PacedRules::Side, PacedRules::Side>> sides;  // by k
    for (; r < ranges.size() && ranges[r].w == w; ++r) {
      const Range3& range = ranges[r];
      auto at = sides.find(range.k);
      if (at == sides.end()) {
        at = sides.emplace(range.k, std::pair(rules.Before(range.k, w), rules.After(range.k, w)))
                 .first;
      }
      const auto& [before, after] = at->second;
      const std::uint32_t rest = stages - 1 - range.k;
      const std::int64_t left = before.sum[range.k][range.first];
      const std::int64_t right = after.sum[rest][range.end];
      if (left >= kNever || right >= kNever) continue;
      const std::int64_t t = left + 2 * (w + right) + (3LL * stages + range.k - 1) * w;
      if (t >= best) continue;
      best = t;
      cuts.assign(stages + 1, 0);
      cuts[range.k] = range.first;
      for (std::uint32_t i = range.k; i > 0; --i) cuts[i - 1] = before.from[i][cuts[i]];
      cuts[range.k + 1] = range.end;
      for (std::uint32_t j = rest; j > 0; --j) {
        cuts[stages - j + 1] = after.from[j][cuts[stages - j]];
      }
    }
  }
  if (best >= kNever) return std::nullopt;
  Partition out = MeasurePaced(costs, std::move(cuts), paces);
  EVERSTEP_CHECK(out.TimeNs(4LL * stages) == best, "a division is not what was looked for");
  return out;
}

namespace {

using Paces = std::map<NodeId, std::uint32_t>;  // those that are not usual

std::uint32_t PaceOf(const Paces& paces, NodeId node) {
  const auto found = paces.find(node);
  return found == paces.end() ? kUsualPace : found->second;
}

// A stage on several nodes is as slow as the slowest of them.
std::vector<std::uint32_t> StagePaces(const Template& t, const std::vector<NodeId>& nodes,
                                      const Paces& paces) {
  std::vector<std::uint32_t> out;
  out.reserve(t.partition.stages());
  for (std::uint32_t i = 0; i < t.partition.stages(); ++i) {
    const std::uint32_t first = i / t.shape.stages_per_node * t.shape.nodes_per_stage;
    std::uint32_t pace = kMostPace;
    for (std::uint32_t n = 0; n < t.shape.nodes_per_stage; ++n) {
      pace = std::min(pace, PaceOf(paces, nodes[first + n]));
    }
    out.push_back(pace);
  }
  return out;
}

// One pipeline as its nodes run it.
struct Lane {
  Partition partition;
  std::int64_t tail_ns = 0;  // optimizer, and what is exposed of the synchronisation
  std::int64_t TimeNs(std::int64_t microbatches) const {
    return partition.TimeNs(microbatches) + tail_ns;
  }
};

class Scene {
 public:
  Scene(const Library& library, const Paces& paces) : library_(library), paces_(paces) {
    state_.reserve(library.profile.layers.size() + 1);
    for (const Layer& layer : library.profile.layers) {
      state_.push_back(state_.back() + library.profile.StateBytes(layer));
    }
  }

  // `seated` with its own divisions, or with those that suit the paces.
  PacedPlan Run(Seated seated, bool divide, bool distribute) const {
    PacedPlan out;
    const auto copies = static_cast<std::uint32_t>(seated.nodes.size());
    std::vector<Lane> lanes;
    lanes.reserve(seated.nodes.size());
    for (std::size_t p = 0; p < seated.nodes.size(); ++p) {
      const Template& t = library_.templates[seated.composition.pipelines[p].form];
      const std::vector<std::uint32_t> paces = StagePaces(t, seated.nodes[p], paces_);
      const ShapeCosts costs = CostsOf(library_.profile, t.shape).value();
      const bool uneven = std::any_of(paces.begin(), paces.end(),
                                      [](std::uint32_t pace) { return pace != kUsualPace; });
      Lane lane{.partition = MeasurePaced(costs, t.partition.cuts, paces)};
      if (divide && uneven) {
        auto found = BestPacedPartition(
            costs,
            {.stages = t.partition.stages(), .most_microbatches = library_.input.most_microbatches},
            paces);
        if (found) lane.partition = std::move(*found);
      }
      lane.tail_ns = SyncNs(library_.profile, t, copies) + Optimizer(lane.partition.cuts, paces);
      Move(t, seated.nodes[p], lane.partition.cuts, &out);
      out.cuts.push_back(lane.partition.cuts);
      lanes.push_back(std::move(lane));
    }
    if (distribute) Distribute(lanes, &seated.composition);
    for (std::size_t p = 0; p < lanes.size(); ++p) {
      Pipeline& pipeline = seated.composition.pipelines[p];
      pipeline.time_ns = lanes[p].TimeNs(pipeline.microbatches);
      out.time_ns = std::max(out.time_ns, pipeline.time_ns);
    }
    seated.composition.time_ns = out.time_ns;
    out.seated = std::move(seated);
    return out;
  }

 private:
  std::int64_t Optimizer(const std::vector<std::uint32_t>& cuts,
                         const std::vector<std::uint32_t>& paces) const {
    std::int64_t most = 0;
    for (std::size_t i = 0; i < paces.size(); ++i) {
      std::int64_t sum = 0;
      for (std::uint32_t l = cuts[i]; l < cuts[i + 1]; ++l) {
        sum += library_.profile.layers[l].optimizer_ns;
      }
      most = std::max(most, (sum * kUsualPace + paces[i] - 1) / paces[i]);
    }
    return most;
  }

  // What the nodes of a pipeline lack when its template's division becomes `cuts`.
  void Move(const Template& t, const std::vector<NodeId>& nodes,
            const std::vector<std::uint32_t>& cuts, PacedPlan* out) const {
    for (std::uint32_t place = 0; place < nodes.size(); ++place) {
      const Range has = LayersAt(t, place);
      const std::uint32_t stage = place * t.shape.stages_per_node / t.shape.nodes_per_stage;
      const Range needs{cuts[stage], cuts[stage + t.shape.stages_per_node]};
      const std::uint32_t first = std::max(has.first, needs.first);
      const std::uint32_t end = std::min(has.end, needs.end);
      std::int64_t bytes = state_[needs.end] - state_[needs.first];
      if (first < end) bytes -= state_[end] - state_[first];
      out->moved_bytes += bytes;
      if (bytes > 0) {
        out->move_ns = std::max(out->move_ns, TransferNs(library_.profile.between, bytes));
      }
    }
  }

  // Each microbatch to the pipeline that is done with it first: no other way ends sooner.
  void Distribute(const std::vector<Lane>& lanes, Composition* composition) const {
    const std::uint32_t most = library_.input.most_microbatches;
    using NextEnd = std::pair<std::int64_t, std::size_t>;
    std::priority_queue<NextEnd, std::vector<NextEnd>, std::greater<>> next;
    for (std::size_t p = 0; p < lanes.size(); ++p) {
      composition->pipelines[p].microbatches = 1;
      if (most != 1) next.emplace(lanes[p].TimeNs(2), p);
    }
    for (std::uint64_t left = composition->microbatches - lanes.size(); left > 0; --left) {
      const std::size_t p = next.top().second;
      next.pop();
      const std::uint32_t count = ++composition->pipelines[p].microbatches;
      if (most == 0 || count < most) next.emplace(lanes[p].TimeNs(count + 1), p);
    }
  }

  const Library& library_;
  const Paces& paces_;
  std::vector<std::int64_t> state_ = {0};  // bytes of the layers before each
};

double Worth(const PacedPlan& plan, std::int64_t horizon_ns) {
  const auto time = static_cast<double>(plan.time_ns);
  if (horizon_ns == 0) return time;
  return time * (1 + static_cast<double>(plan.move_ns) / static_cast<double>(horizon_ns));
}

}  // namespace

Answer<PacedChoice> PlanForPaces(const Library& library, const Seated& now,
                                 const std::vector<NodePace>& paces, std::int64_t horizon_ns) {
  Composer composer(library);
  return PlanForPaces(&composer, now, paces, horizon_ns);
}

Answer<PacedChoice> PlanForPaces(Composer* composer, const Seated& now,
                                 const std::vector<NodePace>& paces, std::int64_t horizon_ns) {
  std::vector<NodeId> seated;
  for (const auto& nodes : now.nodes) seated.insert(seated.end(), nodes.begin(), nodes.end());
  Paces given;
  for (const NodePace& pace : paces) {
    if (std::find(seated.begin(), seated.end(), pace.node) == seated.end()) {
      return Refusal{fmt::format("node {} has no place", pace.node), "nodes of the plan"};
    }
    if (pace.permille < kLeastPace || pace.permille > kMostPace) {
      return Refusal{fmt::format("node {} at {} of its usual speed", pace.node,
                                 static_cast<double>(pace.permille) / kUsualPace),
                     fmt::format("{} to {}", static_cast<double>(kLeastPace) / kUsualPace,
                                 kMostPace / kUsualPace)};
    }
    if (pace.permille != kUsualPace) given[pace.node] = pace.permille;
  }
  const Scene scene(composer->library(), given);
  PacedChoice out;
  const auto add = [&out](Remedy remedy, PacedPlan plan) {
    plan.remedy = remedy;
    out.options.push_back(std::move(plan));
  };
  add(Remedy::kNothing, scene.Run(now, false, false));
  add(Remedy::kMicrobatches, scene.Run(now, false, true));
  add(Remedy::kLayers, scene.Run(now, true, true));
  std::vector<std::pair<std::uint32_t, NodeId>> slow;
  for (const auto& [node, pace] : given) {
    if (pace < kUsualPace) slow.emplace_back(pace, node);
  }
  std::sort(slow.begin(), slow.end());
  std::optional<PacedPlan> best_eviction;
  std::vector<NodeId> evicted;
  for (const auto& [pace, node] : slow) {
    evicted.push_back(node);
    Answer<Replanned> without =
        Replan(composer, now, {.lost = evicted, .joined = {}, .horizon_ns = horizon_ns});
    if (!without.ok()) break;
    PacedPlan plan = scene.Run(std::move(without.value().seated), true, true);
    // At most what the replan moves and what the divisions move; a layer may be among both.
    plan.moved_bytes += without.value().moved_bytes;
    plan.move_ns += without.value().move_ns;
    plan.evicted = evicted;
    if (best_eviction && Worth(plan, horizon_ns) >= Worth(*best_eviction, horizon_ns)) continue;
    best_eviction = std::move(plan);
  }
  if (best_eviction) add(Remedy::kEviction, std::move(*best_eviction));
  for (std::size_t i = 1; i < out.options.size(); ++i) {
    if (Worth(out.options[i], horizon_ns) < Worth(out.options[out.best], horizon_ns)) out.best = i;
  }
  return out;
}

}  // namespace everstep::planner
