// Who runs what, and what it becomes when nodes are lost or come: the composition is solved anew
// for the nodes that there are then, and nodes take the places for which they lack least.
//
//   Seated       a composition with a node on every place
//   Replan       survivors + newcomers -> Seated, with the bytes that each node must receive
//
// Places that need exactly the layers that a node has are filled with such nodes first (no exchange
// could save more: |R n X| + |R n Y| <= |R| + |X n Y|), whole pipelines that lost nobody as they
// are. The rest is a transportation problem between layer ranges, solved exactly by successive
// shortest paths: the fewest bytes that any seating of the composition moves.
//
// With an expected time to the next change the fastest composition need not be the best one. Those
// of other numbers of pipelines, and the one that leaves alone every pipeline that lost nobody, are
// weighed by what they lose to their move: m seconds of moving in h cost 1 + m / h of the time.
// Likewise what they lose of a step under way, which is made again, and what the next loss will
// take: its pipeline's part of a step, half of it on average. So many small pipelines may win over
// a few large ones that are a little faster.
//
// Pure and deterministic.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "controller/planner/composer.h"

namespace everstep::planner {

using NodeId = std::uint32_t;  // any numbers, each once

struct Range {
  std::uint32_t first = 0, end = 0;  // layers
  friend auto operator<=>(const Range&, const Range&) = default;
};

// The layers of the node at `place` (0 .. nodes - 1) of a template's pipeline.
Range LayersAt(const Template& t, std::uint32_t place);

struct Seated {
  Composition composition;
  std::vector<std::vector<NodeId>> nodes;  // [pipeline][place]
  friend bool operator==(const Seated&, const Seated&) = default;
};

// The first seating: nodes in order, pipeline by pipeline. REQUIRES as many as the composition has.
Seated Seat(Composition composition, const Library& library, const std::vector<NodeId>& nodes);

struct Arrival {  // what one node must receive
  NodeId node = 0;
  std::uint32_t pipeline = 0, place = 0;
  std::int64_t bytes = 0;
  friend bool operator==(const Arrival&, const Arrival&) = default;
};

struct ReplanInput {
  std::vector<NodeId> lost;      // of the nodes now seated
  std::vector<NodeId> joined;    // not seated now
  std::int64_t horizon_ns = 0;   // expected time to the next change; 0: any, the fastest plan wins
  std::int64_t loss_gap_ns = 0;  // expected time to the next loss; 0: none
  // Of the step under way, what each pipeline now seated has done of all its microbatches, 0 to 1
  // together; empty: there is none. Weighed where there is a horizon.
  std::vector<double> done;
};

// The part of a step's microbatches that are, on average, its pipeline's who loses one node.
double LossShare(const Library& library, const Composition& composition);

struct Replanned {
  Seated seated;
  std::vector<Arrival> arrivals;        // with bytes > 0, by node
  std::int64_t moved_bytes = 0;         // their sum
  std::int64_t move_ns = 0;             // of the node that receives most, over its link
  std::uint32_t stayed = 0;             // nodes that keep their layers and their pipeline's others
  std::vector<std::uint32_t> orphaned;  // layers that no survivor has: they come from files
  // [pipeline] which of those seated before it is, unchanged; nothing: it is another one.
  std::vector<std::optional<std::uint32_t>> was;
  friend bool operator==(const Replanned&, const Replanned&) = default;
};

// A refusal: a node that is not seated or is lost twice, too few nodes left, ...
Answer<Replanned> Replan(const Library& library, const Seated& now, const ReplanInput& input);
// The same plan, with the compositions that plans for other changes have asked for.
Answer<Replanned> Replan(Composer* composer, const Seated& now, const ReplanInput& input);

}  // namespace everstep::planner
