// The part of the command tree that plans pipelines: `everstep plan`. It asks no controller.
#include "controller/cli/tree.h"

namespace everstep::cli {
namespace {

using Count = WordSpec::Count;

std::vector<OptionSpec> PlanOptions(bool composes) {
  std::vector<OptionSpec> options = {
      {"profile",
       0,
       "FILE",
       "the model's layers as they were measured; required",
       "",
       {},
       Names::kFiles},
      {"nodes", 'n', "N", "nodes that the job has, 1 to 4096", "16"},
      {"faults", 'f', "F", "nodes that may be lost at once: F + 1 copies of each layer, 0 to 64",
       "1"},
      {"microbatch", 0, "SAMPLES", "instead of the profile's", "the profile's"},
      {"devices", 0, "N", "devices of a node, instead of the profile's", "the profile's"},
      {"device-memory", 0, "GIB", "of each device, instead of the profile's; 0: not limited",
       "the profile's"},
      {"most-microbatches", 0, "M",
       "a pipeline never gets more than M microbatches, so keeps fewer activations; 0: any number",
       "0"}};
  if (composes) {
    options.insert(options.begin() + 3,
                   {"batch", 'b', "SAMPLES", "of one iteration", "4 microbatches for each node"});
    options.push_back({"svg", 0, "FILE", "write the picture there, too", "", {}, Names::kFiles});
  }
  return options;
}

OptionSpec Horizon() {
  return {"next-change", 0, "DURATION",
          "expected time to the next change: a faster plan must pay for its move within it",
          "the fastest plan"};
}

}  // namespace

CommandSpec PlanCommands() {
  std::vector<OptionSpec> compose = PlanOptions(true);
  compose.push_back({.name = "speed",
                     .value = "NODE=PART",
                     .help =
                         "a node's part of the usual speed, n3=0.7: what it should do, and what "
                         "each remedy makes; may stand there several times",
                     .repeats = true});
  compose.push_back(Horizon());
  std::vector<OptionSpec> lose = PlanOptions(true);
  lose.push_back(Horizon());
  const std::vector<OptionSpec> join = lose;
  return {
      .name = "plan",
      .summary = "Pipelines for a model, before there is a cluster: templates, plans, losses",
      .description =
          "Reads a profile, a text with a line for each layer (docs/reference/profile.md), and "
          "answers what the controller's planner would do. Nodes are called n0, n1, ... . What the "
          "figures mean: docs/concepts/templates.md.",
      .children = {
          {.name = "templates",
           .verb = Verb::kPlanTemplates,
           .summary = "The pipeline templates for every number of nodes, and what they cover",
           .description =
               "TIME is an iteration of one pipeline with 4 microbatches for each stage; SLOWEST "
               "its slowest stage for one microbatch; MEMORY the most on one device.",
           .options = PlanOptions(false),
           .examples = {{"everstep plan templates --profile gpt.csv --device-memory 32", ""},
                        {"everstep plan templates --profile gpt.csv -n 64 -o json",
                         "with the layers of each stage"}}},
          {.name = "compose",
           .verb = Verb::kPlanCompose,
           .summary = "Which pipelines the nodes run, and how many microbatches each",
           .description =
               "The fastest that there is, with at least F + 1 copies of each layer. With --speed: "
               "for nodes that are slower, fewer microbatches, then fewer layers, then leaving, "
               "whichever is cheapest.",
           .options = compose,
           .examples = {{"everstep plan compose --profile gpt.csv --nodes 13 --batch 512", ""},
                        {"everstep plan compose --profile gpt.csv --svg plan.svg", ""},
                        {"everstep plan compose --profile gpt.csv --speed n3=0.7", ""}}},
          {.name = "lose",
           .verb = Verb::kPlanLose,
           .summary = "The plan after losing nodes, and what it moves",
           .description =
               "Without NODE: one node lost after the other, down to the fewest nodes that hold "
               "F + 1 copies; each line shows the worst single loss.",
           .words = {{"NODE", "nodes lost at once: n3 n7", Names::kNone, Count::kAny}},
           .options = lose,
           .examples = {{"everstep plan lose n3 n7 --profile gpt.csv --nodes 16", ""},
                        {"everstep plan lose --profile gpt.csv --nodes 16",
                         "every number of nodes from 15 down"}}},
          {.name = "join",
           .verb = Verb::kPlanJoin,
           .summary = "The plan after nodes have come, and what it moves",
           .words = {{"COUNT", "how many come"}},
           .options = join,
           .examples = {{"everstep plan join 2 --profile gpt.csv --nodes 13", ""}}},
          {.name = "explain",
           .verb = Verb::kPlanExplain,
           .summary = "Why this plan: every number of pipelines, the best grid, what limits it",
           .options = PlanOptions(true),
           .examples = {{"everstep plan explain --profile gpt.csv --nodes 13", ""}}}}};
}

}  // namespace everstep::cli
