// Which pipelines N nodes run and how many microbatches each of them gets: the exact optimum.
//
// An iteration takes as long as its slowest pipeline: T(m) of its template, then its optimizer and
// what is left of synchronising gradients with the other q - 1 copies (library.h). We look for the
// multiset of templates with sum of nodes N and at least f + 1 parts, and m_1 + ... + m_q = B,
// m_i >= 1, whose slowest part is fastest. Others enumerate multisets, of which there are
// exponentially many (Oobleck, section 4.2; 437 million at 128 nodes).
//
// Within time tau a template does at most cap(tau) microbatches, so (q, tau) is possible exactly if
// the best sum of q caps over sizes that sum to N reaches B. For each q:
//  1. The concave hull of caps at N / q gives a bound, and with it the least tau that q could have:
//     O(p) for p sizes. Numbers of pipelines whose bound is worse than what was found are skipped.
//  2. A size further below the hull's supporting line than the bound is above B can be in no
//     solution. What remains is summed exactly by doubling: the best sums of c parts come from
//     those of c/2 (any multiset splits into halves whose sums differ by at most the largest
//     difference R of two sizes; Jansen and Rohwedder, "On integer programming and convolution",
//     2019), so only sums within R of c N / q are needed: O(R^2 log q).
// tau is found by bisection over the times that templates really take.
//
// Of equally fast compositions, the one with more pipelines, so more copies of every layer.
// Pure and deterministic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "controller/planner/library.h"

namespace everstep::planner {

inline constexpr std::uint64_t kMaxMicrobatches = 1'000'000;  // of one iteration

struct ComposeInput {
  std::uint32_t nodes = 0;
  std::uint64_t microbatches = 0;  // of one iteration, all pipelines together
  std::uint32_t pipelines = 0;     // exactly so many; 0: as many as is best
};

struct Pipeline {
  std::uint32_t form = 0;  // index into Library::templates
  std::uint32_t microbatches = 0;
  std::int64_t time_ns = 0;  // with its optimizer and what is exposed of the synchronisation
  friend bool operator==(const Pipeline&, const Pipeline&) = default;
};

// What the best composition of q pipelines would be; for explanations.
struct Alternative {
  std::uint32_t pipelines = 0;
  std::int64_t time_ns = 0;
  bool exact = false;  // false: a bound that was bad enough already
  friend bool operator==(const Alternative&, const Alternative&) = default;
};

struct Composition {
  std::uint32_t nodes = 0;
  std::uint64_t microbatches = 0;
  std::vector<Pipeline> pipelines;        // by nodes descending, then microbatches descending
  std::int64_t time_ns = 0;               // of an iteration
  std::int64_t sync_ns = 0;               // of it: synchronisation exposed by the slowest pipeline
  std::vector<Alternative> alternatives;  // by number of pipelines

  // Share of the devices' time in which they compute, 0 to 1.
  double Busy(const Library& library) const;
  friend bool operator==(const Composition&, const Composition&) = default;
};

// Microbatches of an iteration of `batch` samples; a batch that does not divide is refused.
Answer<std::uint64_t> MicrobatchesOf(const Profile& profile, std::uint64_t batch);

// The composition of these templates (indexes, each as often as it stands there), the microbatches
// distributed as well as can be. REQUIRES at least one for each, and no more than they may get.
Composition ComposeOf(const Library& library, const std::vector<std::uint32_t>& forms,
                      std::uint64_t microbatches);

// A refusal names the limit: nodes outside what the library covers, fewer microbatches than
// f + 1 pipelines need.
Answer<Composition> Compose(const Library& library, const ComposeInput& input);

}  // namespace everstep::planner
