// The agent's brain: pure, deterministic, single-threaded. Events and time in, effects out; no IO,
// no clock, no threads. The shell (worker/agent) runs it on one thread, tests and simulators
// anywhere.
//
// It decides: which of the controller's commands are current, when a node is prepared, when a
// generation stands here, what is told to a controller and when. It does not decide which
// generation runs: that is the controller's. Workers live on through the loss of the session and of
// the agent; only Prepare, StopJob and a controller that does not know the job end them. A Prepare
// on a node that stays ends them for their generation only: those that can park, and are resumed by
// Activate. Prepared is never said before each is parked or dead.
//
// Everything it says is level-triggered: a report that a broken stream swallowed is said again by
// the next registration, which carries the node's whole state.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "worker/agent/core/effect.h"
#include "worker/agent/core/event.h"
#include "worker/agent/core/job_view.h"

namespace everstep::agent {

struct CoreOptions {
  Duration heartbeat_interval = Milliseconds(250);  // until Registered names another
  Duration reap_slack = Seconds(10);  // after the grace: a worker that SIGKILL did not end by then
                                      // sits in the kernel, and this node refuses the generation
  Duration park_limit = Seconds(5);   // for what computes between two collectives; then SIGKILL
  Duration boundary_limit = Seconds(15);  // to end the step first, where nobody is lost; likewise
  Duration store_timeout = Seconds(25);   // a store host must listen within
  Duration start_timeout = Seconds(60);   // the keeper must fork the workers within
  std::size_t max_jobs = 64;              // on one node
  std::size_t max_unsaid = 4096;          // reports kept while a registration is under way
};

class AgentCore {
 public:
  explicit AgentCore(CoreOptions options) : options_(options) {}

  // Total: never fails, never blocks. Appends to *out.
  void Step(Timestamp now, const Event& event, Effects* out);

  // When Step(Tick) must come at the latest; none: nothing is pending.
  std::optional<Timestamp> NextWakeup() const;

  // 0: no registration stands.
  Incarnation incarnation() const { return registered_ ? incarnation_ : 0; }
  bool registered() const { return registered_; }
  const std::map<JobId, JobView>& jobs() const { return jobs_; }

 private:
  void On(Timestamp now, const SessionOpened& e, Effects* out);
  void On(Timestamp now, const SessionLost& e, Effects* out);
  void On(Timestamp now, const Registered& e, Effects* out);
  void On(Timestamp now, const Heard& e, Effects* out);
  void On(Timestamp now, const Warm& e, Effects* out);
  void On(Timestamp now, const Prepare& e, Effects* out);
  void On(Timestamp now, const Activate& e, Effects* out);
  void On(Timestamp now, const StopJob& e, Effects* out);
  void On(Timestamp now, const Committed& e, Effects* out);
  void On(Timestamp now, const Persist& e, Effects* out);
  void On(Timestamp now, const RepairShard& e, Effects* out);
  void On(Timestamp now, const BuildShard& e, Effects* out);
  void On(Timestamp now, const ToldAck& e, Effects* out);
  void On(Timestamp now, const TailLogs& e, Effects* out);
  void On(Timestamp now, const KillForDrill& e, Effects* out);
  void On(Timestamp now, const KeeperAttached& e, Effects* out);
  void On(Timestamp now, const KeeperGone& e, Effects* out);
  void On(Timestamp now, const WorkerStarted& e, Effects* out);
  void On(Timestamp now, const WorkerStartFailed& e, Effects* out);
  void On(Timestamp now, const WorkerExited& e, Effects* out);
  void On(Timestamp now, const WorkerParked& e, Effects* out);
  void On(Timestamp now, const WorkerTold& e, Effects* out);
  void On(Timestamp now, const WorkerStalled& e, Effects* out);
  void On(Timestamp now, const ForkServerState& e, Effects* out);
  void On(Timestamp now, const StoreReady& e, Effects* out);
  void On(Timestamp now, const StoreFailed& e, Effects* out);
  void On(Timestamp now, const Surveyed& e, Effects* out);
  void On(Timestamp now, const ShardCopied& e, Effects* out);
  void On(Timestamp now, const ShardDamaged& e, Effects* out);
  void On(Timestamp now, const Persisted& e, Effects* out);
  void On(Timestamp now, const StepCaptured& e, Effects* out);
  void On(Timestamp now, const Notice& e, Effects* out);
  void On(Timestamp now, const Tick& e, Effects* out);

  // The door: false, with a Dropped effect, when the command is of another registration or was
  // seen.
  bool Current(const Header& header, const char* what, Effects* out);
  JobView* Find(const JobId& job);

  void SendRegistration(Effects* out);
  void ResumeAnswers(Effects* out);
  void Beat(Timestamp now, Effects* out);
  void CheckController(Timestamp now, Effects* out);  // silent for a lease: away
  void AdvancePrepare(const JobId& id, JobView* job, Effects* out);
  void AnswerPrepare(const JobId& id, const JobView& job, Effects* out);
  void RefusePrepare(const JobId& id, JobView* job, std::string message, Effects* out);
  void AnswerActivate(const JobId& id, const JobView& job, Effects* out);
  void FailActivate(const JobId& id, JobView* job, std::string message, Effects* out);
  void BeginStop(Timestamp now, const JobId& id, JobView* job, Generation generation, bool forget,
                 Duration grace, Effects* out);
  // May erase the job: take no pointer across it.
  void Advance(const JobId& id, Effects* out);
  template <typename T>
  void Say(T message, Effects* out);

  const CoreOptions options_;
  bool keeper_attached_ = false;
  std::string keeper_loss_;  // not told yet
  bool session_open_ = false;
  bool register_sent_ = false;
  bool registered_ = false;
  Effects unsaid_;               // reports made after Register was sent and before it was answered
  Incarnation incarnation_ = 0;  // newest registration that stood
  std::uint64_t last_sequence_ = 0;
  Duration interval_ = {};
  std::uint64_t beat_ = 0;
  std::optional<Timestamp> next_beat_;
  Timestamp now_;
  Duration lease_ = {};               // of this node, as of the registration
  std::optional<Timestamp> away_at_;  // its answers stay out until then; none: it never answered
  bool away_ = false;                 // they did, the stream is open
  std::optional<Notice> notice_;
  std::optional<Timestamp> notice_deadline_;
  std::map<JobId, JobView> jobs_;
};

template <typename T>
void AgentCore::Say(T message, Effects* out) {
  // Without a registration nothing is said: the next one carries the state itself. What happens
  // while its answer is under way is in neither, and waits.
  if (registered_) {
    out->push_back(std::move(message));
  } else if (register_sent_ && unsaid_.size() < options_.max_unsaid) {
    unsaid_.push_back(std::move(message));
  }
}

}  // namespace everstep::agent
