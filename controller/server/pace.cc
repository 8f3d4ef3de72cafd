#include "controller/server/pace.h"

#include <algorithm>
#include <vector>

#include <fmt/format.h>

namespace everstep::controller {
namespace {

constexpr double kAssumedRate = 1 << 30;           // bytes a second, where nothing was measured
constexpr double kAssumedSwitch = 1;               // seconds, before the job's first recovery
constexpr std::uint64_t kLeastMeasured = 1 << 20;  // below, a commit's time is not its bytes'

}  // namespace

Pace PaceOf(const JobStateView& job) {
  Pace pace{.bytes_a_second = kAssumedRate, .switch_seconds = kAssumedSwitch};
  if (job.copied_bytes >= kLeastMeasured && job.copy_took.count() > 0) {
    pace.bytes_a_second = static_cast<double>(job.copied_bytes) / ToSeconds(job.copy_took);
    pace.rate_basis =
        fmt::format("{:.0f} MiB/s measured at the newest commit", pace.bytes_a_second / (1 << 20));
  } else {
    pace.rate_basis = "1 GiB/s assumed";
  }
  pace.basis = pace.rate_basis;
  std::vector<double> past;
  for (const Fault& fault : job.record.faults) {
    if (fault.recovered.ns != 0) past.push_back(ToSeconds(fault.recovered - fault.detected));
  }
  if (past.empty()) {
    pace.basis += fmt::format(", {:.0f} s assumed for the switch", kAssumedSwitch);
    return pace;
  }
  std::sort(past.begin(), past.end());
  pace.switch_seconds = past[past.size() / 2];
  pace.basis += fmt::format(", {:.2f} s for the switch: the median of {} recover{} of this job",
                            pace.switch_seconds, past.size(), past.size() == 1 ? "y" : "ies");
  return pace;
}

}  // namespace everstep::controller
