// The CLI's end of AdminService: every call has a deadline, every failure a name and a hint.
//
// Not thread-safe. Calls block. gRPC's headers stay in client.cc.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "admin.pb.h"
#include "controller/cli/result.h"
#include "proto/wire/job_status.h"

namespace everstep::cli {

class AdminClient {
 public:
  struct Options {
    std::string controller;  // "host:port[,host:port...]": tried in turn
    std::string named_by;    // "--controller", "EVERSTEP_CONTROLLER", ...: for errors; may be empty
    // Of one call that is not a stream, retries included.
    std::chrono::milliseconds timeout{10'000};
    // Calls that only read are tried again this long while no controller answers: it may be
    // restarting.
    std::chrono::milliseconds retry{2'000};
    // A stream that broke is resumed when a controller is back within this.
    std::chrono::milliseconds stream_retry{30'000};
  };

  explicit AdminClient(Options options);
  ~AdminClient();
  AdminClient(const AdminClient&) = delete;
  AdminClient& operator=(const AdminClient&) = delete;

  Result<v1::ClusterStatus> GetStatus();
  Result<v1::JobList> ListJobs();
  Result<v1::JobStatus> GetJob(const std::string& job);
  Outcome CancelJob(const v1::CancelJobRequest& request);
  Result<v1::NodeList> ListNodes();
  Result<v1::NodeStatus> DrainNode(const v1::DrainNodeRequest& request);
  Result<v1::NodeStatus> UndrainNode(const std::string& node);
  // Answered when the step is on the disk, or cannot be.
  Result<v1::JobStatus> SaveCheckpoint(const std::string& job);
  Result<v1::DrillReply> Drill(const v1::DrillRequest& request);
  Result<v1::CheckpointPlacement> GetPlacement(const v1::GetPlacementRequest& request);
  Result<v1::LossForecast> ForetellLoss(const v1::ForetellLossRequest& request);
  Result<v1::JobCheckpoints> GetCheckpoints(const std::string& job);
  Result<v1::JobLedger> GetLedger(const std::string& job);
  Result<v1::JobTold> GetTold(const std::string& job);
  Result<v1::RollBackReply> RollBack(const v1::RollBackRequest& request);
  Result<v1::ReportAnomalyReply> ReportAnomaly(const v1::ReportAnomalyRequest& request);

  // Streams. `take` returns false to end the stream, which is a success.
  // Follows across a restart of the controller: after each break from the last sequence on.
  Outcome WatchEvents(v1::WatchEventsRequest request,
                      const std::function<bool(const v1::Event&)>& take);
  Outcome TailJobLogs(const v1::TailJobLogsRequest& request,
                      const std::function<bool(const v1::JobLogLines&)>& take);
  // Until `take` returns false, the job is in a terminal state, or `timeout` passed (0: never;
  // then the error is kTimeout). Survives a restart of the controller.
  Outcome FollowJob(const std::string& job, std::chrono::milliseconds timeout,
                    const std::function<bool(const v1::JobStatus&)>& take);

  const std::string& controller() const { return options_.controller; }

 private:
  struct Impl;
  Options options_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace everstep::cli
