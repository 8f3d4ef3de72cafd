// One job on one trace, whatever its policy: time passes, steps are made, nodes go and come; all of
// the time is booked on one of five accounts.
//
//   step   an iteration; its samples count when it is committed
//   stall  nothing is computed: a restart, a switch, a checkpoint
//   wait   too few nodes
//
// A policy says what each loss, join and boundary means (subclasses, one file each). A step that
// the end of the trace cuts counts for the part that was done, and so do steps that no checkpoint
// holds yet: the oracle is cut at the same place. Pure; microseconds, so that sums are exact.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "controller/policy/model.h"
#include "controller/policy/trace.h"

namespace everstep::policy {

// What holds for every policy alike.
struct Rules {
  std::int64_t boot_us = 45'000'000;
  std::int64_t detect_us = 5'000'000;           // from a loss to somebody's knowing; with notice 0
  std::int64_t notice_us = 0;                   // before each loss
  std::int64_t memory_restart_us = 30'000'000;  // of processes whose state is in others' memory
  double price = 0.91;                          // of a node's hour
};

enum class Account : std::uint8_t { kProductive, kLost, kSwitching, kCheckpoint, kIdle };
inline constexpr std::size_t kAccounts = 5;
inline constexpr std::array<const char*, kAccounts> kAccountNames = {
    "productive", "lost", "switching", "checkpoint", "idle"};

struct Report {
  std::string policy;
  std::string note;                             // how it was set, or why there is nothing
  bool possible = true;                         // else the model has no figures for it
  double samples = 0;                           // committed
  std::array<std::int64_t, kAccounts> us = {};  // sums to the trace's length
  std::uint32_t stopped = 0;                    // losses that stopped it
  std::uint32_t rolled_back = 0;                // those of them that took back committed steps
  std::uint32_t switches = 0;                   // other nodes, or other pipelines
  std::vector<std::pair<std::int64_t, double>> course;  // samples committed by time

  std::int64_t total_us() const;
};

class Replay {
 public:
  // All must outlive it.
  Replay(const Capacity& capacity, const Model& model, const Rules& rules);
  virtual ~Replay() = default;
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Once.
  Report Run();

 protected:
  // `nodes` will be lost at `at_us`, `rules().notice_us` from now or less.
  virtual void Noticed(const std::vector<NodeId>& nodes, std::int64_t at_us);
  virtual void Lost(const std::vector<NodeId>& nodes) = 0;
  virtual void Joined(const std::vector<NodeId>& nodes) = 0;
  // Nothing runs: a step was done, a stall is over, or it all begins. Must begin something.
  virtual void Next() = 0;
  virtual void StepDone() { CommitStep(); }
  virtual void StallDone() {}

  // Work goes on at `pace_us` for a whole step, from where this one stands.
  void Step(std::int64_t pace_us);
  void Stall(Account account, std::int64_t us);
  void Wait();

  // The step that was done, or what of it is to be taken back: a share 0..1 of what was done.
  void CommitStep();
  void Keep();  // instead of committing it: done, but no checkpoint holds it
  void CommitKept();
  void LoseKept();
  void LoseStep(double share);

  std::int64_t now() const { return now_; }
  const Model& model() const { return model_; }
  const Rules& rules() const { return rules_; }
  const Capacity& capacity() const { return capacity_; }
  bool stepping() const { return phase_ == Phase::kStep; }
  bool waiting() const { return phase_ == Phase::kWait; }
  bool stalled(Account account) const { return phase_ == Phase::kStall && account_ == account; }
  // Of the present step: 1 at its beginning.
  double left() const;
  void set_left(double left);
  bool in_step() const { return step_us_ > 0 || left_ < 1; }
  std::int64_t boundary_us() const { return phase_end_; }
  Report& report() { return report_; }
  // Until the next change, on average.
  double horizon_us() const { return static_cast<double>(capacity_.mean_gap_us); }
  // Whether `faster` samples a second instead of `now` earn a pause of `cost_us` until then.
  bool Pays(double now, double faster, std::int64_t cost_us) const;
  static std::int64_t PaceUs(const Model& model, double speed);

 private:
  enum class Phase : std::uint8_t { kNone, kStep, kStall, kWait };
  enum class What : std::uint8_t { kNotice, kChange };
  struct Due {
    std::int64_t at_us = 0;
    What what = What::kChange;
    std::size_t change = 0;
  };

  void Elapse(std::int64_t us);
  void Book(Account account, std::int64_t us) {
    report_.us[static_cast<std::size_t>(account)] += us;
  }
  void PhaseDone();
  void Begin();

  const Capacity& capacity_;
  const Model& model_;
  const Rules& rules_;
  std::vector<Due> due_;
  Report report_;

  std::int64_t now_ = 0;
  Phase phase_ = Phase::kNone;
  Account account_ = Account::kSwitching;
  std::int64_t phase_end_ = 0;
  std::int64_t pace_us_ = 0;
  double left_ = 1;              // at the beginning of this stretch
  std::int64_t stretch_us_ = 0;  // of this step, since its pace was set
  std::int64_t step_us_ = 0;     // in this step, all that was not taken back
  std::int64_t kept_us_ = 0;
  double kept_samples_ = 0;
};

}  // namespace everstep::policy
