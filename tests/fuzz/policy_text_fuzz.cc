// Any text gives a trace that is written and read again as the same, or a table of a model, or one
// sentence of refusal; a small trace is simulated, and all of its time is booked.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "controller/policy/policies.h"
#include "controller/policy/simulate.h"
#include "proto/base/check.h"

namespace po = everstep::policy;

namespace {

const po::Model& Model() {
  static const po::Model model = [] {
    po::ModelTable table;
    table.name = "fuzz";
    table.batch = 600;
    table.least_nodes = 1;
    table.restart_s = 20;
    table.checkpoint_s = 5;
    table.grid = {.first = 1, .speeds = {1, 2, 3, 4, 5, 6}};
    table.templates = table.grid;
    table.redundant = table.grid;
    everstep::planner::Profile profile;
    profile.layers.assign(6,
                          {.forward_ns = 1'000'000, .backward_ns = 2'000'000, .parameters = 1000});
    return po::MeasuredModel(table, profile, {}).value();
  }();
  return model;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const po::Answer<po::ModelTable> table = po::ParseModel(text);
  EVERSTEP_CHECK(table.ok() || !table.refusal().what.empty());
  const po::Answer<po::Trace> trace = po::ParseTrace(text, "fuzz");
  if (!trace.ok()) {
    EVERSTEP_CHECK(!trace.refusal().what.empty());
    return 0;
  }
  const po::Answer<po::Trace> again = po::ParseTrace(po::TraceText(trace.value()), "fuzz");
  EVERSTEP_CHECK(again.ok() && again.value().events == trace.value().events);
  if (trace.value().events.size() > 40 || trace.value().end_ms > 100'000'000) return 0;
  const po::Capacity capacity = po::CapacityOf(trace.value(), 0);
  const po::Report report = po::PlannedReport(capacity, Model(), {});
  EVERSTEP_CHECK(report.total_us() == capacity.end_us);
  return 0;
}
