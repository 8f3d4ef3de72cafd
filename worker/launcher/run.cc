#include "worker/launcher/run.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/base/whole_file.h"
#include "worker/launcher/admin_client.h"
#include "worker/launcher/brought.h"
#include "worker/launcher/console.h"
#include "worker/launcher/endpoint.h"
#include "worker/launcher/exit_codes.h"
#include "worker/launcher/inbox.h"
#include "worker/launcher/job_spec.h"
#include "worker/launcher/log_follower.h"
#include "worker/launcher/machine.h"
#include "worker/launcher/meeting.h"
#include "worker/launcher/signals.h"
#include "worker/launcher/state_dir.h"
#include "worker/launcher/story.h"
#include "worker/launcher/summary.h"

namespace everstep::launcher {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kLastLinesLimit{2'000};  // after the end of a job on a standing cluster
constexpr milliseconds kLogPoll{20};            // how late a worker's line may show
constexpr milliseconds kIdlePoll{200};
constexpr milliseconds kSubmitLimit{20'000};
constexpr milliseconds kReachLimit{5'000};    // a standing controller may be starting again
constexpr milliseconds kForeignLimit{3'000};  // a controller that has just started answers by then
constexpr milliseconds kCancelLimit{2'000};
constexpr milliseconds kCancelSlack{10'000};  // beyond the workers' own grace
constexpr milliseconds kFarewellLimit{5'000};
constexpr milliseconds kSilenceIsNews{2'000};

enum class Place : std::uint8_t {
  kAlone,    // one node, its controller on loopback
  kNodes,    // one of several launchers that meet at an endpoint
  kCluster,  // a standing controller
};

class Runner {
 public:
  explicit Runner(const RunRequest& request)
      : request_(request),
        flags_(request.flags),
        console_(::isatty(STDERR_FILENO) != 0),
        signals_(flags_.signals_to_handle) {
    place_ = flags_.standalone                           ? Place::kAlone
             : !flags_.controller.empty()                ? Place::kCluster
             : flags_.max_nodes > 1 || flags_.spares > 0 ? Place::kNodes
                                                         : Place::kAlone;
  }

  int Run() {
    if (std::string wrong = Describe(); !wrong.empty()) return Refuse(wrong);
    if (flags_.dry_run) {
      fmt::print("{}\n", JobSpecJson(spec_));
      return kExitSucceeded;
    }
    std::string wrong = place_ == Place::kCluster ? Reach() : Bring();
    if (wrong.empty()) return FollowToTheEnd();
    brought_.reset();
    state_.Clean();
    return failure_;
  }

 private:
  int Refuse(const std::string& sentence, int code = kExitUsage) {
    console_.Text(sentence + "\n");
    failure_ = code;
    return code;
  }
  std::string Fail(const std::string& sentence) {
    Refuse("everstep-run: " + sentence, kExitFailed);
    return sentence;
  }

  // The job as it will be handed in. Looks at the machine, starts nothing.
  std::string Describe() {
    SubmitterFacts facts;
    std::string wrong = GatherFacts(flags_, request_.environment, request_.command, &facts);
    if (!wrong.empty()) return wrong;
    const bool file =
        flags_.script_kind == ScriptKind::kPython || flags_.script_kind == ScriptKind::kRunPath;
    std::error_code error;
    if (file && place_ != Place::kCluster && !std::filesystem::exists(flags_.script, error)) {
      return fmt::format(
          "everstep-run: there is no script {} in {}; correct the path, or use -m for a module and "
          "--no-python for a program",
          flags_.script, facts.cwd);
    }
    random_ = facts.random;
    return MakeJobSpec(flags_, facts, &spec_);
  }

  // Brings this node's agent, and the controller where that is this launcher's part.
  std::string Bring() {
    Endpoint endpoint{"127.0.0.1", 0, true, true, {}};
    if (place_ == Place::kNodes) {
      endpoint = FindEndpoint(flags_);
      if (!endpoint.error.empty()) {
        Refuse(endpoint.error);
        return endpoint.error;
      }
    }
    const std::string node =
        place_ == Place::kAlone ? HostLabel() : fmt::format("{}-{}", HostLabel(), random_);
    if (std::string wrong = state_.Open(flags_.state_dir, node, request_.environment, random_);
        !wrong.empty()) {
      Refuse(wrong, kExitFailed);
      return wrong;
    }
    BroughtOptions options;
    options.programs = request_.programs;
    options.environment = request_.environment;
    options.state = &state_;
    options.address = place_ == Place::kAlone ? "127.0.0.1" : LocalAddress(flags_, endpoint);
    if (place_ == Place::kNodes) {  // every node has a shell, an interpreter and devices of its own
      options.local_command = state_.node_dir() + "/command";
      const int wrong = WriteWhole(options.local_command, spec_.command().SerializeAsString());
      if (wrong != 0) return Fail(CannotWrite(options.local_command, wrong));
    }
    options.leave_timeout = milliseconds(place_ == Place::kAlone ? 0 : 5'000);
    options.stop_grace = milliseconds(flags_.shutdown_timeout_seconds * 1000);
    options.say = [this](const std::string& line) { console_.Say(line); };
    const std::string own = options.address;
    brought_ = std::make_unique<Brought>(std::move(options));

    std::string address = endpoint.text();
    if (endpoint.here && endpoint.port != 0) endpoint.here = !Taken(endpoint);
    const bool foreign = !endpoint.here && Taken(endpoint);
    if (endpoint.here) {
      if (!endpoint.loopback) {
        console_.Say(
            fmt::format("the controller listens on {}; its channel is not encrypted", address));
      }
      const std::string wrong = brought_->StartController({.listen = address});
      if (!wrong.empty() && !(brought_->controller_address_taken() && place_ == Place::kNodes)) {
        return Fail(wrong);
      }
      endpoint.here = wrong.empty();  // else another launcher of this machine was faster
      if (endpoint.here) address = brought_->controller_address();
    }
    client_ = std::make_unique<AdminClient>(address);
    v1::ClusterStatus status;
    if (foreign && !client_->Status(&status, kForeignLimit).ok()) {
      return Fail(fmt::format(
          "{} is in use by a program that is no Everstep controller; name a free port in "
          "--rdzv-endpoint (or --master-port), or end that program",
          address));
    }
    std::map<std::string, std::string> labels;
    if (place_ == Place::kNodes) {
      meeting_ = std::make_unique<Meeting>(
          Meeting::Options{node, own, address, endpoint.here, [this] { inbox_.Wake(); }});
      if (std::string wrong = meeting_->Open(); !wrong.empty()) return Fail(wrong);
      labels = meeting_->Labels();
    }
    if (std::string wrong = brought_->StartAgent(address, labels); !wrong.empty())
      return Fail(wrong);
    return endpoint.here ? Submit() : Join(address);
  }

  // Two launchers of one machine: the first owns the endpoint, as under torchrun.
  static bool Taken(const Endpoint& endpoint) {
    return ProbeTcp(endpoint.host, endpoint.port, 500) == Probe::kListens;
  }

  std::string Reach() {
    client_ = std::make_unique<AdminClient>(flags_.controller);
    return Submit();
  }

  std::string Submit() {
    const CallResult result =
        client_->Submit(spec_, &job_, place_ == Place::kCluster ? kReachLimit : kSubmitLimit);
    if (result.ok()) return {};
    if (result.kind == CallResult::Kind::kUnreachable) {
      return Fail(fmt::format(
          "the controller {} does not answer: {}; is it running?",
          place_ == Place::kCluster ? flags_.controller : brought_->controller_address(),
          result.message));
    }
    return Fail(fmt::format("the job was refused: {}", result.message));
  }

  // Another launcher brings the controller and hands the job in: waits for both.
  std::string Join(const std::string& address) {
    const auto deadline =
        steady_clock::now() + milliseconds(std::max(spec_.join_timeout_ms(), 1000U));
    bool said = false;
    while (steady_clock::now() < deadline) {
      v1::JobList jobs;
      const CallResult result = client_->List(&jobs, kLogPoll * 10);
      for (const v1::JobStatus& job : jobs.items()) {
        if (!flags_.name.empty() && job.job() != flags_.name) continue;
        job_ = job.job();
        return {};
      }
      if (!result.ok() && !said) {
        console_.Say(fmt::format("waiting for the controller at {}", address));
        said = true;
      }
      std::vector<pollfd> polled = {{signals_.descriptor(), POLLIN, 0}};
      brought_->AddTo(&polled);
      ::poll(polled.data(), polled.size(), static_cast<int>(kLogPoll.count()));
      if (signals_.Take()) return Fail("stopped by a signal before the job was found");
      if (std::string wrong = brought_->Tend(); !wrong.empty()) return Fail(wrong);
    }
    Refuse(
        fmt::format(
            "everstep-run: no job at {} within {} s; start the launcher of that machine, or raise "
            "join_timeout in --rdzv-conf",
            address, spec_.join_timeout_ms() / 1000),
        kExitCapacity);
    return "no job";
  }

  int FollowToTheEnd() {
    if (meeting_ != nullptr) meeting_->Start();
    client_->Follow(
        job_, /*with_snapshot=*/place_ == Place::kNodes,
        [this](v1::JobStatus status) { inbox_.PutStatus(std::move(status)); },
        [this](const CallResult& why) { inbox_.PutLost(why.message); });
    FollowOptions follow;
    follow.workers = spec_.nproc_per_node();
    follow.redirects = flags_.redirects;
    follow.tee = flags_.tee;
    follow.local_ranks_filter = flags_.local_ranks_filter;
    follow.role = flags_.role;
    follow.stdout_filters = flags_.duplicate_stdout_filters;
    follow.stderr_filters = flags_.duplicate_stderr_filters;
    const auto prefix = request_.environment.find("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE");
    if (prefix != request_.environment.end()) follow.prefix_template = prefix->second;
    if (place_ == Place::kNodes)
      follow.rank_of = [this](std::int32_t local) { return RankOf(local); };
    if (place_ == Place::kCluster) {
      client_->Tail(job_, [this](const v1::JobLogLines& lines) { inbox_.PutLines(lines); });
    } else {
      follow.dir = LogsOf();
      logs_ = std::make_unique<LogFollower>(
          follow, [this](bool err, std::string_view bytes) { console_.Worker(err, bytes); });
    }
    while (!over_) {
      std::vector<pollfd> polled = {{signals_.descriptor(), POLLIN, 0},
                                    {inbox_.descriptor(), POLLIN, 0}};
      if (brought_ != nullptr) brought_->AddTo(&polled);
      ::poll(polled.data(), polled.size(), static_cast<int>(PollTime().count()));
      if (logs_ != nullptr) {
        busy_ = logs_->Poll() > 0;
      }
      while (const std::optional<int> signal = signals_.Take()) OnSignal(*signal);
      OnInbox(inbox_.Take());
      if (meeting_ != nullptr) OnMeeting(meeting_->TakeNews());
      if (brought_ != nullptr && !over_) {
        if (std::string wrong = brought_->Tend(); !wrong.empty()) {
          console_.Say(wrong);
          over_ = true;
        }
      }
      CheckDeadlines();
    }
    return Finish();
  }

  // Of this node's worker, in the newest generation that is known.
  std::int32_t RankOf(std::int32_t local_rank) const {
    for (const v1::RankStatus& rank : newest_.ranks()) {
      if (rank.node() == state_.node() && rank.local_rank() == local_rank) return rank.rank();
    }
    return local_rank;
  }

  milliseconds PollTime() const {
    if (busy_) return milliseconds(0);
    return logs_ != nullptr ? kLogPoll : kIdlePoll;
  }

  void OnInbox(Inbox::Content content) {
    for (const v1::JobLogLines& lines : content.lines) {
      console_.Worker(lines.from_stderr(), ShownLines(flags_, spec_.nproc_per_node(), lines));
    }
    if (!content.lost.empty() && !lost_since_) {
      lost_since_ = steady_clock::now();
      if (meeting_ != nullptr) meeting_->SetFollowed(false);
    }
    if (!content.status) return;
    if (meeting_ != nullptr) {
      if (const auto controllers = meeting_->OnStatus(*content.status, client_->address())) {
        client_->SetAddresses(*controllers);
        if (std::string wrong = brought_->SetControllers(*controllers); !wrong.empty()) {
          console_.Say(wrong);
        }
      }
    }
    lost_since_.reset();
    lost_said_ = false;
    newest_ = std::move(*content.status);
    for (const std::string& line : story_.News(newest_)) console_.Say(line);
    console_.SetLive(LiveLine(newest_));
    over_ = over_ || IsTerminal(newest_);
    CheckWorkers();
  }

  // torchrun lets nodes differ; here all nodes of a job are alike.
  void CheckWorkers() {
    if (place_ != Place::kNodes || over_ || newest_.nodes() == 0 || newest_.world_size() == 0)
      return;
    const std::uint32_t workers = newest_.world_size() / newest_.nodes();
    if (workers == spec_.nproc_per_node()) return;
    console_.Say(fmt::format(
        "--nproc-per-node is {} here and {} on the node that handed the job in; give all "
        "nodes the same",
        spec_.nproc_per_node(), workers));
    left_ = true;
    over_ = true;
  }

  // The controller died with its machine, and it is this launcher's turn.
  void OnMeeting(const Meeting::News& news) {
    if (news.redial) client_->Redial({});
    if (!news.say.empty()) console_.Say(news.say);
    if (!news.act || over_) return;
    if (news.act->verdict == Verdict::kTakeOver && brought_->has_controller()) return;
    if (news.act->verdict == Verdict::kStepDown) {
      console_.Say(fmt::format("{}; stopping here", news.act->why));
      cut_off_ = true;
      forced_ = true;
      over_ = true;
      return;
    }
    console_.Say(fmt::format("{}; starting a controller here", news.act->why));
    const std::string file = state_.controller() + "/snapshot";
    const std::string address = meeting_->ReleaseControllerAddress();
    std::string wrong;
    const int unwritten = WriteWhole(file, meeting_->snapshot());
    if (unwritten != 0) wrong = CannotWrite(file, unwritten);
    if (wrong.empty()) {
      wrong = brought_->StartController(
          {.listen = address, .snapshot = file, .known_dead = news.act->dead});
    }
    if (wrong.empty()) {
      client_->Redial(address);
    } else {
      console_.Say(wrong);
    }
  }

  void OnSignal(int signal) {
    if (cancelled_) {
      console_.Say(fmt::format("{} again: stopping at once", SignalLabel(signal)));
      forced_ = true;
      over_ = true;
      return;
    }
    if (CanLeave()) {
      // The others train on without this node, as under torchrun.
      console_.Say(fmt::format("{}: this node leaves the job, which runs on", SignalLabel(signal)));
      left_ = true;
      over_ = true;
      return;
    }
    cancelled_ = true;
    console_.Say(fmt::format("{}: stopping the workers, at most {} s; once more stops them at once",
                             SignalLabel(signal), flags_.shutdown_timeout_seconds));
    cancel_deadline_ =
        steady_clock::now() + milliseconds(flags_.shutdown_timeout_seconds * 1000) + kCancelSlack;
    const CallResult result = client_->Cancel(job_, SignalLabel(signal), kCancelLimit);
    if (result.ok()) return;
    console_.Say(fmt::format("the controller does not take the cancel ({})", result.message));
    over_ = brought_ != nullptr;
  }

  bool CanLeave() const {
    if (place_ != Place::kNodes || newest_.state() != "RUNNING") return false;
    const auto& members = newest_.members();
    const bool member = std::find(members.begin(), members.end(), state_.node()) != members.end();
    return !member || newest_.nodes() > newest_.min_nodes() || newest_.spares() > 0;
  }

  // The controller must not go before the other launchers know how the job ended.
  void AwaitOthers() {
    const auto deadline = steady_clock::now() + kFarewellLimit;
    while (steady_clock::now() < deadline) {
      v1::ClusterStatus status;
      if (!client_->Status(&status, kCancelLimit).ok()) return;
      const bool others =
          std::any_of(status.nodes().begin(), status.nodes().end(), [this](const auto& node) {
            return node.node() != state_.node() && node.state() == "ALIVE";
          });
      if (!others || signals_.Take()) return;
      std::this_thread::sleep_for(kLogPoll);
    }
  }

  void CheckDeadlines() {
    const auto now = steady_clock::now();
    if (cancelled_ && now > cancel_deadline_ && !over_) {
      console_.Say("the workers did not end in time; stopping them at once");
      forced_ = true;
      over_ = true;
    }
    if (lost_since_ && !lost_said_ && now - *lost_since_ > kSilenceIsNews) {
      lost_said_ = true;
      console_.Say("the controller does not answer; the workers run on, trying again");
    }
  }

  // The job is over before its last lines are here.
  void AwaitLastLines() {
    const auto deadline = steady_clock::now() + kLastLinesLimit;
    for (bool ended = false; !ended && steady_clock::now() < deadline;) {
      ended = client_->TailEnded();  // before the look: what came before the end is in the inbox
      if (!ended) {
        pollfd news{inbox_.descriptor(), POLLIN, 0};
        ::poll(&news, 1, 20);
      }
      Inbox::Content content = inbox_.Take();
      content.status.reset();
      OnInbox(std::move(content));
    }
  }

  int Finish() {
    const bool known = IsTerminal(newest_);
    if (known && place_ == Place::kCluster && !forced_) AwaitLastLines();
    using How = Brought::How;
    const How how = forced_ ? How::kAtOnce : known ? How::kIdle : How::kInOrder;
    if (brought_ != nullptr && !brought_->StopNode(how) && !forced_) {
      console_.Say("the agent did not end in time and was killed");
    }
    if (logs_ != nullptr) logs_->Finish();
    console_.SetLive({});
    inbox_.Close();
    client_->EndFollow();
    if (known && meeting_ != nullptr && brought_->has_controller() && !forced_) AwaitOthers();
    if (brought_ != nullptr) brought_->StopController(how);
    int code = cut_off_ ? kExitCapacity : kExitFailed;
    std::string log_dir;
    if (known) {
      const RunOutcome outcome = OutcomeOf(newest_, flags_.script, LogsOf());
      code = outcome.exit_code;
      console_.Text(FormatSummary(outcome));
    } else {
      console_.Say(fmt::format("{}, exit code {}",
                               left_      ? "this node left the job"
                               : cut_off_ ? "this node was cut off from the job"
                                          : "the run was cut off",
                               code));
    }
    const bool asked_for_logs = flags_.redirects != StreamSpec() || flags_.tee != StreamSpec();
    if (code == kExitSucceeded && !(asked_for_logs && flags_.log_dir.empty())) {
      state_.Clean();
    } else {
      state_.CleanButLogs();
    }
    return code;
  }

  // Where a person finds what the workers wrote.
  std::string LogsOf() const {
    if (place_ == Place::kCluster) {
      return fmt::format("everstep logs --controller {} {}", flags_.controller, job_);
    }
    const std::string& wanted = spec_.command().log_dir();
    return wanted.empty() ? fmt::format("{}/jobs/{}", state_.node_dir(), job_)
                          : fmt::format("{}/{}_{}", wanted, job_, state_.node());
  }

  const RunRequest& request_;
  const LaunchFlags& flags_;
  Place place_;
  Console console_;
  Signals signals_;
  int failure_ = kExitFailed;
  std::string random_;
  v1::JobSpec spec_;
  std::string job_;
  StateDir state_;
  std::unique_ptr<Brought> brought_;
  Inbox inbox_;
  std::unique_ptr<Meeting> meeting_;
  std::unique_ptr<AdminClient> client_;  // its threads write to inbox_: ends first
  std::unique_ptr<LogFollower> logs_;
  Story story_;
  v1::JobStatus newest_;
  bool busy_ = false;
  bool over_ = false;
  bool cancelled_ = false;
  bool forced_ = false;
  bool cut_off_ = false;  // from the other nodes
  bool left_ = false;     // the job runs on without this node
  steady_clock::time_point cancel_deadline_;
  std::optional<steady_clock::time_point> lost_since_;
  bool lost_said_ = false;
};

}  // namespace

int Run(const RunRequest& request) {
  return Runner(request).Run();
}

}  // namespace everstep::launcher
