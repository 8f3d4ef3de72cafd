#include "controller/policy/replay.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "proto/base/check.h"

namespace everstep::policy {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

}  // namespace

std::int64_t Report::total_us() const {
  return std::accumulate(us.begin(), us.end(), std::int64_t{0});
}

Replay::Replay(const Capacity& capacity, const Model& model, const Rules& rules)
    : capacity_(capacity), model_(model), rules_(rules) {
  due_.reserve(2 * capacity.changes.size());
  for (std::size_t i = 0; i < capacity.changes.size(); ++i) {
    const Change& change = capacity.changes[i];
    if (!change.lost.empty() && rules.notice_us > 0) {
      due_.push_back({std::max<std::int64_t>(0, change.at_us - rules.notice_us), What::kNotice, i});
    }
    due_.push_back({change.at_us, What::kChange, i});
  }
  std::stable_sort(due_.begin(), due_.end(),
                   [](const Due& a, const Due& b) { return a.at_us < b.at_us; });
}

void Replay::Noticed(const std::vector<NodeId>& /*nodes*/, std::int64_t /*at_us*/) {}

std::int64_t Replay::PaceUs(const Model& model, double speed) {
  EVERSTEP_CHECK(speed > 0);
  return std::max<std::int64_t>(1, std::llround(model.batch / speed * 1e6));
}

bool Replay::Pays(double now, double faster, std::int64_t cost_us) const {
  return faster * (horizon_us() - static_cast<double>(cost_us)) > now * horizon_us();
}

double Replay::left() const {
  if (phase_ != Phase::kStep) return left_;
  const double done = static_cast<double>(stretch_us_) / static_cast<double>(pace_us_);
  return std::max(0.0, left_ - done);
}

void Replay::set_left(double left) {
  EVERSTEP_CHECK(phase_ != Phase::kStep && left >= 0 && left <= 1);
  left_ = left;
}

void Replay::Step(std::int64_t pace_us) {
  EVERSTEP_CHECK(phase_ != Phase::kStep);
  phase_ = Phase::kStep;
  pace_us_ = pace_us;
  stretch_us_ = 0;
  phase_end_ = now_ + std::max<std::int64_t>(1, std::llround(left_ * static_cast<double>(pace_us)));
}

void Replay::Stall(Account account, std::int64_t us) {
  left_ = left();
  phase_ = Phase::kStall;
  account_ = account;
  phase_end_ = now_ + us;
}

void Replay::Wait() {
  left_ = left();
  phase_ = Phase::kWait;
  phase_end_ = kNever;
}

void Replay::CommitStep() {
  Book(Account::kProductive, step_us_);
  report_.samples += model_.batch;
  report_.course.emplace_back(now_, report_.samples);
  step_us_ = 0;
  left_ = 1;
}

void Replay::Keep() {
  kept_us_ += step_us_;
  kept_samples_ += model_.batch;
  step_us_ = 0;
  left_ = 1;
}

void Replay::CommitKept() {
  Book(Account::kProductive, kept_us_);
  report_.samples += kept_samples_;
  if (kept_samples_ > 0) report_.course.emplace_back(now_, report_.samples);
  kept_us_ = 0;
  kept_samples_ = 0;
}

void Replay::LoseKept() {
  Book(Account::kLost, kept_us_);
  if (kept_us_ > 0) ++report_.rolled_back;
  kept_us_ = 0;
  kept_samples_ = 0;
}

void Replay::LoseStep(double share) {
  const auto lost = share >= 1 ? step_us_ : std::llround(share * static_cast<double>(step_us_));
  Book(Account::kLost, lost);
  step_us_ -= lost;
  const double done = 1 - left();
  left_ = share >= 1 ? 1 : 1 - done * (1 - share);
  if (phase_ == Phase::kStep) phase_ = Phase::kNone;
}

void Replay::Elapse(std::int64_t us) {
  switch (phase_) {
    case Phase::kStep:
      step_us_ += us;
      stretch_us_ += us;
      break;
    case Phase::kStall: Book(account_, us); break;
    case Phase::kWait: Book(Account::kIdle, us); break;
    case Phase::kNone: EVERSTEP_CHECK(us == 0, "time passes and nothing runs"); break;
  }
  now_ += us;
}

void Replay::PhaseDone() {
  const Phase done = phase_;
  if (done == Phase::kStep) left_ = 0;
  phase_ = Phase::kNone;
  if (done == Phase::kStep) StepDone();
  if (done == Phase::kStall) StallDone();
  Begin();
}

void Replay::Begin() {
  if (phase_ == Phase::kNone) Next();
  EVERSTEP_CHECK(phase_ != Phase::kNone, "a policy began nothing");
}

Report Replay::Run() {
  Begin();
  auto due = due_.begin();
  while (now_ < capacity_.end_us) {
    const std::int64_t change = due == due_.end() ? kNever : due->at_us;
    const std::int64_t to = std::min({phase_end_, change, capacity_.end_us});
    Elapse(to - now_);
    if (now_ == capacity_.end_us) break;
    if (now_ == phase_end_) {  // before a loss of the same moment
      PhaseDone();
      continue;
    }
    const Change& what = capacity_.changes[due->change];
    if (due->what == What::kNotice) {
      Noticed(what.lost, what.at_us);
    } else {
      if (!what.lost.empty()) Lost(what.lost);
      if (!what.joined.empty()) Joined(what.joined);
    }
    Begin();
    ++due;
  }
  // What was under way.
  report_.samples += kept_samples_ + model_.batch * (1 - left());
  Book(Account::kProductive, kept_us_ + step_us_);
  report_.course.emplace_back(now_, report_.samples);
  EVERSTEP_CHECK(report_.total_us() == capacity_.end_us, "the accounts do not sum to the time");
  return std::move(report_);
}

}  // namespace everstep::policy
