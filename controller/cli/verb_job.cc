// `everstep job list|show|wait|cancel`.
#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/suggest.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

const std::vector<std::string> kStates{"WAITING",  "PREPARING", "ACTIVATING", "RUNNING",
                                       "STOPPING", "SUCCEEDED", "FAILED",     "CANCELLED"};

struct Condition {
  std::string state;       // empty: not a state
  bool ended = false;      // any terminal state
  std::int64_t step = -1;  // at least; -1: not a step
  std::int64_t committed = -1;

  bool OfSteps() const { return step >= 0 || committed >= 0; }
  bool Holds(const v1::JobStatus& job) const {
    if (ended) return IsTerminal(job);
    if (step >= 0) return job.step() >= step;
    if (committed >= 0) return job.committed_step() >= committed;
    return job.state() == state;
  }
};

Result<Condition> ReadCondition(const std::string& text) {
  Condition condition;
  for (const auto& [prefix, value] :
       {std::pair{"step=", &condition.step}, std::pair{"committed=", &condition.committed}}) {
    if (text.rfind(prefix, 0) != 0) continue;
    const Result<std::int64_t> number = ParseInteger(
        std::string("--for ") + prefix, text.substr(std::string(prefix).size()), 0, INT64_MAX);
    if (!number.ok()) return number.error();
    *value = number.value();
    return condition;
  }
  std::string upper = text;
  for (char& c : upper) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  if (upper == "ENDED") {
    condition.ended = true;
    return condition;
  }
  if (std::find(kStates.begin(), kStates.end(), upper) == kStates.end()) {
    const std::string near = Nearest(upper, kStates);
    return CliError{
        ExitCode::kUsage, "INVALID_ARGUMENT", fmt::format("--for cannot be \"{}\"", text),
        near.empty()
            ? fmt::format("one of: ended, step=N, committed=N, {}", fmt::join(kStates, ", "))
            : fmt::format("did you mean: {}", near)};
  }
  condition.state = upper;
  return condition;
}

std::string JobText(Context& context, const v1::JobStatus& job) {
  switch (context.output) {
    case Output::kJson: return ToJson("Job", job);
    case Output::kJsonl: return ToJsonLine(job);
    case Output::kName: return job.job() + "\n";
    default: return RenderJob(job, context.render);
  }
}

std::string OneLine(const v1::JobStatus& job) {
  std::string steps = "step " + HumanCount(job.step());
  if (job.committed_step() >= 0) steps += ", committed " + HumanCount(job.committed_step());
  return fmt::format("job {} is {} ({}), generation {}, {}", job.job(), job.state(),
                     OrDash(job.reason()), job.generation(), steps);
}

CliError Unfulfilled(const v1::JobStatus& job, const std::string& wanted) {
  std::string why = job.reason().empty() ? "" : ": " + job.reason();
  if (!job.message().empty()) why += ", " + job.message();
  const bool plain = wanted == "SUCCEEDED";
  return {ExitCode::kFailed, "FAILED",
          plain ? fmt::format("job {} {}{}", job.job(), job.state(), why)
                : fmt::format("job {} {} before it was {}{}", job.job(), job.state(), wanted, why),
          fmt::format("see: everstep job show {}", job.job())};
}

}  // namespace

Result<v1::JobStatus> FindJob(AdminClient* client, const std::string& name) {
  Result<v1::JobStatus> job = client->GetJob(name);
  if (job.ok() || job.error().exit != ExitCode::kNotFound) return job;
  CliError error = job.error();
  error.message =
      fmt::format("no job is named \"{}\" at the controller {}", name, client->controller());
  error.hint = "see: everstep job list";
  if (Result<v1::JobList> jobs = client->ListJobs(); jobs.ok()) {
    std::vector<std::string> names;
    for (const v1::JobStatus& one : jobs.value().items()) names.push_back(one.job());
    const std::string near = Nearest(name, names);
    if (!near.empty()) error.hint = fmt::format("did you mean: {}", near);
    if (names.empty()) error.hint = "there are no jobs; everstep run submits one";
  }
  return error;
}

VerbResult RunJobList(Context& context) {
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    Result<v1::JobList> jobs = client->ListJobs();
    if (!jobs.ok()) return jobs.error();
    if (context.output == Output::kJson) return ToJson("JobList", jobs.value());
    if (context.output == Output::kTable) return RenderJobs(jobs.value(), context.render);
    std::string out;
    for (const v1::JobStatus& job : jobs.value().items()) out += JobText(context, job);
    return out;
  });
}

VerbResult RunJobShow(Context& context) {
  return context.OnceOrWatch([&](AdminClient* client) -> Result<std::string> {
    Result<v1::JobStatus> job = FindJob(client, context.args.words[0]);
    if (!job.ok()) return job.error();
    return JobText(context, job.value());
  });
}

VerbResult RunJobWait(Context& context) {
  const std::string wanted = context.args.Get("for", "SUCCEEDED");
  const Result<Condition> condition = ReadCondition(wanted);
  if (!condition.ok()) return condition.error();
  // --timeout is here the limit of the wait, 0 by default; a call keeps its own.
  const auto limit = context.args.Has("timeout") ? context.timeout : std::chrono::milliseconds(0);
  context.timeout = std::chrono::seconds(10);
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::JobStatus> last = FindJob(client.value().get(), context.args.words[0]);
  if (!last.ok()) return last.error();
  const std::string name = last.value().job();
  std::string told;
  bool holds = condition.value().Holds(last.value());
  if (!holds && !IsTerminal(last.value())) {
    const Outcome followed = client.value()->FollowJob(name, limit, [&](const v1::JobStatus& now) {
      last = now;
      const std::string state = fmt::format("{}{}", now.state(), now.generation());
      if (state != told) context.Remark(OneLine(now));
      told = state;
      holds = condition.value().Holds(now);
      return !holds;
    });
    if (!followed.ok()) {
      CliError error = followed.error();
      if (error.exit == ExitCode::kTimeout) {
        error.message = fmt::format("job {} was not {} within {}: it is {}", name, wanted,
                                    HumanSeconds(static_cast<double>(limit.count()) / 1000.0),
                                    last.value().state());
        if (condition.value().OfSteps() && last.value().step() < 0) {
          error.hint = "it has told of no step: only scripts with everstep.Checkpointer do";
        }
      }
      return error;
    }
  }
  if (!holds) return Unfulfilled(last.value(), wanted);
  context.Out(context.output == Output::kTable ? OneLine(last.value()) + "\n"
                                               : JobText(context, last.value()));
  return ExitCode::kOk;
}

VerbResult RunJobCancel(Context& context) {
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  const std::string name = job.value().job();
  const bool forget = context.args.Has("forget");
  if (IsTerminal(job.value()) && !forget) {
    return CliError{
        ExitCode::kConflict, "FAILED_PRECONDITION",
        fmt::format("job {} has ended already: {}", name, job.value().state()),
        fmt::format("see: everstep job show {}; --forget gives up what is left of it", name)};
  }
  v1::CancelJobRequest request;
  request.set_job(name);
  request.set_reason(context.args.Get("reason", "cancelled by operator"));
  if (!IsTerminal(job.value())) {
    if (Outcome cancelled = client.value()->CancelJob(request); !cancelled.ok()) {
      return cancelled.error();
    }
  }
  if (IsTerminal(job.value())) {
    // Nothing to wait for.
  } else if (context.args.Has("wait") || forget) {
    const Outcome ended =
        client.value()->FollowJob(name, context.timeout, [&](const v1::JobStatus& now) {
          job = now;
          return true;
        });
    if (!ended.ok()) return ended.error();
  } else if (Result<v1::JobStatus> now = client.value()->GetJob(name); now.ok()) {
    job = now;
  }
  if (forget) {
    request.set_forget(true);
    if (Outcome forgotten = client.value()->CancelJob(request); !forgotten.ok()) {
      return forgotten.error();
    }
    context.Out(context.output == Output::kTable ? fmt::format("job {} is forgotten\n", name)
                                                 : JobText(context, job.value()));
    return ExitCode::kOk;
  }
  context.Out(
      context.output == Output::kTable
          ? IsTerminal(job.value())
                ? fmt::format("job {} is {}\n", name, job.value().state())
                : fmt::format("job {} was asked to end; it is {}\n", name, job.value().state())
          : JobText(context, job.value()));
  return ExitCode::kOk;
}

}  // namespace everstep::cli
