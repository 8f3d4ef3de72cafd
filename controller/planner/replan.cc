#include "controller/planner/replan.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "controller/planner/transport.h"
#include "proto/base/check.h"

namespace everstep::planner {
namespace {

constexpr std::size_t kWeighed = 8;  // numbers of pipelines that are weighed against each other

struct Survivor {
  NodeId node = 0;
  Range has;
};

struct Place {
  std::uint32_t pipeline = 0, place = 0;
  Range needs;
};

class Mover {
 public:
  explicit Mover(const Library& library) {
    state_.reserve(library.profile.layers.size() + 1);
    state_.push_back(0);
    for (const Layer& layer : library.profile.layers) {
      state_.push_back(state_.back() + library.profile.StateBytes(layer));
    }
  }
  // Bytes of `needs` that a node with `has` lacks.
  std::int64_t Lacks(Range needs, Range has) const {
    const std::uint32_t first = std::max(needs.first, has.first);
    const std::uint32_t end = std::min(needs.end, has.end);
    const std::int64_t all = state_[needs.end] - state_[needs.first];
    return first < end ? all - (state_[end] - state_[first]) : all;
  }

 private:
  std::vector<std::int64_t> state_;  // bytes of the layers before each
};

// Nodes of one layer range, and places of one.
struct Classes {
  std::map<Range, std::vector<std::size_t>> members;
  template <typename Things, typename RangeOf>
  Classes(const Things& things, const RangeOf& range_of) {
    for (std::size_t i = 0; i < things.size(); ++i) members[range_of(things[i])].push_back(i);
  }
};

// Seats what is left of `free` on what is left of `open` with the fewest bytes.
void SeatRest(const Mover& mover, const std::vector<Survivor>& free, const std::vector<Place>& open,
              Seated* seated) {
  const Classes from(free, [](const Survivor& s) { return s.has; });
  const Classes to(open, [](const Place& p) { return p.needs; });
  std::vector<std::int64_t> supply, demand;
  std::vector<std::vector<std::int64_t>> cost;
  supply.reserve(from.members.size());
  demand.reserve(to.members.size());
  cost.reserve(from.members.size());
  for (const auto& [needs, places] : to.members) {
    demand.push_back(static_cast<std::int64_t>(places.size()));
  }
  for (const auto& [has, nodes] : from.members) {
    supply.push_back(static_cast<std::int64_t>(nodes.size()));
    std::vector<std::int64_t> row;
    row.reserve(to.members.size());
    for (const auto& [needs, places] : to.members) row.push_back(mover.Lacks(needs, has));
    cost.push_back(std::move(row));
  }
  const std::vector<std::vector<std::int64_t>> flow = CheapestTransport(supply, demand, cost);
  std::vector<std::size_t> taken(to.members.size(), 0);
  std::size_t row = 0;
  for (const auto& [has, nodes] : from.members) {
    std::size_t next = 0, column = 0;
    for (const auto& [needs, places] : to.members) {
      for (std::int64_t i = 0; i < flow[row][column]; ++i) {
        const Place& place = open[places[taken[column]++]];
        seated->nodes[place.pipeline][place.place] = free[nodes[next++]].node;
      }
      ++column;
    }
    ++row;
  }
}

struct Scene {
  Composer& composer;
  const Library& library;
  const Seated& now;
  const Mover mover;
  std::set<NodeId> lost;
  std::map<NodeId, Range> has;  // survivors and newcomers; these have nothing
};

// Pipelines that lost nobody.
std::vector<bool> WholePipelines(const Scene& scene) {
  std::vector<bool> whole(scene.now.nodes.size(), false);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const auto& nodes = scene.now.nodes[i];
    whole[i] = std::none_of(nodes.begin(), nodes.end(),
                            [&](NodeId node) { return scene.lost.count(node) > 0; });
  }
  return whole;
}

// Whole pipelines as they are, and the best that the other nodes make among themselves; while they
// make none, the smallest whole pipeline goes to them. Nothing: that is no plan of f + 1 copies.
std::optional<Composition> Local(const Scene& scene) {
  const Library& library = scene.library;
  const std::uint64_t microbatches = scene.now.composition.microbatches;
  const std::vector<bool> whole = WholePipelines(scene);
  std::vector<std::uint32_t> forms;  // by nodes descending, as the composition has them
  auto rest = static_cast<std::uint32_t>(scene.has.size());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    if (!whole[i]) continue;
    forms.push_back(scene.now.composition.pipelines[i].form);
    rest -= library.templates[forms.back()].nodes;
  }
  while (rest > 0) {
    const std::uint64_t share = std::max<std::uint64_t>(1, microbatches * rest / scene.has.size());
    const Answer<Composition>& made = scene.composer.OfPart({.nodes = rest, .microbatches = share});
    if (made.ok()) {
      for (const Pipeline& p : made.value().pipelines) forms.push_back(p.form);
      break;
    }
    if (forms.empty()) return std::nullopt;
    rest += library.templates[forms.back()].nodes;
    forms.pop_back();
  }
  const std::uint64_t cap = library.input.most_microbatches;
  if (forms.size() <= library.input.faults || microbatches < forms.size() ||
      (cap != 0 && cap * forms.size() < microbatches)) {
    return std::nullopt;
  }
  return ComposeOf(library, forms, microbatches);
}

Replanned SeatAnew(const Scene& scene, Composition composition) {
  const Library& library = scene.library;
  Replanned out;
  out.seated.composition = std::move(composition);
  const std::vector<Pipeline>& pipelines = out.seated.composition.pipelines;
  std::set<NodeId> seated;
  std::vector<bool> whole = WholePipelines(scene);
  // Pipelines that lost nobody stay as they are.
  out.was.resize(pipelines.size());
  for (std::size_t i = 0; i < pipelines.size(); ++i) {
    std::vector<NodeId> nodes;
    for (std::uint32_t old = 0; old < whole.size() && nodes.empty(); ++old) {
      if (!whole[old] || scene.now.composition.pipelines[old].form != pipelines[i].form) continue;
      whole[old] = false;
      out.was[i] = old;
      nodes = scene.now.nodes[old];
      seated.insert(nodes.begin(), nodes.end());
      out.stayed += static_cast<std::uint32_t>(nodes.size());
    }
    out.seated.nodes.push_back(std::move(nodes));
  }
  std::vector<Survivor> free;
  std::map<Range, std::vector<NodeId>> having;
  for (const auto& [node, range] : scene.has) {
    if (seated.count(node) == 0) having[range].push_back(node);
  }
  // Then those that have exactly what a place needs.
  std::vector<Place> open;
  for (std::uint32_t i = 0; i < pipelines.size(); ++i) {
    const Template& t = library.templates[pipelines[i].form];
    if (!out.seated.nodes[i].empty()) continue;
    out.seated.nodes[i].assign(t.nodes, 0);
    for (std::uint32_t place = 0; place < t.nodes; ++place) {
      const Range needs = LayersAt(t, place);
      const auto found = having.find(needs);
      if (found == having.end() || found->second.empty()) {
        open.push_back({i, place, needs});
        continue;
      }
      out.seated.nodes[i][place] = found->second.front();
      found->second.erase(found->second.begin());
    }
  }
  for (const auto& [range, nodes] : having) {
    for (const NodeId node : nodes) free.push_back({node, range});
  }
  SeatRest(scene.mover, free, open, &out.seated);
  // What each must receive, and what nobody has any more.
  std::vector<bool> held(library.profile.layers.size(), false);
  for (const auto& [node, range] : scene.has) {
    for (std::uint32_t l = range.first; l < range.end; ++l) held[l] = true;
  }
  for (std::uint32_t l = 0; l < held.size(); ++l) {
    if (!held[l]) out.orphaned.push_back(l);
  }
  std::int64_t most = 0;
  for (std::uint32_t i = 0; i < pipelines.size(); ++i) {
    const Template& t = library.templates[pipelines[i].form];
    for (std::uint32_t place = 0; place < t.nodes; ++place) {
      const NodeId node = out.seated.nodes[i][place];
      const std::int64_t bytes = scene.mover.Lacks(LayersAt(t, place), scene.has.at(node));
      if (bytes == 0) continue;
      out.arrivals.push_back({node, i, place, bytes});
      out.moved_bytes += bytes;
      most = std::max(most, bytes);
    }
  }
  std::sort(out.arrivals.begin(), out.arrivals.end(),
            [](const Arrival& a, const Arrival& b) { return a.node < b.node; });
  if (most > 0) out.move_ns = TransferNs(library.profile.between, most);
  return out;
}

// What a plan costs of a second of training, its move and its losses spread over the time to the
// next change.
double Worth(const Library& library, const ReplanInput& input, const Replanned& plan) {
  const Composition& composition = plan.seated.composition;
  const auto time = static_cast<double>(composition.time_ns);
  double cost = 1;
  if (input.horizon_ns > 0) {
    double again = 0;
    for (const double done : input.done) again += done;
    for (const auto& was : plan.was) {
      if (was && *was < input.done.size()) again -= input.done[*was];
    }
    cost +=
        (static_cast<double>(plan.move_ns) + again * time) / static_cast<double>(input.horizon_ns);
  }
  if (input.loss_gap_ns > 0) {
    cost += LossShare(library, composition) * time / (2 * static_cast<double>(input.loss_gap_ns));
  }
  return time * cost;
}

}  // namespace

double LossShare(const Library& library, const Composition& composition) {
  double share = 0;
  for (const Pipeline& p : composition.pipelines) {
    share += static_cast<double>(library.templates[p.form].nodes) * p.microbatches;
  }
  return share /
         (static_cast<double>(composition.nodes) * static_cast<double>(composition.microbatches));
}

Range LayersAt(const Template& t, std::uint32_t place) {
  EVERSTEP_CHECK(place < t.nodes);
  const std::uint32_t first = place * t.shape.stages_per_node / t.shape.nodes_per_stage;
  return {t.partition.cuts[first], t.partition.cuts[first + t.shape.stages_per_node]};
}

Seated Seat(Composition composition, const Library& library, const std::vector<NodeId>& nodes) {
  EVERSTEP_CHECK(nodes.size() == composition.nodes);
  Seated out{.composition = std::move(composition), .nodes = {}};
  auto next = nodes.begin();
  out.nodes.reserve(out.composition.pipelines.size());
  for (const Pipeline& p : out.composition.pipelines) {
    const auto end = next + library.templates[p.form].nodes;
    out.nodes.emplace_back(next, end);
    next = end;
  }
  return out;
}

Answer<Replanned> Replan(const Library& library, const Seated& now, const ReplanInput& input) {
  Composer composer(library);
  return Replan(&composer, now, input);
}

Answer<Replanned> Replan(Composer* composer, const Seated& now, const ReplanInput& input) {
  const Library& library = composer->library();
  Scene scene{.composer = *composer,
              .library = library,
              .now = now,
              .mover = Mover(library),
              .lost = {},
              .has = {}};
  for (std::size_t i = 0; i < now.nodes.size(); ++i) {
    const Template& t = library.templates[now.composition.pipelines[i].form];
    for (std::uint32_t place = 0; place < t.nodes; ++place) {
      scene.has[now.nodes[i][place]] = LayersAt(t, place);
    }
  }
  for (const NodeId node : input.lost) {
    if (scene.has.erase(node) == 0) {
      return Refusal{scene.lost.count(node) > 0 ? fmt::format("node {} is lost twice", node)
                                                : fmt::format("node {} has no place", node),
                     "each lost node once, of those in the plan"};
    }
    scene.lost.insert(node);
  }
  for (const NodeId node : input.joined) {
    if (scene.lost.count(node) > 0 || !scene.has.emplace(node, Range{}).second) {
      return Refusal{fmt::format("node {} joins and is lost or there already", node),
                     "newcomers have names of their own"};
    }
  }
  ComposeInput compose{.nodes = static_cast<std::uint32_t>(scene.has.size()),
                       .microbatches = now.composition.microbatches};
  const Answer<Composition>& fastest = composer->Of(compose);
  if (!fastest.ok()) return fastest.refusal();
  const std::vector<Alternative>& alternatives = fastest.value().alternatives;
  const std::int64_t best_ns = fastest.value().time_ns;
  const auto best_q = static_cast<std::uint32_t>(fastest.value().pipelines.size());
  Replanned best = SeatAnew(scene, fastest.value());
  // Without prices only an equally fast one that moves less is better.
  const bool priced = input.horizon_ns > 0 || input.loss_gap_ns > 0;
  double best_worth = Worth(library, input, best);
  const auto weigh = [&](Composition composition) {
    Replanned other = SeatAnew(scene, std::move(composition));
    const double worth = Worth(library, input, other);
    const bool better = priced ? worth < best_worth
                               : other.seated.composition.time_ns == best_ns &&
                                     other.moved_bytes < best.moved_bytes;
    if (!better) return;
    best = std::move(other);
    best_worth = worth;
  };
  const auto hopeless = [&](std::int64_t ns) {
    return priced ? static_cast<double>(ns) >= best_worth : ns > best_ns;
  };
  if (auto local = Local(scene); local && !hopeless(local->time_ns)) weigh(std::move(*local));
  std::vector<Alternative> others = alternatives;
  std::stable_sort(others.begin(), others.end(), [](const Alternative& a, const Alternative& b) {
    return a.time_ns < b.time_ns;
  });
  others.resize(std::min(others.size(), kWeighed));
  for (const Alternative& other : others) {
    if (other.pipelines == best_q || hopeless(other.time_ns)) continue;
    compose.pipelines = other.pipelines;
    const Answer<Composition>& made = composer->Of(compose);
    if (made.ok()) weigh(made.value());
  }
  best.seated.composition.alternatives = alternatives;
  return best;
}

}  // namespace everstep::planner
