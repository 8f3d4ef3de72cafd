// The published numbers, not the fair ones: what the simulators in Oobleck's artifact (SOSP '23,
// tools/simulator) answer to a trace. For comparing with the paper, and to know that a difference
// from it is a difference of rules and not of arithmetic.
//
// Written anew from what those programs do, their accidents among it:
//  - every removal, of an idle node too, starts a rendezvous of its own; the second of two that
//    overlap finds an empty list and stops the job until a node is ready or another is lost (so
//    two losses at once cost more than the iteration: that is why spot traces come out low);
//  - fewer than 15 nodes are as fast as 15, more than 30 as fast as 30, fewer than 12 are none;
//  - nodes that come are used from the next loss on (Bamboo: from the next step);
//  - Varuna's steps go on during its restart; a loss takes back the samples since the checkpoint,
//    but not the time; small models lose nothing on spot traces;
//  - the average is of samples over the time from the first step's beginning to the last one's end.
// Pure.
#pragma once

#include <cstdint>

#include "controller/policy/model.h"
#include "controller/policy/trace.h"

namespace everstep::policy {

enum class PaperSystem : std::uint8_t { kVaruna, kBamboo, kOobleck };

struct PaperResult {
  double samples_per_s = 0;  // 0: out of memory, or no step
  std::uint64_t steps = 0;
};

// REQUIRES a table of PublishedModel.
PaperResult PublishedResult(PaperSystem system, const ModelTable& table, const Trace& trace);

}  // namespace everstep::policy
