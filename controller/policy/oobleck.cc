// Oobleck (SOSP '23) as published: every node works, in pipelines of unequal size; a loss costs the
// iteration that was under way and a switch in place.
#include <algorithm>

#include "controller/policy/policies.h"
#include "controller/policy/roster.h"

namespace everstep::policy {
namespace {

class Oobleck : public Replay {
 public:
  using Replay::Replay;

 private:
  std::uint32_t Usable() const { return std::min(roster_.all(), model().most_nodes); }

  // A newcomer's share of the model, over its link.
  std::int64_t CopyUs(std::uint32_t nodes) const {
    double state = 0;
    for (const planner::Layer& layer : model().profile.layers) {
      state += static_cast<double>(model().profile.StateBytes(layer));
    }
    const std::uint32_t copies = nodes / model().least_nodes;  // pipelines, at most
    return planner::TransferNs(model().profile.between,
                               static_cast<std::int64_t>(state * copies / nodes)) /
           1000;
  }

  void Switch(std::int64_t stall_us) {
    const std::uint32_t nodes = Usable();
    if (model().templates[nodes] == 0) {
      roster_.Use(0);
      return Wait();
    }
    roster_.Use(nodes);
    if (ran_) ++report().switches;
    Stall(Account::kSwitching, ran_ ? stall_us : 0);
    ran_ = true;
  }

  void Lost(const std::vector<NodeId>& nodes) override {
    if (roster_.Lose(nodes).empty()) return;
    ++report().stopped;
    LoseStep(1);
    Switch((rules().notice_us > 0 ? 0 : rules().detect_us) + model().reconfigure_us);
  }

  void Joined(const std::vector<NodeId>& nodes) override {
    roster_.Join(nodes);
    if (waiting()) Switch(model().reconfigure_us);
  }

  void Next() override {
    if (roster_.active() == 0) return Switch(model().reconfigure_us);
    const std::uint32_t more = Usable();
    if (more > roster_.active()) {
      const std::int64_t cost_us = model().reconfigure_us + CopyUs(more);
      if (Pays(model().templates[roster_.active()], model().templates[more], cost_us)) {
        return Switch(cost_us);
      }
    }
    Step(PaceUs(model(), model().templates[roster_.active()]));
  }

  Roster roster_;
  bool ran_ = false;
};

}  // namespace

Report OobleckReport(const Capacity& capacity, const Model& model, const Rules& rules) {
  return Oobleck(capacity, model, rules).Run();
}

}  // namespace everstep::policy
