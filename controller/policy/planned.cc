// Everstep: the production planner (controller/planner) composes, seats and replans; nothing of it
// is modelled here. A loss leaves alone the pipelines that it did not touch and that the new plan
// still has: they keep the gradients that they have summed up, and only the lost pipelines'
// microbatches of that step are made again. Newcomers are given their state while training goes
// on, and taken in at a boundary.
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "controller/planner/replan.h"
#include "controller/policy/policies.h"
#include "proto/base/check.h"

namespace everstep::policy {
namespace {

namespace pl = everstep::planner;

class Planned : public Replay {
 public:
  Planned(const Capacity& capacity, const Model& model, const Rules& rules, pl::Library library,
          const PlannedOptions& options)
      : Replay(capacity, model, rules),
        library_(std::move(library)),
        bare_(library_),
        options_(options) {
    bare_.input.faults = 0;
    bare_.fewest_nodes = bare_.least_nodes;
  }

 private:
  struct Switch {
    pl::Seated seated;
    std::int64_t move_us = 0;
    std::vector<double> kept;  // of the step under way, by its pipelines: those that do not change
    bool orphaned = false;     // no copy is left of some layer
  };

  std::uint32_t Working() const { return seated_ ? seated_->composition.nodes : 0; }
  std::uint32_t All() const { return Working() + static_cast<std::uint32_t>(spares_.size()); }

  // Samples a second: the measured speed of so many nodes, and by the planner's estimate how much
  // slower this composition is than the best one of them.
  double Speed(const pl::Composition& composition) {
    auto [at, added] = fastest_ns_.emplace(composition.nodes, 0);
    if (added) {
      const auto best =
          pl::Compose(library_, {.nodes = composition.nodes, .microbatches = model().microbatches});
      at->second = best.ok() ? best.value().time_ns : composition.time_ns;
    }
    return model().ours[composition.nodes] * static_cast<double>(at->second) /
           static_cast<double>(composition.time_ns);
  }

  // The speed that is left of it when losses take their part of a step, now and then.
  double Worth(const pl::Composition& composition) {
    const double speed = Speed(composition);
    if (!options_.keep_gradients) return speed;
    return speed /
           (1 + pl::LossShare(library_, composition) * static_cast<double>(PaceUs(model(), speed)) /
                    (2 * static_cast<double>(capacity().mean_loss_gap_us)));
  }

  // The fastest number of nodes of `least`..`most` that the planner covers; 0: none.
  std::uint32_t Want(std::uint32_t least, std::uint32_t most) const {
    return FastestWithin(model().ours, std::max(least, library_.least_nodes),
                         std::min(most, library_.input.nodes));
  }

  // The same templates with f + 1 copies of each layer, and for nodes that have no room for them
  // with what there is: then any loss goes back to the step before, which is in peers' memory.
  const pl::Library& For(std::uint32_t nodes) const {
    return nodes < library_.fewest_nodes ? bare_ : library_;
  }

  std::vector<NodeId> FirstSpares(std::uint32_t count) const {
    return {spares_.begin(), spares_.begin() + count};
  }

  // The plan without `lost`, with spares where they help; what it moves and makes again is spread
  // over `horizon_us`. Nothing: too few are left.
  std::optional<Switch> PlanWithout(const std::vector<NodeId>& lost, double horizon_us,
                                    bool in_step) {
    const auto survivors = Working() - static_cast<std::uint32_t>(lost.size());
    const std::uint32_t want =
        Want(survivors, survivors + static_cast<std::uint32_t>(spares_.size()));
    if (want < survivors || want == 0) return std::nullopt;
    pl::ReplanInput input{.lost = lost,
                          .joined = FirstSpares(want - survivors),
                          .horizon_ns = options_.price_moves ? std::llround(horizon_us * 1000) : 0};
    if (options_.keep_gradients) {
      input.loss_gap_ns = capacity().mean_loss_gap_us * 1000;
      if (in_step) input.done = done_;
    }
    pl::Answer<pl::Replanned> made = pl::Replan(For(want), *seated_, input);
    if (!made.ok()) return std::nullopt;
    pl::Replanned& plan = made.value();
    Switch out{.seated = std::move(plan.seated),
               .move_us = options_.price_moves ? plan.move_ns / 1000 : 0,
               .kept = std::vector<double>(plan.was.size(), 0.0),
               .orphaned = !plan.orphaned.empty()};
    for (std::size_t i = 0; i < plan.was.size() && in_step && options_.keep_gradients; ++i) {
      if (plan.was[i]) out.kept[i] = done_[*plan.was[i]];
    }
    return out;
  }

  // Books what was done since the last time on the pipelines that did it.
  void Attribute() {
    if (!seated_) return;
    const double done = 1 - left();
    double booked = 0;
    for (const double d : done_) booked += d;
    const pl::Composition& c = seated_->composition;
    done_.resize(c.pipelines.size(), 0.0);
    for (std::size_t i = 0; i < done_.size(); ++i) {
      done_[i] +=
          (done - booked) * c.pipelines[i].microbatches / static_cast<double>(c.microbatches);
    }
  }

  static double Sum(const std::vector<double>& values) {
    double sum = 0;
    for (const double value : values) sum += value;
    return sum;
  }

  // Takes the nodes of `next` from the spares, and gives back those that it leaves out.
  void Seat(pl::Seated next) {
    std::vector<NodeId> seated;
    for (const auto& nodes : next.nodes) seated.insert(seated.end(), nodes.begin(), nodes.end());
    spares_.erase(std::remove_if(spares_.begin(), spares_.end(),
                                 [&](NodeId node) {
                                   return std::find(seated.begin(), seated.end(), node) !=
                                          seated.end();
                                 }),
                  spares_.end());
    seated_ = std::move(next);
    growth_.reset();
  }

  void Lost(const std::vector<NodeId>& nodes) override {
    std::vector<NodeId> lost;
    for (const NodeId node : nodes) {
      const auto spare = std::find(spares_.begin(), spares_.end(), node);
      if (spare != spares_.end()) {
        spares_.erase(spare);
      } else if (Seated(node)) {
        lost.push_back(node);
      }
    }
    if (!lost.empty()) {
      ++report().stopped;
      Repair(lost);
    }
    PlanGrowth();
  }

  bool Seated(NodeId node) const {
    if (!seated_) return false;
    return std::any_of(seated_->nodes.begin(), seated_->nodes.end(), [node](const auto& nodes) {
      return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
    });
  }

  void Repair(const std::vector<NodeId>& lost) {
    leaving_.clear();
    const std::int64_t detect_us = rules().notice_us > 0 ? 0 : rules().detect_us;
    Attribute();
    std::optional<Switch> best = PlanWithout(lost, horizon_us(), true);
    if (!best) return GiveUp(lost);
    const auto until_boundary = [this](const Switch& s) {
      return static_cast<double>(s.move_us) +
             (1 - Sum(s.kept)) * static_cast<double>(PaceUs(model(), Speed(s.seated.composition)));
    };
    // For the rest of this step a plan that moves less and keeps more may be the quicker one; the
    // better one is then taken at the boundary.
    const double step_us = static_cast<double>(PaceUs(model(), Speed(best->seated.composition)));
    std::optional<Switch> near = PlanWithout(lost, step_us, true);
    if (near && until_boundary(*near) < until_boundary(*best)) best = std::move(near);
    std::int64_t stall_us = detect_us + model().reconfigure_us + best->move_us;
    if (best->orphaned) {  // every copy of a layer is gone: the last step, from peers' memory
      stall_us += rules().memory_restart_us;
      ++report().rolled_back;
      std::fill(best->kept.begin(), best->kept.end(), 0.0);
    }
    const double done = Sum(done_), keeps = Sum(best->kept);
    LoseStep(done <= 0 ? 1 : std::clamp(1 - keeps / done, 0.0, 1.0));
    done_ = std::move(best->kept);
    Seat(std::move(best->seated));
    ++report().switches;
    Stall(Account::kSwitching, stall_us);
    set_left(std::clamp(1 - keeps, 0.0, 1.0));
  }

  // Too few nodes for one copy: those that are left wait with their state.
  void GiveUp(const std::vector<NodeId>& lost) {
    for (const auto& nodes : seated_->nodes) {
      for (const NodeId node : nodes) {
        if (std::find(lost.begin(), lost.end(), node) == lost.end()) spares_.push_back(node);
      }
    }
    std::sort(spares_.begin(), spares_.end());
    seated_.reset();
    done_.clear();
    LoseStep(1);
    Wait();
  }

  void Joined(const std::vector<NodeId>& nodes) override {
    spares_.insert(spares_.end(), nodes.begin(), nodes.end());
    if (seated_) return PlanGrowth();
    Start();
  }

  // From nothing, or with what those that waited have.
  void Start() {
    const std::uint32_t want = Want(0, All());
    if (want == 0) return Wait();
    pl::Answer<pl::Composition> made =
        pl::Compose(For(want), {.nodes = want, .microbatches = model().microbatches});
    if (!made.ok()) return Wait();
    Seat(pl::Seat(std::move(made.value()), library_, FirstSpares(want)));
    // Of plans for the same nodes the one that losses cost least; nothing has to move yet.
    if (std::optional<Switch> better = PlanWithout({}, 0, false);
        better && Worth(better->seated.composition) > Worth(seated_->composition)) {
      Seat(std::move(better->seated));
    }
    if (ran_) ++report().switches;
    Stall(Account::kSwitching,
          ran_ ? model().reconfigure_us + rules().memory_restart_us : std::int64_t{0});
    ran_ = true;
    PlanGrowth();
  }

  // A better plan with all that there are, if it earns its switch; its state moves from now on.
  void PlanGrowth() {
    growth_.reset();
    if (!seated_ || !leaving_.empty()) return;
    const std::optional<Switch> next = PlanWithout({}, horizon_us(), false);
    if (!next || !Pays(Worth(seated_->composition), Worth(next->seated.composition),
                       model().reconfigure_us)) {
      return;
    }
    growth_ = *next;
    growth_ready_us_ = now() + next->move_us;
  }

  void Noticed(const std::vector<NodeId>& nodes, std::int64_t at_us) override {
    for (const NodeId node : nodes) {
      const auto spare = std::find(spares_.begin(), spares_.end(), node);
      if (spare != spares_.end()) spares_.erase(spare);
    }
    for (const NodeId node : nodes) {
      if (Seated(node)) leaving_.push_back(node);
    }
    leave_by_us_ = at_us;
    if (!leaving_.empty() && stepping() && boundary_us() > at_us) {
      // No boundary comes before: as if they were lost now, while their pipelines have done least.
      ++report().stopped;
      Repair(std::exchange(leaving_, {}));
    }
    PlanGrowth();
  }

  void StepDone() override {
    CommitStep();
    done_.clear();
  }

  void Next() override {
    if (!seated_) return Start();
    if (!in_step()) {
      // The last boundary before they are gone: nothing is lost.
      const std::int64_t pace_us = PaceUs(model(), Speed(seated_->composition));
      if (!leaving_.empty() && now() + pace_us > leave_by_us_) {
        const std::vector<NodeId> lost = std::exchange(leaving_, {});
        std::optional<Switch> next = PlanWithout(lost, horizon_us(), false);
        if (!next) return GiveUp(lost);
        const std::int64_t move_us = next->move_us;
        return Take(std::move(*next), move_us);
      }
      if (growth_ && growth_ready_us_ <= now()) {
        Switch next = std::move(*growth_);
        return Take(std::move(next), 0);
      }
    }
    Step(PaceUs(model(), Speed(seated_->composition)));
  }

  // At a boundary.
  void Take(Switch next, std::int64_t move_us) {
    Seat(std::move(next.seated));
    ++report().switches;
    Stall(Account::kSwitching, model().reconfigure_us + move_us);
    PlanGrowth();
  }

  const pl::Library library_;
  pl::Library bare_;
  const PlannedOptions options_;
  std::optional<pl::Seated> seated_;
  std::vector<NodeId> spares_;   // booted, without a place
  std::vector<NodeId> leaving_;  // at a boundary before they are gone
  std::int64_t leave_by_us_ = 0;
  std::vector<double> done_;  // of the step, by pipeline
  std::optional<Switch> growth_;
  std::int64_t growth_ready_us_ = 0;
  bool ran_ = false;
  std::map<std::uint32_t, std::int64_t> fastest_ns_;  // by nodes
};

}  // namespace

Report PlannedReport(const Capacity& capacity, const Model& model, const Rules& rules,
                     const PlannedOptions& options) {
  pl::Answer<pl::Library> library =
      pl::MakeLibrary(model.profile, {.nodes = model.most_nodes, .faults = model.copies - 1});
  if (!library.ok()) {
    Report none;
    none.possible = false;
    none.note = library.refusal().what;
    return none;
  }
  return Planned(capacity, model, rules, std::move(library.value()), options).Run();
}

}  // namespace everstep::policy
