// `everstep events`.
#include <deque>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "controller/cli/verbs.h"
#include "proto/base/clock.h"

namespace everstep::cli {

std::string JsonItems(const std::string& kind, const std::vector<std::string>& items) {
  std::string out = fmt::format(R"({{"apiVersion":"everstep/v1","kind":"{}","items":[)", kind);
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += ',';
    out += items[i].substr(0, items[i].find_last_not_of('\n') + 1);
  }
  return out + "]}\n";
}

VerbResult RunEvents(Context& context) {
  const Parsed& args = context.args;
  v1::WatchEventsRequest request;
  request.set_follow(args.Has("watch"));
  request.set_job(args.Get("job"));
  request.set_node(args.Get("node"));
  const Result<std::int64_t> limit = ParseInteger("--limit", args.Get("limit", "0"), 0, 1'000'000);
  if (!limit.ok()) return limit.error();
  const Result<std::int64_t> after =
      ParseInteger("--after", args.Get("after", "-1"), -1, INT64_MAX - 1);
  if (!after.ok()) return after.error();
  request.set_since_sequence(static_cast<std::uint64_t>(after.value() + 1));
  std::string youngest;  // RFC 3339 texts of equal form compare as times
  if (args.Has("since")) {
    const Result<std::chrono::milliseconds> since = ParseDuration("--since", args.Get("since"));
    if (!since.ok()) return since.error();
    youngest = FormatTimestamp(RealClock().Now() + (-Duration(since.value())));
  }
  // What is filtered here is counted here.
  const bool filters = args.Has("type") || args.Has("reason") || args.Has("since");
  const auto keep = static_cast<std::size_t>(limit.value());
  if (!filters) request.set_limit(static_cast<std::uint32_t>(limit.value()));

  Result<std::unique_ptr<AdminClient>> client = context.Client();
  if (!client.ok()) return client.error();
  const auto text = [&](const v1::Event& event) {
    if (context.json()) return ToJsonLine(event);
    if (context.output == Output::kName) return event.type() + "\n";
    return RenderEvent(event);
  };
  std::deque<std::string> kept;
  const bool at_once = args.Has("watch") && context.output != Output::kName;
  const bool direct = at_once || (context.output != Output::kJson && !(filters && keep > 0));
  const Outcome watched = client.value()->WatchEvents(request, [&](const v1::Event& event) {
    if (event.time() < youngest || (args.Has("type") && event.type() != args.Get("type")) ||
        (args.Has("reason") && event.reason() != args.Get("reason"))) {
      return true;
    }
    if (direct) {
      context.Out(text(event));
    } else {
      kept.push_back(text(event));
      if (keep > 0 && kept.size() > keep) kept.pop_front();
    }
    return true;
  });
  if (!watched.ok()) return watched.error();
  if (direct) return ExitCode::kOk;
  const std::vector<std::string> lines(kept.begin(), kept.end());
  context.Out(context.output == Output::kJson ? JsonItems("EventList", lines)
                                              : fmt::format("{}", fmt::join(lines, "")));
  return ExitCode::kOk;
}

}  // namespace everstep::cli
