// How a peer is asked on behalf of a job, as this node knows it. Header only.
#pragma once

#include <atomic>

#include "checkpoint/transfer/job_table.h"
#include "checkpoint/transfer/peer_client.h"
#include "checkpoint/transfer/transfer_service.h"

namespace everstep::checkpoint {

inline PeerLimits LimitsOf(const TransferOptions& options) {
  return {.connect_timeout = options.connect_timeout, .io_timeout = options.io_timeout};
}

// Whom, in how many streams and at whose pace is the caller's to add.
inline PeerTask TaskFor(const TransferOptions& options, const JobId& job, const JobFacts& facts,
                        Generation generation, TrafficClass of, const std::atomic<bool>* cancel) {
  return {.address = {},
          .job = job,
          .key = facts.key,
          .generation = generation,
          .committed_generation = facts.committed_generation,
          .committed_step = facts.committed_step,
          .limits = LimitsOf(options),
          .cancel = cancel,
          .traffic_class = of};
}

}  // namespace everstep::checkpoint
