// The part of the command tree that is about which checkpoint to trust and what a loss would cost:
// children of `everstep ckpt`.
#include "controller/cli/tree.h"

namespace everstep::cli {
namespace {

WordSpec OneJob() {
  return {"JOB", "name of the job, or a unique beginning of it", Names::kJobs};
}

}  // namespace

std::vector<CommandSpec> CkptTrustCommands() {
  return {
      {.name = "plan",
       .verb = Verb::kCkptPlan,
       .summary = "The recovery plan that the controller would make if nodes were lost now",
       .description =
           "As ckpt survive, shard by shard: the step, each rank's source (own memory, a peer's, a "
           "file), how many other sources there are, the bytes, and why this one. It is the plan "
           "that the controller writes down before it carries it out, made by the same code on a "
           "copy of what it knows. Exit 1: nothing is left.",
       .words = {OneJob()},
       .options = {{"lose", 0, "NODE[,NODE...]", "these nodes", "", {}, Names::kNodes},
                   {"domain", 0, "LEVEL=NAME[,...]",
                    "all nodes of these failure domains: zone=a, evict=night"},
                   {"nodes", 0, "K", "the worst K nodes"}},
       .examples = {{"everstep ckpt plan gpt --lose n3", ""},
                    {"everstep ckpt plan gpt --domain zone=a -o json", ""}}},
      {.name = "diff",
       .verb = Verb::kCkptDiff,
       .summary = "What changed between two checkpoints, tensor by tensor",
       .description =
           "Names, shapes and checksums of the files' headers are compared; no tensor is read. "
           "Exit 1: they differ.",
       .words = {{"A", "JOB|DIR, JOB|DIR@STEP, or a checkpoint's own folder", Names::kFiles},
                 {"B", "likewise", Names::kFiles}},
       .examples = {{"everstep ckpt diff gpt@1200 gpt@1300", ""},
                    {"everstep ckpt diff /mnt/ckpt@1200 /mnt/ckpt", "the newest complete one"}}},
      {.name = "rollback",
       .verb = Verb::kCkptRollback,
       .summary = "Send a job back to an older step",
       .description =
           "Every rank restarts from that step, from memory or files. What was captured beyond it "
           "is given up for good: no later restart takes it, files are marked. --verified takes "
           "the newest checkpoint that --verify-after steps followed without an anomaly.",
       .words = {OneJob()},
       .options = {{"to", 0, "STEP", "this step"}, {"verified", 0, "", "the newest verified one"}},
       .examples = {{"everstep ckpt rollback gpt --verified", ""},
                    {"everstep ckpt rollback gpt --to 1200", ""}}},
      {.name = "anomaly",
       .verb = Verb::kCkptAnomaly,
       .summary = "Report that something is wrong with a job's training",
       .description =
           "No checkpoint becomes verified until --verify-after steps have followed in quiet. "
           "Workers that fail by themselves and memory that fails a checksum count as well.",
       .words = {OneJob()},
       .options = {{"why", 0, "TEXT", "what was seen"}},
       .examples = {{"everstep ckpt anomaly gpt --why 'loss is NaN'", ""}}}};
}

}  // namespace everstep::cli
