// Varuna, and the same layouts with state in memory: after a loss every process starts again.
#include <utility>
#include <vector>

#include "controller/policy/policies.h"
#include "controller/policy/roster.h"

namespace everstep::policy {
namespace {

class Restart : public Replay {
 public:
  Restart(const Capacity& capacity, const Model& model, const Rules& rules,
          const RestartOptions& options)
      : Replay(capacity, model, rules), options_(options) {}

 private:
  std::int64_t CheckpointUs() const { return options_.from_memory ? 0 : model().checkpoint_us; }
  std::int64_t RestartUs(std::uint32_t nodes) const {
    return options_.from_memory ? rules().memory_restart_us : model().restart_us[nodes];
  }

  // Everything starts on as many nodes as are fastest. The first start costs nobody anything.
  void StartOver(std::int64_t detect_us) {
    roster_.Lose(std::exchange(leaving_, {}));
    const std::uint32_t nodes = FastestWithin(model().grid, 0, roster_.all());
    roster_.Use(nodes);
    if (nodes == 0) return Wait();
    if (ran_) ++report().switches;
    Stall(Account::kSwitching, ran_ ? detect_us + RestartUs(nodes) : 0);
    ran_ = true;
  }

  void Lost(const std::vector<NodeId>& nodes) override {
    if (roster_.Lose(nodes).empty()) return;
    ++report().stopped;
    LoseStep(1);
    LoseKept();
    since_ = 0;
    saving_ = false;
    StartOver(rules().notice_us > 0 ? 0 : rules().detect_us);
  }

  // Those nodes go at the last boundary that leaves room for a checkpoint; where there is none,
  // at once, with the one that is written then.
  void Noticed(const std::vector<NodeId>& nodes, std::int64_t at_us) override {
    if (at_us - now() < CheckpointUs()) return;
    const std::vector<NodeId> working = roster_.WorkingOf(nodes);
    if (working.empty()) return;
    leaving_.insert(leaving_.end(), working.begin(), working.end());
    leave_by_us_ = at_us - CheckpointUs();
    if (stepping() && boundary_us() > leave_by_us_) LoseStep(1);
  }

  void Joined(const std::vector<NodeId>& nodes) override {
    roster_.Join(nodes);
    if (waiting()) StartOver(0);
  }

  void StepDone() override {
    if (options_.from_memory) return CommitStep();
    Keep();
    ++since_;
  }

  bool Grows() const {
    const std::uint32_t more = FastestWithin(model().grid, 0, roster_.all());
    return more > roster_.active() && Pays(model().grid[roster_.active()], model().grid[more],
                                           CheckpointUs() + RestartUs(more));
  }

  void Next() override {
    if (saving_) {
      saving_ = false;
      CommitKept();
      since_ = 0;
    }
    if (roster_.active() == 0) return StartOver(0);
    const std::int64_t pace_us = PaceUs(model(), model().grid[roster_.active()]);
    const bool moves = (!leaving_.empty() && now() + pace_us > leave_by_us_) || Grows();
    const bool due = options_.every != kNoCheckpoints && since_ >= options_.every;
    if (since_ > 0 && (moves || due)) {
      saving_ = true;
      return Stall(Account::kCheckpoint, CheckpointUs());
    }
    if (moves) return StartOver(0);
    Step(pace_us);
  }

  const RestartOptions options_;
  Roster roster_;
  bool ran_ = false;
  bool saving_ = false;          // a checkpoint is being written
  std::vector<NodeId> leaving_;  // known to be lost soon
  std::int64_t leave_by_us_ = 0;
  std::uint64_t since_ = 0;  // steps since the last checkpoint
};

}  // namespace

Report RestartReport(const Capacity& capacity, const Model& model, const Rules& rules,
                     const RestartOptions& options) {
  return Restart(capacity, model, rules, options).Run();
}

}  // namespace everstep::policy
