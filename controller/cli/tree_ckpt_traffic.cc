// The part of the command tree that is about checkpoint traffic: a child of `everstep ckpt`.
#include "controller/cli/tree.h"

namespace everstep::cli {

CommandSpec CkptTrafficCommand() {
  return {
      .name = "traffic",
      .verb = Verb::kCkptTraffic,
      .summary = "What checkpoints send between nodes, and what it costs training",
      .description =
          "Bytes by class since the agent started: commit goes before repair, repair before "
          "persist, persist before scrub. UNCHANGED was not sent because the peer had it. LIMIT "
          "is set while steps with traffic are longer than without; SLOWDOWN AT MOST says by how "
          "much. Where every step sends, they are held against the fastest tenth of themselves, "
          "so that it counts other load on the machine, too. "
          "What did not go well is counted and explained below.",
      .words = {{"NODE", "only these nodes", Names::kNodes, WordSpec::Count::kAny}},
      .options = {{"watch", 'w', "", "show it again every second until Ctrl-C"}},
      .examples = {{"everstep ckpt traffic", ""}, {"everstep ckpt traffic n1 -w", ""}}};
}

}  // namespace everstep::cli
