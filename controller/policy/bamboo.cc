// Bamboo (NSDI '23): each node computes its successor's stage in the bubbles, so one loss is
// covered by the node before it.
#include "controller/policy/policies.h"
#include "controller/policy/roster.h"

namespace everstep::policy {
namespace {

// What its simulator adds for a loss that no shadow covers.
constexpr std::int64_t kFatalUs = 30'000'000;

class Bamboo : public Replay {
 public:
  Bamboo(const Capacity& capacity, const Model& model, const Rules& rules, std::uint64_t every)
      : Replay(capacity, model, rules), every_(every) {}

 private:
  // Two of `places` (ascending) next to each other in the ring of one pipeline.
  bool Uncovered(const std::vector<std::size_t>& places) const {
    const std::size_t stages = model().redundant_stages;
    for (std::size_t i = 0; i < places.size(); ++i) {
      for (std::size_t j = i + 1; j < places.size(); ++j) {
        const std::size_t apart = places[j] - places[i];
        if (places[i] / stages == places[j] / stages && (apart == 1 || apart == stages - 1)) {
          return true;
        }
      }
    }
    return false;
  }

  void Arrange(std::int64_t stall_us) {
    const std::uint32_t nodes = FastestWithin(model().redundant, 0, roster_.all());
    roster_.Use(nodes);
    if (nodes == 0) {
      LoseStep(1);
      return Wait();
    }
    if (ran_) ++report().switches;
    Stall(Account::kSwitching, ran_ ? stall_us : 0);
    ran_ = true;
  }

  void Lost(const std::vector<NodeId>& nodes) override {
    const std::vector<std::size_t> places = roster_.Lose(nodes);
    if (places.empty()) return;
    ++report().stopped;
    saving_ = false;
    const std::int64_t detect_us = rules().notice_us > 0 ? 0 : rules().detect_us;
    if (!Uncovered(places)) return Arrange(detect_us + model().rebalance_us);
    LoseStep(1);
    LoseKept();
    since_ = 0;
    Arrange(detect_us + kFatalUs + model().rebalance_us);
  }

  void Joined(const std::vector<NodeId>& nodes) override {
    roster_.Join(nodes);
    if (waiting()) Arrange(model().rebalance_us);
  }

  void StepDone() override {
    Keep();
    ++since_;
  }

  bool Grows() const {
    const std::uint32_t more = FastestWithin(model().redundant, 0, roster_.all());
    return more > roster_.active() &&
           Pays(model().redundant[roster_.active()], model().redundant[more], model().rebalance_us);
  }

  void Next() override {
    if (saving_) {
      saving_ = false;
      CommitKept();
      since_ = 0;
    }
    if (roster_.active() == 0) return Arrange(model().rebalance_us);
    if (!in_step()) {
      if (every_ != kNoCheckpoints && since_ >= every_) {
        saving_ = true;
        return Stall(Account::kCheckpoint, model().checkpoint_us);
      }
      if (Grows()) return Arrange(model().rebalance_us);
    }
    Step(PaceUs(model(), model().redundant[roster_.active()]));
  }

  const std::uint64_t every_;
  Roster roster_;
  bool ran_ = false;
  bool saving_ = false;
  std::uint64_t since_ = 0;  // steps since the last checkpoint
};

}  // namespace

Report BambooReport(const Capacity& capacity, const Model& model, const Rules& rules,
                    std::uint64_t every) {
  return Bamboo(capacity, model, rules, every).Run();
}

}  // namespace everstep::policy
