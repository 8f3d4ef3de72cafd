// Capacity over time: which nodes came and went, and what a job sees of it.
//
//   t_ms,event,node          the first line may name the columns
//   0,add,node1              a node is there and boots
//   601200,remove,node1      it is gone
//   9018000,end,             the recording ends here; without it, with the last event
//
// A node that comes again is another one: it has lost its memory. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "controller/planner/answer.h"

namespace everstep::policy {

using planner::Answer;
using planner::Refusal;

inline constexpr std::size_t kMaxTraceBytes = std::size_t{16} << 20;
inline constexpr std::size_t kMaxTraceEvents = 200'000;
inline constexpr std::int64_t kMaxTraceMs = std::int64_t{366} * 24 * 3600 * 1000;

struct TraceEvent {
  std::int64_t ms = 0;
  bool add = false;  // else it is removed
  std::string node;
  friend bool operator==(const TraceEvent&, const TraceEvent&) = default;
};

struct Trace {
  std::string name;
  std::vector<TraceEvent> events;  // by time; of one time, as they stood in the text
  std::int64_t end_ms = 0;
};

// A refusal names the line: an unknown event, a time that runs backwards, a node that is removed
// and is not there.
Answer<Trace> ParseTrace(std::string_view text, std::string name);

// The text that ParseTrace reads as this trace.
std::string TraceText(const Trace& trace);

using NodeId = std::uint32_t;  // one for each time that a node came

// What changes for a job at one moment: first the losses, then those that have booted.
struct Change {
  std::int64_t at_us = 0;
  std::vector<NodeId> lost;
  std::vector<NodeId> joined;
};

// The trace as a job sees it: nodes count once they have booted, and those that leave while they
// boot never do. Losses of one second are one change, and so are joins.
struct Capacity {
  std::vector<Change> changes;  // by time, before end_us
  std::int64_t end_us = 0;
  std::int64_t billed_us = 0;  // time of all nodes together, booting included
  double mean_nodes = 0;       // booted
  std::uint32_t most_nodes = 0;
  std::uint32_t losses = 0;           // nodes
  std::uint32_t loss_changes = 0;     // moments at which nodes were lost
  std::uint32_t largest_loss = 0;     // nodes at one moment
  std::int64_t mean_loss_gap_us = 0;  // the length over loss_changes; end_us where there is none
  std::int64_t mean_gap_us = 0;       // likewise over all changes
};

Capacity CapacityOf(const Trace& trace, std::int64_t boot_us);

}  // namespace everstep::policy
