#include "controller/cli/app.h"

#include "controller/cli/manual.h"
#include "controller/cli/tree.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

VerbResult Dispatch(Context& context, const std::string& called_as) {
  const Verb verb = context.args.command()->verb;
  switch (verb) {
    case Verb::kGroup: break;
    case Verb::kStatus: return RunStatus(context);
    case Verb::kJobList: return RunJobList(context);
    case Verb::kJobShow: return RunJobShow(context);
    case Verb::kJobWait: return RunJobWait(context);
    case Verb::kJobCancel: return RunJobCancel(context);
    case Verb::kJobLedger: return RunJobLedger(context);
    case Verb::kJobPlan: return RunJobPlan(context);
    case Verb::kNodeList: return RunNodeList(context);
    case Verb::kNodeShow: return RunNodeShow(context);
    case Verb::kNodeDrain: return RunNodeDrain(context);
    case Verb::kNodeUndrain: return RunNodeUndrain(context);
    case Verb::kCkptPlacement: return RunCkptPlacement(context);
    case Verb::kCkptSurvive: return RunCkptSurvive(context);
    case Verb::kCkptTraffic: return RunCkptTraffic(context);
    case Verb::kEvents: return RunEvents(context);
    case Verb::kLogs: return RunLogs(context);
    case Verb::kRun: return RunProgramBeside(context, called_as);
    case Verb::kVersion: return RunVersion(context);
    case Verb::kHelp: return RunHelp(context);
    case Verb::kCompletion: return RunCompletion(context);
    case Verb::kComplete: return RunComplete(context);
    case Verb::kDocs: return RunDocs(context);
    case Verb::kClusterUp: return RunClusterUp(context);
    case Verb::kClusterDown: return RunClusterDown(context);
    case Verb::kClusterList: return RunClusterList(context);
    case Verb::kClusterSupervise: return RunClusterSupervise(context);
    case Verb::kClusterStart: return RunClusterStart(context);
    case Verb::kCkptList: return RunCkptList(context);
    case Verb::kCkptShow: return RunCkptShow(context);
    case Verb::kCkptVerify: return RunCkptVerify(context);
    case Verb::kCkptSave: return RunCkptSave(context);
    case Verb::kCkptPrune: return RunCkptPrune(context);
    case Verb::kCkptExport: return RunCkptExport(context);
    case Verb::kCkptDiff: return RunCkptDiff(context);
    case Verb::kCkptPlan: return RunCkptPlan(context);
    case Verb::kCkptRollback: return RunCkptRollback(context);
    case Verb::kCkptAnomaly: return RunCkptAnomaly(context);
    case Verb::kPlanTemplates: return RunPlanTemplates(context);
    case Verb::kPlanCompose: return RunPlanCompose(context);
    case Verb::kPlanLose: return RunPlanLose(context);
    case Verb::kPlanJoin: return RunPlanJoin(context);
    case Verb::kPlanExplain: return RunPlanExplain(context);
    case Verb::kSimulate: return RunSimulate(context);
    default: return RunDrill(context, verb);
  }
  return CliError{ExitCode::kUsage, "INVALID_ARGUMENT", "no command", "everstep --help"};
}

// When the line cannot be read, what it seems to ask for.
bool AsksForJson(const std::vector<std::string>& args) {
  for (std::size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "run" || args[i] == "--") return false;
    const bool separate = (args[i] == "-o" || args[i] == "--output") && i + 1 < args.size();
    std::string value = separate ? args[i + 1] : "";
    if (args[i].rfind("--output=", 0) == 0) value = args[i].substr(9);
    if (args[i].rfind("-o", 0) == 0 && args[i].size() > 2) value = args[i].substr(2);
    if (value == "json" || value == "jsonl" || value == "=json" || value == "=jsonl") return true;
  }
  return false;
}

int Report(const CliError& error, bool json, Io* io) {
  if (json) {
    io->out(FormatErrorJson(error));
  } else {
    io->err(FormatError(error));
  }
  return static_cast<int>(error.exit);
}

}  // namespace

int RunCli(const std::string& called_as, const std::vector<std::string>& args,
           const Environment& environment, Io* io) {
  Result<Parsed> parsed = Parse(Program(), args);
  if (!parsed.ok()) return Report(parsed.error(), AsksForJson(args), io);
  const Parsed& line = parsed.value();
  if (line.help) {
    io->out(line.path.empty() ? ProgramHelp(Program(), Topics())
                              : CommandHelp(Program(), line.path));
    return 0;
  }
  Context context(line, environment, io);
  if (Outcome read = context.ReadOptions(); !read.ok()) {
    return Report(read.error(), AsksForJson(args), io);
  }
  const VerbResult result = Dispatch(context, called_as);
  if (!result.ok()) return Report(result.error(), context.json(), io);
  return static_cast<int>(result.value());
}

}  // namespace everstep::cli
