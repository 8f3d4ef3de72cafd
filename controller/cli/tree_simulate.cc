// The part of the command tree that replays capacity traces: `everstep simulate`. It asks no
// controller.
#include "controller/cli/tree.h"

namespace everstep::cli {

CommandSpec SimulateCommand() {
  return {
      .name = "simulate",
      .verb = Verb::kSimulate,
      .summary = "What recovery policies make of a trace of nodes that come and go",
      .description =
          "Replays the trace for each policy under the same rules and counts committed samples, as "
          "shares of an oracle that always runs the fastest system on the nodes there are. "
          "Everstep's policy is the production planner. How each policy is modelled, and what is "
          "not: docs/concepts/policies.md.\n\nA trace or model that is no file is looked up in "
          "$EVERSTEP_TRACES: norm/NAME.csv, oobleck/NAME.csv; GPT-3-6.7b and others of Oobleck's "
          "artifact. \"all\" is every trace of norm/, or every model.",
      .options =
          {{.name = "trace",
            .value = "FILE",
            .help = "t_ms,event,node: nodes added and removed; may stand there several times",
            .names = Names::kFiles,
            .repeats = true},
           {.name = "spot",
            .value = "LAW",
            .help = "draw a trace instead, from what was counted on a recorded one",
            .choices = {"ec2-p3", "ec2-g4dn", "gcp-a100", "gcp-v100", "ec2-p3-30", "gcp-30", "10m",
                        "1h", "6h"}},
           {.name = "seed", .value = "N", .help = "of the drawn trace", .fallback = "1"},
           {.name = "model",
            .value = "TABLE",
            .help =
                "speeds by number of nodes, and what faults cost; may stand there several times",
            .names = Names::kFiles,
            .repeats = true},
           {.name = "profile",
            .value = "FILE",
            .help = "the layers, for the planner; without --model it gives the speeds, too",
            .fallback = "the recorded one of a model of the artifact",
            .names = Names::kFiles},
           {.name = "policy",
            .value = "NAME",
            .help = "varuna, bamboo, oobleck, memory, everstep; may stand there several times",
            .fallback = "all of them",
            .repeats = true},
           {.name = "batch",
            .letter = 'b',
            .value = "SAMPLES",
            .help = "of one iteration; with --profile alone",
            .fallback = "4 microbatches for each node"},
           {.name = "nodes",
            .letter = 'n',
            .value = "N",
            .help = "that the job uses at most; with --profile alone",
            .fallback = "32"},
           {.name = "faults",
            .letter = 'f',
            .value = "F",
            .help = "nodes that may be lost at once: F + 1 copies of each layer, 0 to 64",
            .fallback = "1"},
           {.name = "notice",
            .value = "DURATION",
            .help = "of each loss, before it",
            .fallback = "0"},
           {.name = "detect",
            .value = "DURATION",
            .help = "until a loss without notice is known",
            .fallback = "5s"},
           {.name = "boot", .value = "DURATION", .help = "of a node that comes", .fallback = "45s"},
           {.name = "price", .value = "DOLLARS", .help = "of a node's hour", .fallback = "0.91"},
           {.name = "same-speed",
            .help = "every policy trains as fast as the fastest: recovery alone is compared"},
           {.name = "paper-mode",
            .help = "samples a second as the simulators of Oobleck's artifact answer, accidents "
                    "included"},
           {.name = "svg", .value = "FILE", .help = "write a plot there", .names = Names::kFiles}},
      .examples = {
          {"everstep simulate --trace ec2_p3 --model GPT-3-6.7b", ""},
          {"everstep simulate --spot ec2-p3 --seed 1 --profile gpt.csv --batch 512",
           "without any recording"},
          {"everstep simulate --trace all --model all --svg all.svg", "one table, one plot"},
          {"everstep simulate --paper-mode --trace scale_p3-trace --model all", ""}}};
}

}  // namespace everstep::cli
