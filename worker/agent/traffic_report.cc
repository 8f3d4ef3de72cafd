#include "worker/agent/traffic_report.h"

#include <numeric>

namespace everstep::agent {

void ToWire(const checkpoint::TrafficReport& report, v1::CheckpointTraffic* to) {
  const auto sum = [](const auto& counts) {
    return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
  };
  if (sum(report.pushes) + sum(report.arrivals) + sum(report.sent_bytes) == 0) return;
  for (const std::uint64_t bytes : report.sent_bytes) to->add_sent_bytes(bytes);
  to->set_unchanged_bytes(report.unchanged_bytes);
  to->set_resumed_bytes(report.resumed_bytes);
  for (std::size_t i = 0; i < checkpoint::kPeerOutcomes; ++i) {
    const char* name = checkpoint::PeerOutcomeName(static_cast<checkpoint::PeerOutcome>(i));
    if (report.pushes[i] > 0) (*to->mutable_pushes())[name] = report.pushes[i];
    if (report.arrivals[i] > 0) (*to->mutable_arrivals())[name] = report.arrivals[i];
  }
  to->set_push_seconds(report.push_s);
  to->set_limit_bytes_per_s(report.limit_bytes_per_s);
  to->set_baseline_step_s(report.baseline_step_s);
  to->set_step_s(report.step_s);
  to->set_slowdown(report.slowdown);
  to->set_backoffs(report.backoffs);
  to->set_held_rate(report.held_rate);
  to->set_held_span(report.held_span);
  to->set_held_class(report.held_class);
}

void ToWire(const checkpoint::ScrubReport& report, v1::ScrubReport* to) {
  to->set_checked_bytes(report.checked_bytes);
  to->set_checked_slots(report.checked_slots);
  to->set_damaged(report.damaged);
  to->set_repaired(report.repaired);
}

}  // namespace everstep::agent
