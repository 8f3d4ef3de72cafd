// The admin service's half that shows what workers told: the ledger, the profile, the plan.
#include "controller/server/admin_service.h"
#include "controller/server/status.h"
#include "controller/store/convert.h"

namespace everstep::controller {

grpc::ServerUnaryReactor* AdminService::GetLedger(Context* context,
                                                  const v1::GetLedgerRequest* request,
                                                  v1::JobLedger* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    std::string error;
    const JobStateView* job = FindJobByPrefix(brain_->state(), request->job(), &error);
    if (job == nullptr) return reactor->Finish({grpc::StatusCode::NOT_FOUND, error});
    reply->set_job(job->record.spec.job);
    reply->set_state(JobStateName(job->record.state));
    if (!job->ledger.job.empty()) ToProto(job->ledger, reply->mutable_ledger());
    for (const auto& [generation, layout] : job->layouts) ToProto(layout, reply->add_layouts());
    // While it runs its newest steps are on their way, and those of a run that was broken off may
    // have been lost with it.
    const bool over = job->record.state == JobState::kSucceeded;
    for (const LedgerFinding& fault :
         VerifyLedger(job->ledger, job->layouts, over ? job->step : kNoStep)) {
      ToProto(fault, reply->add_faults());
    }
    reply->set_whole(!job->ledger.job.empty() && reply->faults().empty());
    for (const LedgerRollBack& back : job->ledger.roll_backs) {
      reply->add_reasons(ReasonName(back.reason));
    }
    reactor->Finish(grpc::Status::OK);
  });
}

grpc::ServerUnaryReactor* AdminService::GetTold(Context* context, const v1::GetToldRequest* request,
                                                v1::JobTold* reply) {
  return OnBrain(context, [this, request, reply](Unary* reactor) {
    std::string error;
    const JobStateView* job = FindJobByPrefix(brain_->state(), request->job(), &error);
    if (job == nullptr) return reactor->Finish({grpc::StatusCode::NOT_FOUND, error});
    reply->set_job(job->record.spec.job);
    reply->set_state(JobStateName(job->record.state));
    reply->set_generation(job->record.generation);
    for (const auto& [kind, told] : job->told) ToProto(told, reply->add_items());
    reactor->Finish(grpc::Status::OK);
  });
}

}  // namespace everstep::controller
