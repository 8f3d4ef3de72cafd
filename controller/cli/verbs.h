// One function a command; each lives in the verb_*.cc of its group.
#pragma once

#include "controller/cli/context.h"

namespace everstep::cli {

// What a command answers: the exit code of its success (waits have more than one), or an error.
using VerbResult = Result<ExitCode>;

VerbResult RunStatus(Context& context);

VerbResult RunJobList(Context& context);
VerbResult RunJobShow(Context& context);
VerbResult RunJobWait(Context& context);
VerbResult RunJobCancel(Context& context);
VerbResult RunJobLedger(Context& context);
VerbResult RunJobPlan(Context& context);

VerbResult RunNodeList(Context& context);
VerbResult RunNodeShow(Context& context);
VerbResult RunNodeDrain(Context& context);
VerbResult RunNodeUndrain(Context& context);

VerbResult RunCkptPlacement(Context& context);
VerbResult RunCkptSurvive(Context& context);
VerbResult RunCkptTraffic(Context& context);

VerbResult RunCkptList(Context& context);
VerbResult RunCkptShow(Context& context);
VerbResult RunCkptVerify(Context& context);
VerbResult RunCkptSave(Context& context);
VerbResult RunCkptPrune(Context& context);
VerbResult RunCkptExport(Context& context);
VerbResult RunCkptDiff(Context& context);
VerbResult RunCkptPlan(Context& context);
VerbResult RunCkptRollback(Context& context);
VerbResult RunCkptAnomaly(Context& context);
// `ckpt show JOB`: what the controller knows of a job's checkpoints, memory and files.
VerbResult ShowJobCheckpoints(Context& context, AdminClient* client, const std::string& job);

VerbResult RunPlanTemplates(Context& context);
VerbResult RunPlanCompose(Context& context);
VerbResult RunPlanLose(Context& context);
VerbResult RunPlanJoin(Context& context);
VerbResult RunPlanExplain(Context& context);
VerbResult RunSimulate(Context& context);

VerbResult RunEvents(Context& context);
VerbResult RunLogs(Context& context);

VerbResult RunVersion(Context& context);
VerbResult RunHelp(Context& context);
VerbResult RunCompletion(Context& context);
VerbResult RunComplete(Context& context);
VerbResult RunDocs(Context& context);
// Becomes everstep-run, or another program beside this one; returns only with an error.
VerbResult RunProgramBeside(Context& context, const std::string& called_as);

VerbResult RunClusterUp(Context& context);
VerbResult RunClusterDown(Context& context);
VerbResult RunClusterList(Context& context);
VerbResult RunClusterSupervise(Context& context);
VerbResult RunClusterStart(Context& context);

// kill, pause, resume of a worker, node, agent, keeper, controller.
VerbResult RunDrill(Context& context, Verb verb);

// A job's full name from a beginning of it; an unknown one names the nearest.
Result<v1::JobStatus> FindJob(AdminClient* client, const std::string& name);
Result<v1::NodeStatus> FindNode(AdminClient* client, const std::string& name);

// {"apiVersion":"everstep/v1","kind":KIND,"items":[...]} of lines of JSON.
std::string JsonItems(const std::string& kind, const std::vector<std::string>& items);

}  // namespace everstep::cli
