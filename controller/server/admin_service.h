// AdminService: what the CLI, the launcher and other people ask. Thread-safe.
//
// Reads and changes run on the brain's thread; a change is answered after its batch is durable.
// Texts of errors may carry a second line, "hint: what to do".
#pragma once

#include <functional>
#include <string>

#include "admin.grpc.pb.h"
#include "controller/server/brain.h"

namespace everstep::controller {

class AdminService final : public v1::AdminService::CallbackService {
 public:
  struct Config {
    std::string started;  // RFC 3339
    Timestamp started_at;
    std::function<void()> shutdown;  // null: Shutdown is refused
  };
  // The brain outlives the server.
  AdminService(Brain* brain, Config config) : brain_(brain), config_(std::move(config)) {}

  using Context = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;

  Unary* GetStatus(Context*, const v1::GetStatusRequest*, v1::ClusterStatus*) override;
  Unary* SubmitJob(Context*, const v1::SubmitJobRequest*, v1::SubmitJobReply*) override;
  Unary* ListJobs(Context*, const v1::ListJobsRequest*, v1::JobList*) override;
  Unary* GetJob(Context*, const v1::GetJobRequest*, v1::JobStatus*) override;
  Unary* CancelJob(Context*, const v1::CancelJobRequest*, v1::CancelJobReply*) override;
  Unary* ListNodes(Context*, const v1::ListNodesRequest*, v1::NodeList*) override;
  Unary* DrainNode(Context*, const v1::DrainNodeRequest*, v1::NodeStatus*) override;
  Unary* UndrainNode(Context*, const v1::UndrainNodeRequest*, v1::NodeStatus*) override;
  Unary* SaveCheckpoint(Context*, const v1::SaveCheckpointRequest*, v1::JobStatus*) override;
  Unary* Drill(Context*, const v1::DrillRequest*, v1::DrillReply*) override;
  Unary* GetPlacement(Context*, const v1::GetPlacementRequest*, v1::CheckpointPlacement*) override;
  Unary* ForetellLoss(Context*, const v1::ForetellLossRequest*, v1::LossForecast*) override;
  Unary* GetCheckpoints(Context*, const v1::GetCheckpointsRequest*, v1::JobCheckpoints*) override;
  Unary* RollBack(Context*, const v1::RollBackRequest*, v1::RollBackReply*) override;
  Unary* ReportAnomaly(Context*, const v1::ReportAnomalyRequest*, v1::ReportAnomalyReply*) override;
  Unary* GetLedger(Context*, const v1::GetLedgerRequest*, v1::JobLedger*) override;
  Unary* GetTold(Context*, const v1::GetToldRequest*, v1::JobTold*) override;
  Unary* Shutdown(Context*, const v1::ShutdownRequest*, v1::ShutdownReply*) override;
  grpc::ServerWriteReactor<v1::Event>* WatchEvents(Context*,
                                                   const v1::WatchEventsRequest*) override;
  grpc::ServerWriteReactor<v1::JobStatus>* FollowJob(Context*,
                                                     const v1::FollowJobRequest*) override;
  grpc::ServerWriteReactor<v1::JobLogLines>* TailJobLogs(Context*,
                                                         const v1::TailJobLogsRequest*) override;

 private:
  grpc::Status Refusal() const;  // nothing can be posted
  // `task` runs on the brain's thread and finishes the reactor.
  Unary* OnBrain(Context* context, std::function<void(Unary*)> task);
  void ChangeNode(Unary* reactor, const std::string& node,
                  const std::function<Event(RequestId)>& make, v1::NodeStatus* reply);

  Brain* const brain_;
  const Config config_;
};

}  // namespace everstep::controller
