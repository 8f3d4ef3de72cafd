#include "controller/planner/compose.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "controller/planner/best_sum.h"
#include "proto/base/check.h"

namespace everstep::planner {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 4;

// The problem for one number of pipelines.
class ForCount {
 public:
  ForCount(const Library& library, const ComposeInput& input, std::uint32_t q)
      : library_(library),
        q_(q),
        nodes_(input.nodes),
        goal_(static_cast<std::int64_t>(input.microbatches)),
        limit_(library.input.most_microbatches == 0 ? goal_ : library.input.most_microbatches) {
    // A part that leaves the others less than the fewest nodes each is none.
    const std::uint32_t most = nodes_ - (q - 1) * library.least_nodes;
    for (const Template& t : library.templates) {
      if (t.nodes > most) break;
      tail_.push_back(SyncNs(library.profile, t, q) + t.optimizer_ns);
    }
    items_.reserve(tail_.size());
  }

  bool MayBeWithin(std::int64_t ns) {
    Fill(ns);
    return MayReach(items_, q_, nodes_, goal_);
  }
  bool IsWithin(std::int64_t ns, std::vector<std::uint32_t>* sizes) {
    Fill(ns);
    return Reaches(items_, q_, nodes_, goal_, sizes);
  }

  // The least time of `from`..`upto` for which `possible` holds; it does for `upto`, and for every
  // time above one for which it does. Only times that a template takes are looked at.
  template <typename Possible>
  std::int64_t Least(std::int64_t from, std::int64_t upto, const Possible& possible) {
    std::int64_t low = from, high = upto;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (possible(middle)) {
        high = std::max(low, LastTimeUpTo(middle));
      } else {
        low = std::min(high, FirstTimeAfter(middle));
      }
    }
    return high;
  }

  // A time within which everything is possible that ever is.
  std::int64_t Enough() const {
    std::int64_t most = 0;
    for (std::size_t i = 0; i < tail_.size(); ++i) {
      most = std::max(most, library_.templates[i].TimeNs(std::min(goal_, limit_)) + tail_[i]);
    }
    return most;
  }

  std::int64_t TailNs(std::uint32_t form) const { return tail_[form]; }

  // The template of `size` nodes that does most within `ns`.
  std::uint32_t FormWithin(std::uint32_t size, std::int64_t ns) const {
    std::uint32_t best = 0;
    std::int64_t most = 0;
    for (std::uint32_t i = 0; i < tail_.size(); ++i) {
      if (library_.templates[i].nodes != size) continue;
      const std::int64_t cap = Cap(i, ns);
      if (cap > most) {
        most = cap;
        best = i;
      }
    }
    EVERSTEP_CHECK(most > 0);
    return best;
  }

 private:
  std::int64_t Cap(std::size_t i, std::int64_t ns) const {
    return std::min(library_.templates[i].MostWithin(ns - tail_[i]), std::min(limit_, goal_));
  }

  void Fill(std::int64_t ns) {
    items_.clear();
    for (std::size_t i = 0; i < tail_.size(); ++i) {
      const std::int64_t cap = Cap(i, ns);
      if (cap < 1) continue;
      const std::uint32_t size = library_.templates[i].nodes;
      if (!items_.empty() && items_.back().size == size) {
        items_.back().value = std::max(items_.back().value, cap);
      } else {
        items_.push_back({size, cap});
      }
    }
  }

  std::int64_t LastTimeUpTo(std::int64_t ns) const {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < tail_.size(); ++i) {
      const std::int64_t cap = Cap(i, ns);
      if (cap >= 1) last = std::max(last, library_.templates[i].TimeNs(cap) + tail_[i]);
    }
    return last;
  }
  std::int64_t FirstTimeAfter(std::int64_t ns) const {
    std::int64_t first = kNever;
    for (std::size_t i = 0; i < tail_.size(); ++i) {
      const std::int64_t cap = std::max<std::int64_t>(0, Cap(i, ns));
      if (cap >= std::min(limit_, goal_)) continue;
      first = std::min(first, library_.templates[i].TimeNs(cap + 1) + tail_[i]);
    }
    return first;
  }

  const Library& library_;
  const std::uint32_t q_;
  const std::uint32_t nodes_;
  const std::int64_t goal_;
  const std::int64_t limit_;
  std::vector<std::int64_t> tail_;  // by template: what follows its last microbatch
  std::vector<Item> items_;
};

// Gives each microbatch to the pipeline that is done with it first.
void Distribute(const Library& library, const ForCount& count, std::uint64_t microbatches,
                std::vector<Pipeline>* pipelines) {
  const auto time = [&](const Pipeline& p, std::uint32_t m) {
    return library.templates[p.form].TimeNs(m) + count.TailNs(p.form);
  };
  const std::uint32_t most = library.input.most_microbatches;
  using Next = std::pair<std::int64_t, std::size_t>;
  std::priority_queue<Next, std::vector<Next>, std::greater<>> next;
  for (std::size_t i = 0; i < pipelines->size(); ++i) {
    (*pipelines)[i].microbatches = 1;
    if (most != 1) next.emplace(time((*pipelines)[i], 2), i);
  }
  for (std::uint64_t left = microbatches - pipelines->size(); left > 0; --left) {
    EVERSTEP_CHECK(!next.empty());
    const std::size_t i = next.top().second;
    next.pop();
    Pipeline& p = (*pipelines)[i];
    ++p.microbatches;
    if (most == 0 || p.microbatches < most) next.emplace(time(p, p.microbatches + 1), i);
  }
  for (Pipeline& p : *pipelines) p.time_ns = time(p, p.microbatches);
}

// For each number of pipelines a time that it cannot beat, within a thousandth of what the hull
// tells; the fastest first.
std::vector<Alternative> Bounds(const Library& library, const ComposeInput& input,
                                std::uint32_t fewest, std::uint32_t most) {
  std::vector<Alternative> bounds;
  bounds.reserve(most);
  const std::uint64_t cap = library.input.most_microbatches;
  std::int64_t near = 0;  // its neighbour's, which is not far
  for (std::uint32_t q = most; q >= fewest; --q) {
    if (cap != 0 && cap * q < input.microbatches) break;
    ForCount count(library, input, q);
    const std::int64_t enough = count.Enough();
    if (!count.MayBeWithin(enough)) continue;
    std::int64_t low = 0, high = enough;  // impossible up to low; possible in high
    if (near > 0 && near < enough) {
      std::int64_t step = near / 512 + 1;
      if (count.MayBeWithin(near)) {
        for (high = near; high > step && count.MayBeWithin(high - step); step *= 2) high -= step;
        low = std::max<std::int64_t>(0, high - step);
      } else {
        for (low = near; low + step < enough && !count.MayBeWithin(low + step); step *= 2) {
          low += step;
        }
        high = std::min(enough, low + step);
      }
    }
    while (high - low > high / 1024 + 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (count.MayBeWithin(middle) ? high : low) = middle;
    }
    near = high;
    bounds.push_back({q, low + 1, false});
  }
  std::stable_sort(bounds.begin(), bounds.end(), [](const Alternative& a, const Alternative& b) {
    return a.time_ns < b.time_ns;
  });
  return bounds;
}

}  // namespace

Composition ComposeOf(const Library& library, const std::vector<std::uint32_t>& forms,
                      std::uint64_t microbatches) {
  Composition out{.nodes = 0, .microbatches = microbatches};
  out.pipelines.reserve(forms.size());
  for (const std::uint32_t form : forms) {
    out.nodes += library.templates[form].nodes;
    out.pipelines.push_back({.form = form});
  }
  const auto larger_first = [](const Pipeline& a, const Pipeline& b) {
    return std::tie(a.form, a.microbatches) > std::tie(b.form, b.microbatches);
  };
  std::sort(out.pipelines.begin(), out.pipelines.end(), larger_first);
  const ForCount count(library, {.nodes = out.nodes, .microbatches = microbatches},
                       static_cast<std::uint32_t>(forms.size()));
  Distribute(library, count, microbatches, &out.pipelines);
  std::sort(out.pipelines.begin(), out.pipelines.end(), larger_first);
  for (const Pipeline& p : out.pipelines) {
    if (p.time_ns <= out.time_ns) continue;
    out.time_ns = p.time_ns;
    out.sync_ns = count.TailNs(p.form) - library.templates[p.form].optimizer_ns;
  }
  return out;
}

double Composition::Busy(const Library& library) const {
  double work = 0;
  for (const Pipeline& p : pipelines) {
    const Template& t = library.templates[p.form];
    for (const Stage& stage : t.stages) {
      double compute = 0;
      for (std::uint32_t l = stage.first; l < stage.end; ++l) {
        const Layer& layer = library.profile.layers[l];
        compute += static_cast<double>(layer.forward_ns + layer.backward_ns);
      }
      work += compute * p.microbatches;
    }
  }
  const double devices = static_cast<double>(nodes) * library.profile.devices_per_node;
  return time_ns == 0 ? 0 : work / (devices * static_cast<double>(time_ns));
}

Answer<std::uint64_t> MicrobatchesOf(const Profile& profile, std::uint64_t batch) {
  if (batch == 0 || batch % profile.microbatch != 0) {
    const std::uint64_t down = batch / profile.microbatch * profile.microbatch;
    return Refusal{fmt::format("a batch of {} samples does not divide into microbatches of {}",
                               batch, profile.microbatch),
                   fmt::format("{}{}", down > 0 ? fmt::format("{} or ", down) : "",
                               down + profile.microbatch)};
  }
  if (batch / profile.microbatch > kMaxMicrobatches) {
    return Refusal{fmt::format("{} microbatches an iteration", batch / profile.microbatch),
                   fmt::format("at most {}", kMaxMicrobatches)};
  }
  return batch / profile.microbatch;
}

Answer<Composition> Compose(const Library& library, const ComposeInput& input) {
  const std::uint32_t fewest = library.input.faults + 1;
  if (input.nodes < library.fewest_nodes || input.nodes > library.input.nodes) {
    return Refusal{
        fmt::format("{} nodes", input.nodes),
        fmt::format("the library is for {} to {}", library.fewest_nodes, library.input.nodes)};
  }
  if (input.microbatches < fewest || input.microbatches > kMaxMicrobatches) {
    return Refusal{
        fmt::format("{} microbatches for at least {} pipelines", input.microbatches, fewest),
        fmt::format("{} to {} microbatches, or fewer faults", fewest, kMaxMicrobatches)};
  }
  const auto most = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(input.nodes / library.least_nodes, input.microbatches));
  if (input.pipelines != 0 && (input.pipelines < fewest || input.pipelines > most)) {
    return Refusal{fmt::format("{} pipelines on {} nodes", input.pipelines, input.nodes),
                   fmt::format("{} to {}", fewest, most)};
  }
  std::vector<Alternative> bounds =
      Bounds(library, input, input.pipelines == 0 ? fewest : input.pipelines,
             input.pipelines == 0 ? most : input.pipelines);
  std::uint32_t best_q = 0;
  std::int64_t best_ns = kNever;
  std::vector<std::uint32_t> best_sizes;
  for (Alternative& a : bounds) {
    if (a.time_ns > best_ns) break;
    ForCount count(library, input, a.pipelines);
    const std::int64_t upto =
        std::min(count.Enough(), a.pipelines > best_q ? best_ns : best_ns - 1);
    if (upto < a.time_ns || !count.MayBeWithin(upto)) continue;
    a.time_ns =
        count.Least(a.time_ns, upto, [&count](std::int64_t ns) { return count.MayBeWithin(ns); });
    const auto possible = [&count](std::int64_t ns) { return count.IsWithin(ns, nullptr); };
    if (!possible(a.time_ns)) {
      // Close to its bound, where few sizes are left to sum.
      std::int64_t low = a.time_ns;
      std::int64_t step = low / 4096 + 1;
      for (; low + step < upto && !possible(low + step); step *= 2) low += step;
      const std::int64_t high = std::min(upto, low + step);
      if (high == upto && !possible(upto)) continue;
      a.time_ns = count.Least(low, high, possible);
    }
    a.exact = true;
    best_ns = a.time_ns;
    best_q = a.pipelines;
    EVERSTEP_CHECK(count.IsWithin(best_ns, &best_sizes));
  }
  if (best_q == 0) {
    return Refusal{fmt::format("{} nodes have no pipelines for {} microbatches", input.nodes,
                               input.microbatches),
                   library.input.most_microbatches == 0
                       ? "another number of pipelines"
                       : fmt::format("more microbatches for a pipeline than {}",
                                     library.input.most_microbatches)};
  }
  const ForCount count(library, input, best_q);
  std::vector<std::uint32_t> forms;
  forms.reserve(best_sizes.size());
  for (const std::uint32_t size : best_sizes) forms.push_back(count.FormWithin(size, best_ns));
  Composition out = ComposeOf(library, forms, input.microbatches);
  EVERSTEP_CHECK(out.time_ns == best_ns, "a composition is not as fast as was found");
  std::sort(bounds.begin(), bounds.end(),
            [](const Alternative& a, const Alternative& b) { return a.pipelines < b.pipelines; });
  out.alternatives = std::move(bounds);
  return out;
}

}  // namespace everstep::planner
