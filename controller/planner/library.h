// The pipelines that a model may be divided into: one template for each number of nodes and shape,
// and the proof that they cover every number of nodes that a job may be left with.
//
// Sizes are consecutive from n0, the fewest nodes whose memory holds the model, so that whatever
// nodes are left after losses are a sum of sizes (Oobleck, section 4.1.1). We generate every size
// up to N - f n0, the largest that leaves room for f other copies; with it every homogeneous grid
// of at least f + 1 pipelines is in the library, too. Oobleck's condition on sizes is sufficient;
// we look at each N instead, so sizes may have gaps (a stage on several nodes leaves some).
//
// Pure and deterministic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "controller/planner/partition.h"

namespace everstep::planner {

inline constexpr std::uint32_t kMaxNodes = 4096;
inline constexpr std::uint32_t kMaxFaults = 64;

struct Stage {
  std::uint32_t first = 0, end = 0;  // layers
  std::int64_t time_ns = 0;          // w_i
  std::int64_t bytes = 0;            // most on one of its devices
};

// Gradients that may still be on their way when a pipeline is done: those of the first `layers`
// layers of a stage, the last of which is final `hidden_ns` before the end.
struct Unsynced {
  std::int64_t layers = 0;
  std::int64_t bytes = 0;
  std::int64_t hidden_ns = 0;
};

struct Template {
  std::uint32_t nodes = 0;
  Shape shape;
  std::uint32_t devices = 1;  // of a stage
  Partition partition;
  std::vector<Stage> stages;
  std::int64_t optimizer_ns = 0;   // of the stage that takes longest, once an iteration
  std::vector<Unsynced> unsynced;  // without those that others outlast

  std::int64_t TimeNs(std::int64_t microbatches) const { return partition.TimeNs(microbatches); }
  // The most microbatches within `ns`; 0: not one.
  std::int64_t MostWithin(std::int64_t ns) const;
};

struct LibraryInput {
  std::uint32_t nodes = 0;   // N: the most that the job will have
  std::uint32_t faults = 1;  // f: nodes that may be lost at once
  // Pipelines never get more microbatches than this; 0: any number. Fewer need less memory.
  std::uint32_t most_microbatches = 0;
};

struct Library {
  Profile profile;
  LibraryInput input;
  std::uint32_t least_nodes = 0;     // n0
  std::uint32_t fewest_nodes = 0;    // of the job: below it f + 1 copies have no room
  std::vector<Template> templates;   // by nodes, then stages per node descending
  std::vector<std::uint32_t> sizes;  // that have one, ascending
  std::uint64_t fingerprint = 0;     // of the profile and the input
};

// The template for exactly `nodes` nodes in `shape`. Nothing: it does not fit.
std::optional<Template> MakeTemplate(const Profile& profile, Shape shape, std::uint32_t nodes,
                                     std::uint32_t most_microbatches = 0);

// Every template of 1..most nodes in every shape; no proof, no limits.
std::vector<Template> MakeTemplates(const Profile& profile, std::uint32_t most,
                                    std::uint32_t most_microbatches = 0);

// The library with its cover proved, or why not and the smallest change that would do.
Answer<Library> MakeLibrary(const Profile& profile, const LibraryInput& input);

// most_parts[n]: of how many `sizes` n can be the sum, at most; 0: of none.
std::vector<std::uint32_t> MostParts(const std::vector<std::uint32_t>& sizes, std::uint32_t most);

// Exposed time of the layers' gradient synchronisation after the last backward pass, over `copies`
// pipelines: what some stage still has to send when the pipeline is done. Layers are synchronised
// one after the other as their gradients become final, with a tree's latency and a ring's bytes
// each (2 log2 r hops, 2 (r - 1) / r of the bytes), over the link between nodes. More copies never
// take less.
std::int64_t SyncNs(const Profile& profile, const Template& t, std::uint32_t copies);

}  // namespace everstep::planner
