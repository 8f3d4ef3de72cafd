#include "controller/policy/paper.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "controller/policy/py_heap.h"
#include "proto/base/check.h"

namespace everstep::policy {
namespace {

// Of equal times the lower comes first.
enum Kind : int {
  kAdd = 1,
  kRemove = 2,
  kReady = 4,
  kGlobalRendezvous = 5,
  kLocalRendezvous = 6,
  kStep = 7,
  kCheckpoint = 8
};

constexpr std::size_t kStages = 12;  // of every pipeline, whatever the model
constexpr std::int64_t kBootMs = 45'000;
constexpr std::int64_t kNever = -1;
constexpr std::uint64_t kCheckpointEvery = 10;  // steps

struct Place {
  std::size_t pipeline = 0, stage = 0;
  friend bool operator==(const Place&, const Place&) = default;
};

struct Instance {
  std::string name;
  bool ready = false;  // or running
  bool running = false;
  std::vector<Place> places;
};

class Artifact {
 public:
  Artifact(PaperSystem system, const ModelTable& table, const Trace& trace)
      : system_(system), table_(table), batch_(std::floor(table.batch)) {
    bool lost = false;
    for (const TraceEvent& e : trace.events) {
      heap_.Push({.ms = e.ms, .kind = e.add ? kAdd : kRemove, .node = e.node});
      spot_ |= e.add && lost;
      lost |= !e.add;
    }
    heap_.Heapify();
    end_ms_ = heap_.items().back().ms;
    restart_ms_ = Ms(system == PaperSystem::kOobleck  ? table.reconfigure_s
                     : system == PaperSystem::kBamboo ? table.rebalance_s.value_or(0)
                                                      : table.restart_s);
    checkpoint_ms_ = Ms(table.checkpoint_s);
  }

  PaperResult Run() {
    if (Curve().speeds.empty()) return {};
    while (!heap_.items().empty()) {
      const PaperEvent event = heap_.Pop();
      if (event.ms >= end_ms_) break;
      switch (event.kind) {
        case kAdd: Add(event); break;
        case kRemove: Remove(event); break;
        case kReady: Ready(event); break;
        case kGlobalRendezvous: RendezvousOver(event.ms, true); break;
        case kLocalRendezvous: RendezvousOver(event.ms, false); break;
        case kStep: StepOver(event); break;
        default: break;
      }
    }
    if (ends_.empty() || !started_) return {};
    // Pairs of both lists as they stand, which is not always a step's own pair.
    double samples = 0;
    for (std::size_t i = 0; i + 1 < std::min(ends_.size(), speeds_.size()); i += 2) {
      samples += static_cast<double>(ends_[i + 1] - ends_[i]) / 1000 * speeds_[i + 1];
    }
    const double seconds = static_cast<double>(ends_.back() - start_ms_) / 1000;
    return {.samples_per_s = seconds > 0 ? samples / seconds : 0, .steps = steps_};
  }

 private:
  static std::int64_t Ms(double seconds) { return std::llround(seconds * 1000); }

  const everstep::policy::Curve& Curve() const {
    switch (system_) {
      case PaperSystem::kVaruna: return table_.grid;
      case PaperSystem::kBamboo: return table_.redundant;
      case PaperSystem::kOobleck: break;
    }
    return table_.templates;
  }

  bool RollsBack() const {
    const bool small = table_.name != "GPT-3-2.7b" && table_.name != "GPT-3-6.7b";
    return !(spot_ && small);
  }

  Instance* Find(const std::string& name) {
    for (Instance& instance : instances_) {
      if (instance.name == name) return &instance;
    }
    return nullptr;
  }

  // The time of a step with the nodes that are ready, and what a restart costs from now on.
  void TakeSpeed() {
    std::int64_t nodes = 0;
    for (const Instance& instance : instances_) nodes += instance.ready ? 1 : 0;
    const std::int64_t row = std::clamp<std::int64_t>(nodes, Curve().first, Curve().last());
    const double speed = Curve().speeds[static_cast<std::size_t>(row - Curve().first)];
    step_ms_ = speed == 0 ? 1'000'000'000'000 : static_cast<std::int64_t>(batch_ / speed * 1000);
    if (system_ != PaperSystem::kVaruna || table_.restart.speeds.empty()) return;
    const std::int64_t at =
        std::clamp<std::int64_t>(nodes, table_.restart.first, table_.restart.last());
    restart_ms_ = Ms(table_.restart.speeds[static_cast<std::size_t>(at - table_.restart.first)]);
  }

  void Add(const PaperEvent& event) {
    if (Instance* there = Find(event.node)) {
      *there = {.name = event.node};
    } else {
      instances_.push_back({.name = event.node});
    }
    heap_.Push({.ms = event.ms + kBootMs, .kind = kReady, .node = event.node});
  }

  void Ready(const PaperEvent& event) {
    Instance* instance = Find(event.node);
    if (instance == nullptr) return;
    instance->ready = true;
    instance->running = false;
    switch (state_) {
      case State::kStopped: StartRendezvous(event.ms, true); break;
      case State::kRendezvous: meeting_.push_back(event.node); break;
      case State::kRunning: ++waiting_; break;
    }
  }

  void Remove(const PaperEvent& event) {
    Instance* instance = Find(event.node);
    EVERSTEP_CHECK(instance != nullptr, "the trace removes a node that is not there");
    const Instance gone = *instance;
    instances_.erase(instances_.begin() + (instance - instances_.data()));
    if (system_ == PaperSystem::kBamboo) {
      RemoveShadowed(event.ms, gone);
      return;
    }
    if (system_ == PaperSystem::kOobleck) heap_.Heapify();
    if (system_ == PaperSystem::kVaruna) {
      checkpoint_next_ = true;
      if (RollsBack()) TakeBack();
    }
    StartRendezvous(event.ms, true);
  }

  // Varuna: the steps since the last checkpoint earn nothing.
  void TakeBack() {
    if (checkpointed_ms_ == kNever) {
      std::fill(speeds_.begin(), speeds_.end(), 0.0);
      return;
    }
    std::size_t last = 0;
    for (std::size_t i = 0; i < std::min(ends_.size(), speeds_.size()); ++i) {
      last = i;
      if (ends_[i] == checkpointed_ms_) break;
    }
    for (std::size_t i = last + 1; i < speeds_.size(); ++i) speeds_[i] = 0;
  }

  // Bamboo: the node before it in the pipeline takes the stage over, once.
  void RemoveShadowed(std::int64_t ms, const Instance& gone) {
    if (gone.running) {
      if (gone.places.size() > 1) {
        StartRendezvous(ms, true);
        return;
      }
      const Place place = gone.places.front();
      const Place shadow{place.pipeline, place.stage == 0 ? stages_ - 1 : place.stage - 1};
      for (Instance& other : instances_) {
        if (std::find(other.places.begin(), other.places.end(), shadow) == other.places.end()) {
          continue;
        }
        if (other.places.size() > 1) {
          StartRendezvous(ms, true);
          return;
        }
        other.places.push_back(place);
        break;
      }
    }
    if (state_ != State::kRunning || slowed_) return;
    slowed_ = {steps_, ms};
    slow_step_seen_ = false;
    step_ms_ = static_cast<std::int64_t>(static_cast<double>(step_ms_) * 1.5);
  }

  void Gather() {
    meeting_.clear();
    for (const Instance& instance : instances_) {
      if (instance.ready) meeting_.push_back(instance.name);
    }
  }

  void PushRendezvous(std::int64_t ms, bool global) {
    std::int64_t length = restart_ms_;
    if (system_ == PaperSystem::kBamboo && global) length = 30'000;
    if (system_ == PaperSystem::kVaruna) length -= checkpoint_ms_;
    heap_.Push(
        {.ms = ms + length, .kind = global ? kGlobalRendezvous : kLocalRendezvous, .node = {}});
  }

  void StartRendezvous(std::int64_t ms, bool global) {
    state_ = State::kRendezvous;
    Gather();
    PushRendezvous(ms, global);
  }

  void RendezvousOver(std::int64_t ms, bool global) {
    for (const std::string& name : meeting_) {
      if (Find(name) != nullptr) continue;
      Gather();
      PushRendezvous(ms, global);
      return;
    }
    Assign();
    slowed_.reset();
    slow_step_seen_ = false;
    ++version_;
    meeting_.clear();
    if (pipelines_ == 0) {
      state_ = State::kStopped;
      return;
    }
    state_ = State::kRunning;
    TakeSpeed();
    PushStep(ms + step_ms_);
    if (!started_) {
      started_ = true;
      start_ms_ = ms;
      last_step_ms_ = ms;
    }
  }

  void Assign() {
    stages_ = meeting_.size() < kStages ? 0 : kStages;
    pipelines_ = stages_ == 0 ? 0 : meeting_.size() / kStages;
    waiting_ = 0;
    for (std::size_t i = 0; i < meeting_.size(); ++i) {
      Instance* instance = Find(meeting_[i]);
      instance->places.clear();
      instance->running = i < pipelines_ * stages_;
      if (instance->running) {
        instance->places.push_back({i / kStages, i % kStages});
      } else {
        ++waiting_;
      }
    }
  }

  void PushStep(std::int64_t ms) {
    heap_.Push({.ms = ms, .kind = kStep, .node = {}, .version = version_});
  }

  void StepOver(const PaperEvent& event) {
    if (event.version != version_) return;
    std::int64_t ms = event.ms;
    if (slowed_ && !slow_step_seen_ && slowed_->first == steps_) {
      PushStep(ms + static_cast<std::int64_t>(static_cast<double>(ms - slowed_->second) * 0.5));
      slow_step_seen_ = true;
      return;
    }
    ++steps_;
    const double seconds = static_cast<double>(ms - last_step_ms_) / 1000;
    const double speed = seconds == 0 ? 0 : batch_ / seconds;
    ends_.insert(ends_.end(), {last_step_ms_, ms});
    speeds_.insert(speeds_.end(), {speed, speed});
    if (system_ == PaperSystem::kVaruna) ms = MaybeCheckpoint(ms);
    last_step_ms_ = ms;
    if (system_ == PaperSystem::kBamboo && ShouldReconfigure()) {
      StartRendezvous(ms, false);
    } else {
      PushStep(ms + step_ms_);
    }
  }

  // When the next step begins.
  std::int64_t MaybeCheckpoint(std::int64_t ms) {
    if (steps_ % kCheckpointEvery != 0 && !checkpoint_next_) return ms;
    checkpoint_next_ = false;
    ms += checkpoint_ms_;
    heap_.Push({.ms = ms + checkpoint_ms_, .kind = kCheckpoint, .node = {}});
    heap_.Heapify();
    if (RollsBack() && LossBeforeCheckpoint()) {
      steps_ -= std::min(steps_, kCheckpointEvery);
      const std::size_t back = 2 * kCheckpointEvery;
      speeds_.resize(speeds_.size() - std::min(speeds_.size(), back));
      speeds_.insert(speeds_.end(), back, 0.0);
    } else {
      checkpointed_ms_ = ms;
    }
    return ms;
  }

  // Before it in the heap's array, which is not in time.
  bool LossBeforeCheckpoint() const {
    bool loss = false;
    for (const PaperEvent& event : heap_.items()) {
      loss |= event.kind == kRemove;
      if (event.kind == kCheckpoint) return loss;
    }
    return false;
  }

  bool ShouldReconfigure() const {
    std::size_t overloaded = 0;
    for (const Instance& instance : instances_) {
      overloaded += instance.running && instance.places.size() > 1 ? 1 : 0;
    }
    if (overloaded > 0 && waiting_ >= overloaded) return true;
    const std::size_t active = pipelines_ * stages_ - overloaded;
    if (overloaded > 0 &&
        2.0 * static_cast<double>(overloaded) / static_cast<double>(active) > 0.05) {
      return true;
    }
    return (active + waiting_) / kStages > pipelines_;
  }

  enum class State : std::uint8_t { kStopped, kRendezvous, kRunning };

  const PaperSystem system_;
  const ModelTable& table_;
  const double batch_;
  PyHeap heap_;
  std::int64_t end_ms_ = 0;
  bool spot_ = false;  // nodes come after others were lost

  std::vector<Instance> instances_;  // in the order in which they came
  std::vector<std::string> meeting_;
  State state_ = State::kStopped;
  std::size_t waiting_ = 0, pipelines_ = 0, stages_ = 0;
  std::int64_t version_ = 0;
  std::int64_t restart_ms_ = 0, checkpoint_ms_ = 0, step_ms_ = 0;

  bool started_ = false;
  std::int64_t start_ms_ = 0, last_step_ms_ = 0;
  std::uint64_t steps_ = 0;
  std::vector<std::int64_t> ends_;  // beginning and end of each step
  std::vector<double> speeds_;      // twice for each step

  bool checkpoint_next_ = false;
  std::int64_t checkpointed_ms_ = kNever;
  std::optional<std::pair<std::uint64_t, std::int64_t>> slowed_;  // step, since
  bool slow_step_seen_ = false;
};

}  // namespace

PaperResult PublishedResult(PaperSystem system, const ModelTable& table, const Trace& trace) {
  return Artifact(system, table, trace).Run();
}

}  // namespace everstep::policy
