// The part of the command tree that is about the file tier: children of `everstep ckpt`.
#include "controller/cli/tree.h"

namespace everstep::cli {
namespace {

WordSpec JobOrDirectory() {
  return {"JOB|DIR", "a job, or its checkpoint directory", Names::kJobs};
}
OptionSpec StepOption(std::string fallback) {
  return {"step", 0, "N", "the checkpoint of this step", std::move(fallback)};
}

}  // namespace

std::vector<CommandSpec> CkptFileCommands() {
  return {
      {.name = "list",
       .verb = Verb::kCkptList,
       .summary = "Checkpoints in a directory, newest first",
       .description =
           "complete: its manifest stands, and every file has its size. incomplete: some rank's "
           "file is missing, so it is no checkpoint (yet). damaged: a file failed its checksum, or "
           "the manifest did. given up: a roll-back went behind it. A directory is read as it is; "
           "no "
           "controller is asked.",
       .words = {JobOrDirectory()},
       .examples = {{"everstep ckpt list gpt", ""}, {"everstep ckpt list /mnt/ckpt -o json", ""}},
       .aliases = {"ls"}},
      {.name = "show",
       .verb = Verb::kCkptShow,
       .summary = "One checkpoint: its job, step, ranks, files and checksums; or all of a job's",
       .description =
           "Of a job without --step: what its controller knows of all its checkpoints, in memory "
           "and files: how far each is trusted, on which nodes each rank's copies lie now, and "
           "what is damaged.",
       .words = {JobOrDirectory()},
       .options = {StepOption("the newest complete one")},
       .examples = {{"everstep ckpt show gpt", ""},
                    {"everstep ckpt show /mnt/ckpt --step 1200", ""}}},
      {.name = "verify",
       .verb = Verb::kCkptVerify,
       .summary = "Read every byte and compare every checksum",
       .description = "Ends with 1 when something is damaged, and names the file and the tensor.",
       .words = {JobOrDirectory()},
       .options = {StepOption("all")},
       .examples = {{"everstep ckpt verify /mnt/ckpt", ""}}},
      {.name = "save",
       .verb = Verb::kCkptSave,
       .summary = "Write a job's newest committed step to its checkpoint directory now",
       .description =
           "From the memory of its nodes; training goes on. Returns when it is on the disk.",
       .words = {{"JOB", "name of the job, or a unique beginning of it", Names::kJobs}},
       .examples = {{"everstep ckpt save gpt", ""}}},
      {.name = "prune",
       .verb = Verb::kCkptPrune,
       .summary = "Remove old checkpoints",
       .description =
           "Never the newest that can be read, and nothing at all while there is none. What is "
           "newer than that one is left alone: it may be on its way.",
       .words = {JobOrDirectory()},
       .options = {{"keep", 0, "N", "complete ones that stay", "3"},
                   {"dry-run", 0, "", "only say what would go"}},
       .examples = {{"everstep ckpt prune /mnt/ckpt --keep 5 --dry-run", ""}}},
      {.name = "export",
       .verb = Verb::kCkptExport,
       .summary = "Make a folder that loads without Everstep",
       .description =
           "safetensors: a file for each name given to Checkpointer, tensors whole (parts of "
           "DTensors are put together), everything else in state.json. dcp: what "
           "torch.distributed.checkpoint.load reads. Every byte is verified first.",
       .words = {JobOrDirectory(), {"OUT", "folder to make", Names::kFiles}},
       .options = {StepOption("the newest complete one"),
                   {"format", 0, "FORMAT", "what to write", "safetensors", {"safetensors", "dcp"}},
                   {"python", 0, "PATH", "interpreter with torch and everstep",
                    "EVERSTEP_PYTHON, or python3"}},
       .examples = {{"everstep ckpt export gpt out", ""},
                    {"everstep ckpt export /mnt/ckpt out --format dcp --step 1200", ""}}}};
}

}  // namespace everstep::cli
