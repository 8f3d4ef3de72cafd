// What clients of AdminService read out of a JobStatus.
#pragma once

#include "admin.pb.h"

namespace everstep {

// SUCCEEDED, FAILED, CANCELLED.
inline bool IsTerminal(const v1::JobStatus& job) {
  return job.state() == "SUCCEEDED" || job.state() == "FAILED" || job.state() == "CANCELLED";
}

}  // namespace everstep
