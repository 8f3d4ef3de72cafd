#include "controller/server/admin_service.h"

#include <sys/random.h>
#include <unistd.h>

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "controller/server/checkpoint_list.h"
#include "controller/server/checkpoint_status.h"
#include "controller/server/queued_writes.h"
#include "controller/server/status.h"
#include "controller/store/convert.h"
#include "proto/base/clock.h"
#include "proto/base/names.h"
#include "proto/base/version.h"

namespace everstep::controller {
namespace {

constexpr std::size_t kMaxCommandBytes = 4u << 20;
constexpr std::uint32_t kMaxWorkersPerNode = 1024;
constexpr std::size_t kMaxWhy = 1024;  // bytes of an anomaly's description

grpc::Status Ending() {
  return {grpc::StatusCode::UNAVAILABLE, "the controller ends"};
}

grpc::Status TooManyWatchers(std::size_t count) {
  return {grpc::StatusCode::RESOURCE_EXHAUSTED,
          fmt::format("{} streams are open, the limit of this controller\nhint: end others first",
                      count)};
}

grpc::Status StatusOf(const Reply* answer) {
  if (answer == nullptr) return Ending();
  const Reply& reply = *answer;
  grpc::StatusCode code = grpc::StatusCode::OK;
  switch (reply.code) {
    case ReplyCode::kOk: return grpc::Status::OK;
    case ReplyCode::kNotFound: code = grpc::StatusCode::NOT_FOUND; break;
    case ReplyCode::kAlreadyExists: code = grpc::StatusCode::ALREADY_EXISTS; break;
    case ReplyCode::kFailedPrecondition: code = grpc::StatusCode::FAILED_PRECONDITION; break;
    case ReplyCode::kInvalid: code = grpc::StatusCode::INVALID_ARGUMENT; break;
  }
  return {code, reply.hint.empty() ? reply.message : reply.message + "\nhint: " + reply.hint};
}

std::string RandomHex(std::size_t bytes) {
  std::string out;
  while (bytes > 0) {
    unsigned char chunk[32];
    const ssize_t n = getrandom(chunk, std::min(bytes, sizeof(chunk)), 0);
    if (n <= 0) continue;  // interrupted
    for (ssize_t i = 0; i < n; ++i) out += fmt::format("{:02x}", chunk[i]);
    bytes -= static_cast<std::size_t>(n);
  }
  return out;
}

// Empty: fine.
std::string CheckSpec(const v1::JobSpec& spec) {
  if (!spec.job().empty() && !IsJobName(spec.job())) {
    return fmt::format(
        "the job name '{}' is not [A-Za-z0-9_.-]{{1,128}}\nhint: choose another --name",
        spec.job().substr(0, 200));
  }
  if (spec.command().target().empty()) return "the job has no script to run\nhint: name one";
  if (spec.nproc_per_node() > kMaxWorkersPerNode) {
    return fmt::format("{} workers on a node are more than {}\nhint: use more nodes",
                       spec.nproc_per_node(), kMaxWorkersPerNode);
  }
  const std::size_t bytes = spec.command().ByteSizeLong();
  if (bytes > kMaxCommandBytes) {
    return fmt::format(
        "the command with its environment has {} bytes, the limit is {}\nhint: start from "
        "a smaller environment",
        bytes, kMaxCommandBytes);
  }
  return {};
}

bool Matches(const JournalRecord& r, const v1::WatchEventsRequest& q) {
  return r.sequence >= q.since_sequence() && (q.job().empty() || r.job == q.job()) &&
         (q.node().empty() || r.node == q.node());
}

// A stream of answers. When it is over the brain forgets the watcher that fed it.
template <typename Message>
class Writer final : public QueuedWrites<grpc::ServerWriteReactor<Message>, Message> {
 public:
  Writer(grpc::CallbackServerContext* context, Brain* brain, QueueLimits limits)
      : QueuedWrites<grpc::ServerWriteReactor<Message>, Message>(context, limits), brain_(brain) {}
  // On the brain's thread.
  void Watches(WatchId id) { watch_ = id; }
  void OnCancel() override { this->End(grpc::Status::CANCELLED); }
  void OnDone() override {
    // On its thread also the order is right: the task that set watch_ ran before.
    brain_->Post(
        [brain = brain_, self = this->shared_from_this(), this] { brain->Unwatch(watch_); });
    this->Done();  // may delete this
  }

 private:
  Brain* const brain_;
  WatchId watch_ = 0;
};

template <typename Message>
std::shared_ptr<Writer<Message>> MakeWriter(grpc::CallbackServerContext* context, Brain* brain,
                                            QueueLimits limits) {
  limits.slow_readers = &brain->counters().slow_readers;
  auto writer = std::make_shared<Writer<Message>>(context, brain, limits);
  writer->Hold();
  return writer;
}

// The job meant by `name`; null: there is none, and the call has been answered so.
const JobStateView* JobOrNotFound(const ClusterState& state, const std::string& name,
                                  grpc::ServerUnaryReactor* reactor) {
  std::string error;
  const JobStateView* job = FindJobByPrefix(state, name, &error);
  if (job == nullptr) reactor->Finish({grpc::StatusCode::NOT_FOUND, error});
  return job;
}

}  // namespace

grpc::ServerUnaryReactor* AdminService::OnBrain(Context* context,
                                                std::function<void(Unary*)> task) {
  Unary* reactor = context->DefaultReactor();
  ++brain_->counters().requests;
  if (!brain_->Post([reactor, task = std::move(task)] { task(reactor); }))
    reactor->Finish(Refusal());
  return reactor;
}

grpc::Status AdminService::Refusal() const {
  if (brain_->stopping()) return Ending();
  return {grpc::StatusCode::RESOURCE_EXHAUSTED,
          "the controller is behind with its work\nhint: try again"};
}

grpc::ServerUnaryReactor* AdminService::GetStatus(Context* context, const v1::GetStatusRequest*,
                                                  v1::ClusterStatus* reply) {
  return OnBrain(context, [this, reply](Unary* reactor) {
    const Timestamp now = brain_->now();
    reply->set_cluster(brain_->store_info().cluster);
    reply->set_version(kVersion);
    reply->set_started(config_.started);
    reply->set_uptime_seconds(ToSeconds(now - config_.started_at));
    reply->set_store(brain_->store_text());
    reply->set_controller_pid(static_cast<std::uint32_t>(getpid()));
    reply->set_starts(brain_->store_info().starts);
    for (const auto& [id, node] : brain_->state().nodes) {
      *reply->add_nodes() = NodeStatusOf(brain_->state(), node, now);
    }
    for (const auto& [id, job] : brain_->state().jobs) {
      *reply->add_jobs() = JobStatusOf(brain_->state(), job, now);
    }
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::SubmitJob(Context* context,
                                                  const v1::SubmitJobRequest* request,
                                                  v1::SubmitJobReply* reply) {
  const std::string wrong = CheckSpec(request->spec());
  if (!wrong.empty()) {
    Unary* reactor = context->DefaultReactor();
    reactor->Finish({grpc::StatusCode::INVALID_ARGUMENT, wrong});
    return reactor;
  }
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    JobSpec spec;
    FromProto(request->spec(), &spec);
    if (spec.job.empty()) spec.job = "job-" + RandomHex(4);
    spec.submitted = brain_->now();
    if (spec.max_no_progress == 0) spec.max_no_progress = JobSpec{}.max_no_progress;
    if (spec.max_start_failures == 0) spec.max_start_failures = JobSpec{}.max_start_failures;
    reply->set_job(spec.job);
    brain_->Request(
        [spec](RequestId id) {
          return controller::SubmitJob{id, spec, RandomHex(16)};
        },
        [reactor](const Reply* answer) { reactor->Finish(StatusOf(answer)); });
  });
}

grpc::ServerUnaryReactor* AdminService::ListJobs(Context* context, const v1::ListJobsRequest*,
                                                 v1::JobList* reply) {
  return OnBrain(context, [this, reply](Unary* reactor) {
    for (const auto& [id, job] : brain_->state().jobs) {
      *reply->add_items() = JobStatusOf(brain_->state(), job, brain_->now());
    }
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::GetJob(Context* context, const v1::GetJobRequest* request,
                                               v1::JobStatus* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    *reply = JobStatusOf(brain_->state(), *job, brain_->now());
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::CancelJob(Context* context,
                                                  const v1::CancelJobRequest* request,
                                                  v1::CancelJobReply*) {
  return OnBrain(context, [this, request](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    const JobId id = job->record.spec.job;
    brain_->Request(
        [id, q = *request](RequestId r) {
          return controller::CancelJob{r, id, q.reason(), q.forget()};
        },
        [reactor](const Reply* answer) { reactor->Finish(StatusOf(answer)); });
  });
}

grpc::ServerUnaryReactor* AdminService::ListNodes(Context* context, const v1::ListNodesRequest*,
                                                  v1::NodeList* reply) {
  return OnBrain(context, [this, reply](Unary* reactor) {
    for (const auto& [id, node] : brain_->state().nodes) {
      v1::NodeStatus* item = reply->add_items();
      *item = NodeStatusOf(brain_->state(), node, brain_->now());
      if (const auto* traffic = brain_->traffic(id)) *item->mutable_traffic() = *traffic;
      if (const auto* scrub = brain_->scrub(id)) *item->mutable_scrub() = *scrub;
    }
    reactor->Finish(grpc::Status::OK);
  });
}

void AdminService::ChangeNode(Unary* reactor, const std::string& node,
                              const std::function<Event(RequestId)>& make, v1::NodeStatus* reply) {
  brain_->Request(make, [this, reactor, node, reply](const Reply* answer) {
    const auto it = brain_->state().nodes.find(node);
    if (it != brain_->state().nodes.end()) {
      *reply = NodeStatusOf(brain_->state(), it->second, brain_->now());
    }
    reactor->Finish(StatusOf(answer));
  });
}

grpc::ServerUnaryReactor* AdminService::DrainNode(Context* context,
                                                  const v1::DrainNodeRequest* request,
                                                  v1::NodeStatus* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    ChangeNode(
        reactor, request->node(),
        [q = *request](RequestId id) {
          const std::string reason =
              q.deadline_ms() == 0
                  ? q.reason()
                  : fmt::format("{} (goes away in {:.0f} s)", q.reason(), q.deadline_ms() / 1000.0);
          return controller::DrainNode{id, q.node(), reason, q.allow_pause()};
        },
        reply);
  });
}

grpc::ServerUnaryReactor* AdminService::UndrainNode(Context* context,
                                                    const v1::UndrainNodeRequest* request,
                                                    v1::NodeStatus* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    ChangeNode(
        reactor, request->node(),
        [node = request->node()](RequestId id) {
          return controller::UndrainNode{id, node};
        },
        reply);
  });
}

grpc::ServerUnaryReactor* AdminService::SaveCheckpoint(Context* context,
                                                       const v1::SaveCheckpointRequest* request,
                                                       v1::JobStatus* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    const JobId id = job->record.spec.job;
    brain_->Request(
        [id](RequestId r) {
          return controller::SaveCheckpoint{r, id};
        },
        [this, reactor, id, reply](const Reply* answer) {
          const auto it = brain_->state().jobs.find(id);
          if (it != brain_->state().jobs.end()) {
            *reply = JobStatusOf(brain_->state(), it->second, brain_->now());
          }
          reactor->Finish(StatusOf(answer));
        });
  });
}

grpc::ServerUnaryReactor* AdminService::Drill(Context* context, const v1::DrillRequest* request,
                                              v1::DrillReply* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    const auto worker = job->workers.find(request->rank());
    if (worker == job->workers.end() || !worker->second.worker.running) {
      reactor->Finish(
          {grpc::StatusCode::FAILED_PRECONDITION,
           fmt::format("job {} runs no rank {} now (state {})\nhint: everstep job show {}",
                       job->record.spec.job, request->rank(), JobStateName(job->record.state),
                       job->record.spec.job)});
      return;
    }
    v1::ControllerMessage message;
    message.mutable_kill_for_drill()->set_job(job->record.spec.job);
    message.mutable_kill_for_drill()->set_rank(request->rank());
    message.mutable_kill_for_drill()->set_signal(request->signal());
    if (!brain_->SendTo(worker->second.node, std::move(message))) {
      reactor->Finish(
          {grpc::StatusCode::FAILED_PRECONDITION,
           fmt::format("node {} is not connected\nhint: everstep node list", worker->second.node)});
      return;
    }
    reply->set_node(worker->second.node);
    reply->set_pid(worker->second.worker.pid);
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::GetPlacement(Context* context,
                                                     const v1::GetPlacementRequest* request,
                                                     v1::CheckpointPlacement* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    *reply = PlacementOf(brain_->state(), *job, request->max_lost());
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::ForetellLoss(Context* context,
                                                     const v1::ForetellLossRequest* request,
                                                     v1::LossForecast* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    std::string error;
    const JobStateView* job = FindJobByPrefix(brain_->state(), request->job(), &error);
    bool found = false;
    std::vector<NodeId> lost;
    if (job == nullptr || !NodesMeant(brain_->state(), *job, *request, &lost, &error, &found)) {
      reactor->Finish(
          {found ? grpc::StatusCode::INVALID_ARGUMENT : grpc::StatusCode::NOT_FOUND, error});
      return;
    }
    *reply = LossForecastOf(brain_->state(), *job, lost, brain_->IfLost(job->record.spec.job, lost),
                            request->count());
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::GetCheckpoints(Context* context,
                                                       const v1::GetCheckpointsRequest* request,
                                                       v1::JobCheckpoints* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    *reply = CheckpointsOf(brain_->state(), *job);
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::RollBack(Context* context,
                                                 const v1::RollBackRequest* request,
                                                 v1::RollBackReply* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    const JobId id = job->record.spec.job;
    reply->set_from_step(job->step);
    const everstep::Step step = request->verified() ? kNoStep : request->step();
    brain_->Request(
        [id, step](RequestId r) {
          return controller::RollBack{r, id, step};
        },
        [this, reactor, id, reply](const Reply* answer) {
          const auto it = brain_->state().jobs.find(id);
          if (it != brain_->state().jobs.end()) {
            const JobRecord& record = it->second.record;
            reply->set_step(record.given_up.empty() ? kNoStep : record.given_up.back().step);
            reply->set_generation(record.generation);
          }
          reactor->Finish(StatusOf(answer));
        });
  });
}

grpc::ServerUnaryReactor* AdminService::ReportAnomaly(Context* context,
                                                      const v1::ReportAnomalyRequest* request,
                                                      v1::ReportAnomalyReply* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    const JobStateView* job = JobOrNotFound(brain_->state(), request->job(), reactor);
    if (job == nullptr) return;
    const JobId id = job->record.spec.job;
    reply->set_step(job->step);
    brain_->Request(
        [id, why = request->why().substr(0, kMaxWhy)](RequestId r) {
          return controller::ReportAnomaly{r, id, why};
        },
        [reactor](const Reply* answer) { reactor->Finish(StatusOf(answer)); });
  });
}

grpc::ServerUnaryReactor* AdminService::Shutdown(Context* context, const v1::ShutdownRequest*,
                                                 v1::ShutdownReply*) {
  Unary* reactor = context->DefaultReactor();
  if (!config_.shutdown) {
    reactor->Finish(
        {grpc::StatusCode::FAILED_PRECONDITION,
         "this controller was not started with --allow-shutdown\nhint: end it where it was "
         "started"});
    return reactor;
  }
  reactor->Finish(grpc::Status::OK);
  config_.shutdown();
  return reactor;
}

grpc::ServerWriteReactor<v1::Event>* AdminService::WatchEvents(
    Context* context, const v1::WatchEventsRequest* request) {
  ++brain_->counters().requests;
  auto writer = MakeWriter<v1::Event>(context, brain_, {.messages = 16384, .bytes = 16u << 20});
  const bool posted = brain_->Post([this, writer, query = *request] {
    const auto& journal = brain_->state().journal;
    if (!journal.empty() && query.since_sequence() != 0 &&
        query.since_sequence() < journal.front().sequence) {
      writer->End({grpc::StatusCode::OUT_OF_RANGE,
                   fmt::format("event {} is forgotten, the oldest kept is {}\nhint: ask from {} on",
                               query.since_sequence(), journal.front().sequence,
                               journal.front().sequence)});
      return;
    }
    std::vector<const JournalRecord*> found;
    for (const JournalRecord& r : journal) {
      if (Matches(r, query)) found.push_back(&r);
    }
    if (query.limit() > 0 && found.size() > query.limit()) {
      found.erase(found.begin(), found.end() - query.limit());
    }
    for (const JournalRecord* r : found) writer->Enqueue(EventOf(*r));
    if (!query.follow()) {
      writer->End(grpc::Status::OK);
      return;
    }
    const WatchId id = brain_->WatchEvents([writer, query](const JournalRecord& r) {
      return !Matches(r, query) || writer->Enqueue(EventOf(r));
    });
    writer->Watches(id);
    if (id == 0) writer->End(TooManyWatchers(brain_->watchers()));
  });
  if (!posted) writer->End(Refusal());
  return writer.get();
}

grpc::ServerWriteReactor<v1::JobStatus>* AdminService::FollowJob(
    Context* context, const v1::FollowJobRequest* request) {
  ++brain_->counters().requests;
  auto writer = MakeWriter<v1::JobStatus>(context, brain_, {.messages = 8, .bytes = 64u << 20});
  const bool posted = brain_->Post([this, writer, query = *request] {
    std::string error;
    const JobStateView* job = FindJobByPrefix(brain_->state(), query.job(), &error);
    if (job == nullptr) {
      writer->End({grpc::StatusCode::NOT_FOUND, error});
      return;
    }
    const WatchId id = brain_->FollowJob(
        job->record.spec.job, query.with_snapshot(), [writer](v1::JobStatus status, bool terminal) {
          // The newest snapshot must arrive, even when the status it came with is out of date.
          const bool taken =
              writer->Replace(std::move(status), [](v1::JobStatus& old, v1::JobStatus* now) {
                if (now->snapshot().empty()) now->set_snapshot(std::move(*old.mutable_snapshot()));
              });
          if (taken && terminal) writer->End(grpc::Status::OK);
          return taken;
        });
    writer->Watches(id);
    if (id == 0) writer->End(TooManyWatchers(brain_->watchers()));
  });
  if (!posted) writer->End(Refusal());
  return writer.get();
}

grpc::ServerWriteReactor<v1::JobLogLines>* AdminService::TailJobLogs(
    Context* context, const v1::TailJobLogsRequest* request) {
  ++brain_->counters().requests;
  auto writer =
      MakeWriter<v1::JobLogLines>(context, brain_, {.messages = 16384, .bytes = 16u << 20});
  const bool posted = brain_->Post([this, writer, query = *request]() mutable {
    std::string error;
    const JobStateView* job = FindJobByPrefix(brain_->state(), query.job(), &error);
    if (job == nullptr) {
      writer->End({grpc::StatusCode::NOT_FOUND, error});
      return;
    }
    query.set_job(job->record.spec.job);
    const WatchId id = brain_->TailLogs(
        query,
        {[writer](v1::JobLogLines lines) { return writer->Enqueue(std::move(lines)); },
         [writer] { writer->End(grpc::Status::OK); }},
        &error);
    writer->Watches(id);
    if (id == 0) writer->End({grpc::StatusCode::FAILED_PRECONDITION, error});
  });
  if (!posted) writer->End(Refusal());
  return writer.get();
}

}  // namespace everstep::controller
