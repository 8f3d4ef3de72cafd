// `everstep job ledger`: who did which microbatches of which steps, and whether each was once.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>

#include "controller/cli/table.h"
#include "controller/cli/units.h"
#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

std::string Span(std::int64_t first, std::int64_t end) {
  return end - first == 1 ? std::to_string(first) : fmt::format("{}..{}", first, end - 1);
}

// "0..4 n1+n3": a pipeline's microbatches and its nodes by stage.
std::string DoneBy(std::uint32_t first, std::uint32_t end,
                   const v1::LayoutRecord::Pipeline* pipeline) {
  if (pipeline == nullptr) return Span(first, end) + " ?";
  std::vector<std::string> who;
  for (int i = 0; i < pipeline->ranks_size(); ++i) {
    const bool known = i < pipeline->nodes_size() && !pipeline->nodes(i).empty();
    who.push_back(known ? pipeline->nodes(i) : fmt::format("rank {}", pipeline->ranks(i)));
  }
  return fmt::format("{} {}", Span(first, end), fmt::join(who, "+"));
}

const v1::LayoutRecord* LayoutOf(const v1::JobLedger& job, std::uint64_t generation) {
  const auto found =
      std::find_if(job.layouts().begin(), job.layouts().end(),
                   [generation](const auto& layout) { return layout.generation() == generation; });
  return found == job.layouts().end() ? nullptr : &*found;
}

std::string Division(const v1::JobLedger& job, const v1::LedgerRecord::Run& run) {
  std::vector<std::string> parts;
  const v1::LayoutRecord* layout = LayoutOf(job, run.generation());
  if (run.parts().empty() && layout != nullptr) {
    for (const auto& p : layout->pipelines()) parts.push_back(DoneBy(p.first(), p.end(), &p));
  }
  for (const v1::LedgerRecord::Part& part : run.parts()) {
    const v1::LayoutRecord* of = LayoutOf(job, part.generation());
    const bool known =
        of != nullptr && part.pipeline() < static_cast<unsigned>(of->pipelines_size());
    parts.push_back(DoneBy(part.first(), part.end(),
                           known ? &of->pipelines(static_cast<int>(part.pipeline())) : nullptr));
    if (part.generation() != run.generation()) {
      parts.back() += fmt::format(" (kept from generation {})", part.generation());
    }
  }
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::string Render(const v1::JobLedger& job, const RenderOptions& options) {
  const v1::LedgerRecord& l = job.ledger();
  std::vector<std::pair<std::string, std::string>> pairs = {
      {"job", fmt::format("{}, {}", job.job(), job.state())},
      {"steps", l.next() == l.first() ? "none yet" : Span(l.first(), l.next())},
      {"lines",
       fmt::format("{} told, {} taken back, {} told again, {} of generations that were over",
                   l.lines(), l.taken_back(), l.retold(), l.stale())},
      {"newest", l.lines() == 0 ? "-"
                                : fmt::format("loss {:.6g}, samples {:08x}",
                                              std::bit_cast<double>(l.loss_bits()), l.samples())},
      {"digest", fmt::format("{:08x}", l.digest())}};
  if (l.folded_runs() > 0) {
    pairs.emplace_back(
        "counted alone",
        fmt::format("steps {} in {} runs", Span(l.first(), l.folded_end()), l.folded_runs()));
  }
  std::string out = FormatPairs(pairs);
  Table runs({{"STEPS", Align::kRight},
              {"GENERATION", Align::kRight},
              {"MICROBATCHES", Align::kRight},
              {"BY PIPELINE"}});
  for (const v1::LedgerRecord::Run& run : l.runs()) {
    const v1::LayoutRecord* layout = LayoutOf(job, run.generation());
    runs.Add({Span(run.first(), run.end()), std::to_string(run.generation()),
              layout == nullptr ? "?" : std::to_string(layout->microbatches()),
              Division(job, run)});
  }
  if (runs.rows() > 0) out += "\n" + runs.Format(options.headers, options.max_width);
  Table back(
      {{"TAKEN BACK", Align::kRight}, {"BY GENERATION", Align::kRight}, {"REASON"}, {"WHY"}});
  for (int i = 0; i < l.roll_backs_size(); ++i) {
    const v1::LedgerRecord::RollBack& b = l.roll_backs(i);
    back.Add({Span(b.to(), b.from()), std::to_string(b.generation()),
              i < job.reasons_size() ? OrDash(job.reasons(i)) : "-", OrDash(b.evidence())});
  }
  if (back.rows() > 0) out += "\n" + back.Format(options.headers, options.max_width);
  Table faults({{"FAULT"}, {"STEP", Align::kRight}, {"GENERATION", Align::kRight}, {"WHAT"}});
  for (const v1::LedgerRecord::Finding& f : job.faults()) {
    faults.Add({f.kind(), f.step() < 0 ? "-" : std::to_string(f.step()),
                std::to_string(f.generation()), f.what()});
  }
  if (faults.rows() > 0) out += "\n" + faults.Format(options.headers, options.max_width);
  return out;
}

}  // namespace

VerbResult RunJobLedger(Context& context) {
  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const Result<v1::JobStatus> found = FindJob(client.value().get(), context.args.words[0]);
  if (!found.ok()) return found.error();
  const Result<v1::JobLedger> read = client.value()->GetLedger(found.value().job());
  if (!read.ok()) return read.error();
  const v1::JobLedger& job = read.value();
  const bool verify = context.args.Has("verify");
  if (!job.has_ledger()) {
    return CliError{ExitCode::kConflict, "FAILED_PRECONDITION",
                    fmt::format("job {} has told no ledger", job.job()),
                    "scripts with everstep.Pipeline do, unless they write one into a file"};
  }
  if (context.json()) {
    context.Out(context.output == Output::kJson ? ToJson("JobLedger", job) : ToJsonLine(job));
  } else {
    context.Out(Render(job, context.render));
  }
  if (!verify) return ExitCode::kOk;
  const v1::LedgerRecord& l = job.ledger();
  if (!job.whole()) {
    return CliError{
        ExitCode::kFailed, "FAILED",
        fmt::format("the ledger of job {} is not whole: {}", job.job(), job.faults(0).what()),
        fmt::format("see: everstep events --job {}", job.job())};
  }
  if (!context.json()) {
    context.Out(fmt::format("\nwhole: every microbatch of {} is in exactly once\n",
                            Plural(l.next() - l.first(), "step")));
  }
  return ExitCode::kOk;
}

}  // namespace everstep::cli
