// `everstep ckpt show JOB|rollback|anomaly`: which checkpoints a job has, how far each is trusted,
// and going back to one.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "checkpoint/store/memory_limit.h"
#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

std::string StepText(std::int64_t step) {
  return step < 0 ? "-" : std::to_string(step);
}

// "2 of 2" as long as every rank has what the job asks for.
std::string CopiesText(const v1::JobCheckpoints& c) {
  if (c.ranks().empty()) return "nothing is committed yet";
  std::uint32_t least = 0;
  for (const v1::JobCheckpoint& item : c.items()) {
    if (item.step() == c.committed_step()) least = std::max(least, item.least_copies());
  }
  const std::string parities =
      c.parities_wanted() == 0
          ? ""
          : fmt::format(", {} of {} parities", c.parities(), c.parities_wanted());
  const bool lacking = least < c.copies() || c.parities() < c.parities_wanted();
  return fmt::format("{} of {}{}{}", least, c.copies(), parities, lacking ? ": being made" : "");
}

std::string Render(const v1::JobCheckpoints& c, const RenderOptions& options) {
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"job", fmt::format("{}, generation {}", c.job(), c.generation())},
      {"newest step", StepText(c.newest_step())},
      {"committed", StepText(c.committed_step())},
      {"redundancy", c.redundancy()},
      {"copies", CopiesText(c)},
      {"verified", c.verify_after_steps() == 0
                       ? "- (started without --verify-after)"
                       : fmt::format("{} ({} quiet steps are needed)", StepText(c.verified_step()),
                                     c.verify_after_steps())},
      {"directory", OrDash(c.ckpt_dir())},
      {"damaged", fmt::format("{} found, {} repaired", c.shards_damaged(), c.shards_repaired())}};
  if (c.anomalies() > 0) {
    pairs.emplace_back("anomalies", fmt::format("{}, the newest at step {}: {}", c.anomalies(),
                                                StepText(c.anomaly_step()), c.anomaly_why()));
  }
  if (!c.suspect_nodes().empty()) {
    pairs.emplace_back("memory suspect",
                       fmt::format("{}: drain and test", fmt::join(c.suspect_nodes(), ", ")));
  }
  for (const v1::Cut& cut : c.given_up()) {
    pairs.emplace_back("rolled back",
                       fmt::format("to step {} in generation {}", cut.step(), cut.generation()));
  }
  std::string out = FormatPairs(pairs);
  Table steps({{"STEP", Align::kRight},
               {"GENERATION", Align::kRight},
               {"TRUST"},
               {"TIER"},
               {"COPIES", Align::kRight},
               {"SIZE", Align::kRight}});
  for (const v1::JobCheckpoint& item : c.items()) {
    steps.Add({std::to_string(item.step()), std::to_string(item.generation()), item.trust(),
               item.tier(), item.tier() == "files" ? "-" : std::to_string(item.least_copies()),
               item.bytes() == 0 ? "-" : checkpoint::HumanBytes(item.bytes())});
  }
  if (steps.rows() > 0) out += "\n" + steps.Format(options.headers, options.max_width);
  Table ranks({{"RANK", Align::kRight}, {"COPIES ON"}, {"DAMAGED ON"}});
  for (const v1::RankCopies& r : c.ranks()) {
    ranks.Add({std::to_string(r.rank()), OrDash(fmt::format("{}", fmt::join(r.nodes(), ", "))),
               OrDash(fmt::format("{}", fmt::join(r.damaged(), ", ")))});
  }
  if (ranks.rows() > 0) out += "\n" + ranks.Format(options.headers, options.max_width);
  return out;
}

}  // namespace

VerbResult ShowJobCheckpoints(Context& context, AdminClient* client, const std::string& name) {
  const Result<v1::JobStatus> job = FindJob(client, name);
  if (!job.ok()) return job.error();
  const Result<v1::JobCheckpoints> found = client->GetCheckpoints(job.value().job());
  if (!found.ok()) return found.error();
  switch (context.output) {
    case Output::kJson: context.Out(ToJson("JobCheckpoints", found.value())); break;
    case Output::kJsonl: context.Out(ToJsonLine(found.value())); break;
    case Output::kName:
      for (const v1::JobCheckpoint& item : found.value().items()) {
        context.Out(std::to_string(item.step()) + "\n");
      }
      break;
    default: context.Out(Render(found.value(), context.render));
  }
  return ExitCode::kOk;
}

VerbResult RunCkptRollback(Context& context) {
  const bool verified = context.args.Has("verified");
  if (verified == context.args.Has("to")) {
    return CliError{
        ExitCode::kUsage, "INVALID_ARGUMENT",
        verified ? "--to and --verified exclude each other"
                 : "ckpt rollback needs to know where to",
        fmt::format("everstep ckpt rollback {} --verified | --to STEP", context.args.words[0])};
  }
  v1::RollBackRequest request;
  request.set_verified(verified);
  if (!verified) {
    const auto step = ParseInteger("--to", context.args.Get("to"), 0, INT64_MAX);
    if (!step.ok()) return step.error();
    request.set_step(step.value());
  }
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  request.set_job(job.value().job());
  const Result<v1::RollBackReply> done = client.value()->RollBack(request);
  if (!done.ok()) return done.error();
  if (context.json()) {
    context.Out(ToJson("RollBack", done.value()));
  } else {
    context.Out(fmt::format("job {} goes back to step {} (from {}), generation {}\n", request.job(),
                            done.value().step(), done.value().from_step(),
                            done.value().generation()));
  }
  return ExitCode::kOk;
}

VerbResult RunCkptAnomaly(Context& context) {
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> job = FindJob(client.value().get(), context.args.words[0]);
  if (!job.ok()) return job.error();
  v1::ReportAnomalyRequest request;
  request.set_job(job.value().job());
  request.set_why(context.args.Get("why", "reported by an operator"));
  const Result<v1::ReportAnomalyReply> done = client.value()->ReportAnomaly(request);
  if (!done.ok()) return done.error();
  if (context.json()) {
    context.Out(ToJson("Anomaly", done.value()));
  } else {
    context.Out(fmt::format("noted for job {} at step {}\n", request.job(), done.value().step()));
  }
  return ExitCode::kOk;
}

}  // namespace everstep::cli
