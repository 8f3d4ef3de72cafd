// `everstep logs`.
#include <fmt/format.h>

#include "controller/cli/verbs.h"

namespace everstep::cli {
namespace {

// Each line of `data` with its line feed (the last may lack it).
template <typename Take>
void EachLine(const std::string& data, const Take& take) {
  for (std::size_t at = 0; at < data.size();) {
    const std::size_t end = std::min(data.find('\n', at), data.size());
    take(std::string_view(data).substr(at, end - at));
    at = end + 1;
  }
}

}  // namespace

VerbResult RunLogs(Context& context) {
  const Parsed& args = context.args;
  v1::TailJobLogsRequest request;
  request.set_follow(args.Has("follow"));
  request.set_rank(-1);
  if (args.Has("rank") && args.Get("rank") != "all") {
    const Result<std::int64_t> rank = ParseInteger("--rank", args.Get("rank"), 0, 1'000'000);
    if (!rank.ok()) return rank.error();
    request.set_rank(static_cast<std::int32_t>(rank.value()));
  }
  const Result<std::int64_t> tail =
      ParseInteger("--tail", args.Get("tail", "-1"), -1, 1'000'000'000);
  if (!tail.ok()) return tail.error();
  request.set_tail_lines(tail.value());

  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  Result<v1::JobStatus> job = FindJob(client.value().get(), args.words[0]);
  if (!job.ok()) return job.error();
  request.set_job(job.value().job());
  if (request.rank() >= 0 && job.value().world_size() > 0 &&
      request.rank() >= static_cast<std::int32_t>(job.value().world_size())) {
    return CliError{ExitCode::kNotFound, "NOT_FOUND",
                    fmt::format("job {} has no rank {}: its ranks are 0 to {}", request.job(),
                                request.rank(), job.value().world_size() - 1),
                    fmt::format("see: everstep job show {}", request.job())};
  }
  const bool prefix = request.rank() < 0 && job.value().world_size() != 1;
  const Outcome tailed = client.value()->TailJobLogs(request, [&](const v1::JobLogLines& lines) {
    std::string out;
    EachLine(lines.data(), [&](std::string_view line) {
      if (context.json()) {
        out += fmt::format(
            "{{\"job\":{},\"rank\":{},\"node\":{},\"generation\":{},\"stream\":\"{}\","
            "\"line\":{}}}\n",
            JsonQuote(request.job()), lines.rank(), JsonQuote(lines.node()), lines.generation(),
            lines.from_stderr() ? "stderr" : "stdout", JsonQuote(line));
      } else {
        if (prefix) out += fmt::format("[{}] ", lines.rank());
        out += line;
        out += '\n';
      }
    });
    context.Out(out);
    return true;
  });
  if (!tailed.ok()) return tailed.error();
  return ExitCode::kOk;
}

}  // namespace everstep::cli
