#include "controller/cli/client.h"

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include "proto/wire/admin_dial.h"

namespace everstep::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using std::chrono::system_clock;

constexpr milliseconds kRetryPause{100};

const char* CodeName(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::OK: return "OK";
    case grpc::StatusCode::CANCELLED: return "CANCELLED";
    case grpc::StatusCode::INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case grpc::StatusCode::DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::NOT_FOUND: return "NOT_FOUND";
    case grpc::StatusCode::ALREADY_EXISTS: return "ALREADY_EXISTS";
    case grpc::StatusCode::PERMISSION_DENIED: return "PERMISSION_DENIED";
    case grpc::StatusCode::UNAUTHENTICATED: return "UNAUTHENTICATED";
    case grpc::StatusCode::RESOURCE_EXHAUSTED: return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::FAILED_PRECONDITION: return "FAILED_PRECONDITION";
    case grpc::StatusCode::ABORTED: return "ABORTED";
    case grpc::StatusCode::OUT_OF_RANGE: return "OUT_OF_RANGE";
    case grpc::StatusCode::UNIMPLEMENTED: return "UNIMPLEMENTED";
    case grpc::StatusCode::INTERNAL: return "INTERNAL";
    case grpc::StatusCode::UNAVAILABLE: return "UNAVAILABLE";
    case grpc::StatusCode::DATA_LOSS: return "DATA_LOSS";
    default: return "UNKNOWN";
  }
}

ExitCode ExitOf(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT: return ExitCode::kUsage;
    case grpc::StatusCode::NOT_FOUND: return ExitCode::kNotFound;
    case grpc::StatusCode::PERMISSION_DENIED:
    case grpc::StatusCode::UNAUTHENTICATED: return ExitCode::kForbidden;
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DEADLINE_EXCEEDED: return ExitCode::kUnreachable;
    case grpc::StatusCode::ALREADY_EXISTS:
    case grpc::StatusCode::FAILED_PRECONDITION:
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::OUT_OF_RANGE: return ExitCode::kConflict;
    default: return ExitCode::kFailed;
  }
}

}  // namespace

struct AdminClient::Impl {
  struct Endpoint {
    std::string address;
    std::unique_ptr<v1::AdminService::Stub> stub;
  };
  std::vector<Endpoint> endpoints;
  std::size_t current = 0;

  explicit Impl(const std::string& list) {
    for (std::string& address : wire::SplitAddresses(list)) {
      auto stub = wire::DialAdmin(address);
      endpoints.push_back({std::move(address), std::move(stub)});
    }
  }

  v1::AdminService::Stub& stub() { return *endpoints[current].stub; }
  // A new channel each time: an old one waits out its back-off before it looks again, and a
  // controller that restarts is back sooner.
  void Next() {
    endpoints[current].stub = wire::DialAdmin(endpoints[current].address);
    current = (current + 1) % endpoints.size();
  }
};

namespace {

CliError NoAddress() {
  return {ExitCode::kUsage, "INVALID_ARGUMENT", "no controller is named",
          "give --controller host:port, or set EVERSTEP_CONTROLLER, or start a local cluster: "
          "everstep cluster up --nodes 4"};
}

// A server's text may carry its own hint after a line feed.
CliError FromStatus(const grpc::Status& status, const AdminClient::Options& options) {
  CliError error{ExitOf(status.error_code()), CodeName(status.error_code()), status.error_message(),
                 ""};
  if (const std::size_t line = error.message.find('\n'); line != std::string::npos) {
    error.hint = error.message.substr(line + 1);
    error.message.resize(line);
    error.hint.erase(0, error.hint.find_first_not_of(" \n"));
    if (error.hint.rfind("hint: ", 0) == 0) error.hint.erase(0, 6);
  }
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
      error.message = fmt::format("no controller answers at {}{}", options.controller,
                                  options.named_by.empty() ? "" : " (" + options.named_by + ")");
      if (error.hint.empty()) {
        error.hint = "is it running? see `everstep cluster list`; jobs go on without a controller";
      }
      break;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      error.message = fmt::format("the controller at {} did not answer within {} ms",
                                  options.controller, options.timeout.count());
      error.hint = "try again, or wait longer with --timeout SECONDS";
      break;
    case grpc::StatusCode::UNIMPLEMENTED:
      error.message =
          fmt::format("the controller at {} does not know this call", options.controller);
      error.hint = "compare versions: everstep version, everstep status";
      break;
    default:
      if (error.message.empty()) {
        error.message = fmt::format("the controller at {} answered {} without a text",
                                    options.controller, error.code);
      }
  }
  return error;
}

bool WorthARetry(const grpc::Status& status) {
  return status.error_code() == grpc::StatusCode::UNAVAILABLE;
}

enum class Kind { kRead, kWrite };

template <typename Request, typename Reply>
using Method = grpc::Status (v1::AdminService::Stub::*)(grpc::ClientContext*, const Request&,
                                                        Reply*);

// A write that may have arrived is not sent twice.
template <typename Request, typename Reply, typename ImplT>
Result<Reply> Call(ImplT& impl, const AdminClient::Options& options, Kind kind,
                   Method<Request, Reply> method, const Request& request) {
  if (impl.endpoints.empty()) return NoAddress();
  const auto end = system_clock::now() + options.timeout;
  const auto retry_end = steady_clock::now() + std::min(options.retry, options.timeout);
  std::optional<grpc::Status> away;
  for (std::size_t tried = 1;; ++tried) {
    grpc::ClientContext context;
    context.set_deadline(end);
    Reply reply;
    const grpc::Status status = (impl.stub().*method)(&context, request, &reply);
    if (status.ok()) return reply;
    // Time ran out while nobody was there: that is what a person needs to know.
    if (away && status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
      return FromStatus(*away, options);
    }
    if (WorthARetry(status)) away = status;
    if (!WorthARetry(status) || kind == Kind::kWrite) return FromStatus(status, options);
    impl.Next();
    if (steady_clock::now() >= retry_end) return FromStatus(status, options);
    if (tried % impl.endpoints.size() == 0) std::this_thread::sleep_for(kRetryPause);
  }
}

// Reads streams until one ends otherwise than by a break, or no controller came back in time.
// `open` starts a stream on the stub, `take` is told each message; false from it ends all.
template <typename Message, typename ImplT, typename Open, typename Take>
grpc::Status ReadStream(ImplT& impl, const AdminClient::Options& options,
                        system_clock::time_point deadline, bool resume, const Open& open,
                        const Take& take) {
  auto broken = steady_clock::now();
  for (;;) {
    const auto opened = steady_clock::now();
    grpc::ClientContext context;
    if (deadline != system_clock::time_point::max()) context.set_deadline(deadline);
    auto reader = open(impl.stub(), &context);
    Message message;
    while (reader->Read(&message)) {
      broken = steady_clock::now();
      if (!take(message)) {
        context.TryCancel();
        reader->Finish();
        return grpc::Status::OK;
      }
    }
    grpc::Status status = reader->Finish();
    if (status.ok() || !resume || !WorthARetry(status)) return status;
    const auto now = steady_clock::now();
    if (now - opened >= options.stream_retry) broken = now;  // it was quiet, not away
    if (now - broken >= options.stream_retry) return status;
    impl.Next();
    std::this_thread::sleep_for(kRetryPause);
  }
}

}  // namespace

AdminClient::AdminClient(Options options)
    : options_(std::move(options)), impl_(std::make_unique<Impl>(options_.controller)) {}

AdminClient::~AdminClient() = default;

Result<v1::ClusterStatus> AdminClient::GetStatus() {
  return Call<v1::GetStatusRequest, v1::ClusterStatus>(*impl_, options_, Kind::kRead,
                                                       &v1::AdminService::Stub::GetStatus, {});
}

Result<v1::JobList> AdminClient::ListJobs() {
  return Call<v1::ListJobsRequest, v1::JobList>(*impl_, options_, Kind::kRead,
                                                &v1::AdminService::Stub::ListJobs, {});
}

Result<v1::JobStatus> AdminClient::GetJob(const std::string& job) {
  v1::GetJobRequest request;
  request.set_job(job);
  return Call(*impl_, options_, Kind::kRead, &v1::AdminService::Stub::GetJob, request);
}

Outcome AdminClient::CancelJob(const v1::CancelJobRequest& request) {
  auto reply = Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::CancelJob, request);
  if (!reply.ok()) return reply.error();
  return Done{};
}

Result<v1::CheckpointPlacement> AdminClient::GetPlacement(const v1::GetPlacementRequest& request) {
  return Call<v1::GetPlacementRequest, v1::CheckpointPlacement>(
      *impl_, options_, Kind::kRead, &v1::AdminService::Stub::GetPlacement, request);
}

Result<v1::LossForecast> AdminClient::ForetellLoss(const v1::ForetellLossRequest& request) {
  return Call<v1::ForetellLossRequest, v1::LossForecast>(
      *impl_, options_, Kind::kRead, &v1::AdminService::Stub::ForetellLoss, request);
}

Result<v1::JobCheckpoints> AdminClient::GetCheckpoints(const std::string& job) {
  v1::GetCheckpointsRequest request;
  request.set_job(job);
  return Call<v1::GetCheckpointsRequest, v1::JobCheckpoints>(
      *impl_, options_, Kind::kRead, &v1::AdminService::Stub::GetCheckpoints, request);
}

Result<v1::JobLedger> AdminClient::GetLedger(const std::string& job) {
  v1::GetLedgerRequest request;
  request.set_job(job);
  return Call<v1::GetLedgerRequest, v1::JobLedger>(*impl_, options_, Kind::kRead,
                                                   &v1::AdminService::Stub::GetLedger, request);
}

Result<v1::JobTold> AdminClient::GetTold(const std::string& job) {
  v1::GetToldRequest request;
  request.set_job(job);
  return Call<v1::GetToldRequest, v1::JobTold>(*impl_, options_, Kind::kRead,
                                               &v1::AdminService::Stub::GetTold, request);
}

Result<v1::RollBackReply> AdminClient::RollBack(const v1::RollBackRequest& request) {
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::RollBack, request);
}

Result<v1::ReportAnomalyReply> AdminClient::ReportAnomaly(const v1::ReportAnomalyRequest& request) {
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::ReportAnomaly, request);
}

Result<v1::NodeList> AdminClient::ListNodes() {
  return Call<v1::ListNodesRequest, v1::NodeList>(*impl_, options_, Kind::kRead,
                                                  &v1::AdminService::Stub::ListNodes, {});
}

Result<v1::NodeStatus> AdminClient::DrainNode(const v1::DrainNodeRequest& request) {
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::DrainNode, request);
}

Result<v1::NodeStatus> AdminClient::UndrainNode(const std::string& node) {
  v1::UndrainNodeRequest request;
  request.set_node(node);
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::UndrainNode, request);
}

Result<v1::JobStatus> AdminClient::SaveCheckpoint(const std::string& job) {
  v1::SaveCheckpointRequest request;
  request.set_job(job);
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::SaveCheckpoint, request);
}

Result<v1::DrillReply> AdminClient::Drill(const v1::DrillRequest& request) {
  return Call(*impl_, options_, Kind::kWrite, &v1::AdminService::Stub::Drill, request);
}

Outcome AdminClient::WatchEvents(v1::WatchEventsRequest request,
                                 const std::function<bool(const v1::Event&)>& take) {
  if (impl_->endpoints.empty()) return NoAddress();
  const auto deadline =
      request.follow() ? system_clock::time_point::max() : system_clock::now() + options_.timeout;
  const grpc::Status status = ReadStream<v1::Event>(
      *impl_, options_, deadline, /*resume=*/true,
      [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
        return stub.WatchEvents(context, request);
      },
      [&](const v1::Event& event) {
        request.set_since_sequence(event.sequence() + 1);
        if (request.follow()) request.set_limit(0);  // a resumed stream wants all that was missed
        return take(event);
      });
  if (!status.ok()) return FromStatus(status, options_);
  return Done{};
}

Outcome AdminClient::TailJobLogs(const v1::TailJobLogsRequest& request,
                                 const std::function<bool(const v1::JobLogLines&)>& take) {
  if (impl_->endpoints.empty()) return NoAddress();
  const auto deadline =
      request.follow() ? system_clock::time_point::max() : system_clock::now() + options_.timeout;
  // Not resumed: lines carry no position, and a line shown twice is worse than an end that says
  // why.
  const grpc::Status status = ReadStream<v1::JobLogLines>(
      *impl_, options_, deadline, /*resume=*/false,
      [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
        return stub.TailJobLogs(context, request);
      },
      take);
  if (!status.ok()) return FromStatus(status, options_);
  return Done{};
}

Outcome AdminClient::FollowJob(const std::string& job, milliseconds timeout,
                               const std::function<bool(const v1::JobStatus&)>& take) {
  if (impl_->endpoints.empty()) return NoAddress();
  v1::FollowJobRequest request;
  request.set_job(job);
  const auto deadline =
      timeout.count() == 0 ? system_clock::time_point::max() : system_clock::now() + timeout;
  const grpc::Status status = ReadStream<v1::JobStatus>(
      *impl_, options_, deadline, /*resume=*/true,
      [&](v1::AdminService::Stub& stub, grpc::ClientContext* context) {
        return stub.FollowJob(context, request);
      },
      [&](const v1::JobStatus& now) { return take(now) && !IsTerminal(now); });
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return CliError{ExitCode::kTimeout, "DEADLINE_EXCEEDED",
                    fmt::format("job {} did not end within {} s", job,
                                static_cast<double>(timeout.count()) / 1000.0),
                    fmt::format("see what it does: everstep job show {}", job)};
  }
  if (!status.ok()) return FromStatus(status, options_);
  return Done{};
}

}  // namespace everstep::cli
