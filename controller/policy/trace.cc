#include "controller/policy/trace.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <optional>
#include <utility>

#include <fmt/format.h>

namespace everstep::policy {
namespace {

constexpr std::int64_t kSecondUs = 1'000'000;

// The next line of `text`, without its end; `text` goes on behind it.
std::string_view TakeLine(std::string_view* text) {
  const std::size_t end = text->find('\n');
  std::string_view line = text->substr(0, end);
  text->remove_prefix(end == std::string_view::npos ? text->size() : end + 1);
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

// "a,b,c" in three; nothing where there are not three.
std::optional<std::array<std::string_view, 3>> Thirds(std::string_view line) {
  const std::size_t first = line.find(',');
  if (first == std::string_view::npos) return std::nullopt;
  const std::size_t second = line.find(',', first + 1);
  if (second == std::string_view::npos || line.find(',', second + 1) != std::string_view::npos) {
    return std::nullopt;
  }
  return std::array{line.substr(0, first), line.substr(first + 1, second - first - 1),
                    line.substr(second + 1)};
}

}  // namespace

Answer<Trace> ParseTrace(std::string_view text, std::string name) {
  if (text.size() > kMaxTraceBytes) {
    return Refusal{fmt::format("a trace of {} bytes", text.size()),
                   fmt::format("at most {}", kMaxTraceBytes)};
  }
  Trace trace{.name = std::move(name), .events = {}, .end_ms = 0};
  std::map<std::string_view, bool> there;
  bool ended = false;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::string_view line = TakeLine(&text);
    if (line.empty() || line[0] == '#' || (number == 1 && line == "t_ms,event,node")) continue;
    const auto fail = [number, line](const std::string& what, const std::string& change) {
      return Refusal{fmt::format("line {}: {} (\"{}\")", number, what, line.substr(0, 80)), change};
    };
    const auto parts = Thirds(line);
    if (!parts) return fail("not three columns", "t_ms,event,node: 601200,remove,node5");
    const auto [time, event, node] = *parts;
    std::int64_t ms = 0;
    const auto [rest, error] = std::from_chars(time.data(), time.data() + time.size(), ms);
    if (error != std::errc() || rest != time.data() + time.size() || ms < 0 || ms > kMaxTraceMs) {
      return fail("the time is no number of milliseconds", fmt::format("0 to {}", kMaxTraceMs));
    }
    if (ended) return fail("something stands behind the end", "nothing");
    if (ms < trace.end_ms) {
      return fail(fmt::format("time runs backwards, it was {} before", trace.end_ms),
                  "lines in the order of time");
    }
    trace.end_ms = ms;
    if (event == "end") {
      ended = true;
      continue;
    }
    if (event != "add" && event != "remove") return fail("unknown event", "add, remove or end");
    if (node.empty() || node.size() > 200) return fail("the node has no name", "1 to 200 letters");
    const bool add = event == "add";
    if (there[node] == add) {
      return fail(add ? "it is there already" : "it is not there", "each node added, then removed");
    }
    there[node] = add;
    if (trace.events.size() == kMaxTraceEvents) {
      return fail("one event too many", fmt::format("at most {}", kMaxTraceEvents));
    }
    trace.events.push_back({ms, add, std::string(node)});
  }
  if (trace.events.empty() || trace.end_ms == 0) {
    return Refusal{"a trace in which nothing happens", "t_ms,event,node, a line for each event"};
  }
  return trace;
}

std::string TraceText(const Trace& trace) {
  std::string text = "t_ms,event,node\n";
  for (const TraceEvent& e : trace.events) {
    text += fmt::format("{},{},{}\n", e.ms, e.add ? "add" : "remove", e.node);
  }
  return text + fmt::format("{},end,\n", trace.end_ms);
}

Capacity CapacityOf(const Trace& trace, std::int64_t boot_us) {
  struct Life {
    std::int64_t from_us = 0;
    std::int64_t until_us = 0;
  };
  Capacity out;
  out.end_us = trace.end_ms * 1000;
  std::vector<Life> lives;
  std::map<std::string, NodeId> current;
  for (const TraceEvent& event : trace.events) {
    if (event.add) {
      current[event.node] = static_cast<NodeId>(lives.size());
      lives.push_back({event.ms * 1000, out.end_us});
    } else {
      lives[current.at(event.node)].until_us = event.ms * 1000;
    }
  }
  // Losses and joins apart, each by second.
  std::map<std::pair<std::int64_t, bool>, Change> by_second;
  const auto at = [&by_second](std::int64_t us, bool join) -> Change& {
    Change& change = by_second[{us / kSecondUs, join}];
    if (change.lost.empty() && change.joined.empty()) change.at_us = us;
    change.at_us = std::min(change.at_us, us);
    return change;
  };
  double node_us = 0;
  for (NodeId id = 0; id < lives.size(); ++id) {
    const Life& life = lives[id];
    out.billed_us += life.until_us - life.from_us;
    const std::int64_t booted = life.from_us + boot_us;
    // Never there as far as a job can see, who counts in seconds.
    if (booted / kSecondUs >= life.until_us / kSecondUs) continue;
    node_us += static_cast<double>(life.until_us - booted);
    at(booted, true).joined.push_back(id);
    if (life.until_us < out.end_us) at(life.until_us, false).lost.push_back(id);
  }
  std::uint32_t nodes = 0;
  out.changes.reserve(by_second.size());
  for (auto& [when, change] : by_second) {
    const auto lost = static_cast<std::uint32_t>(change.lost.size());
    nodes += static_cast<std::uint32_t>(change.joined.size());
    nodes -= lost;
    out.most_nodes = std::max(out.most_nodes, nodes);
    out.losses += lost;
    out.loss_changes += lost > 0 ? 1 : 0;
    out.largest_loss = std::max(out.largest_loss, lost);
    out.changes.push_back(std::move(change));
  }
  std::stable_sort(out.changes.begin(), out.changes.end(),
                   [](const Change& a, const Change& b) { return a.at_us < b.at_us; });
  out.mean_nodes = node_us / static_cast<double>(out.end_us);
  out.mean_loss_gap_us = out.end_us / std::max<std::int64_t>(1, out.loss_changes);
  out.mean_gap_us =
      out.end_us / std::max<std::int64_t>(1, static_cast<std::int64_t>(out.changes.size()));
  return out;
}

}  // namespace everstep::policy
