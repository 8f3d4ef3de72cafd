#include "controller/core/vocabulary.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

namespace everstep::controller {
namespace {

constexpr std::array kEvents = {
    EventName{"node_registered", "A node joined, or came back with nothing it had before."},
    EventName{"node_reattached",
              "An agent registered again; its keeper, workers and memory are "
              "what they were."},
    EventName{"node_refused", "A node was turned away."},
    EventName{"node_suspect",
              "A node's stream broke or its heartbeat is overdue; nothing is done "
              "until its lease ends."},
    EventName{"node_alive", "A suspect node is heard again."},
    EventName{"node_lost",
              "A node's lease ended or its processes are known dead; its incarnation "
              "is fenced."},
    EventName{"keeper_died", "A node's keeper died and its workers with it; its agent lives."},
    EventName{"node_draining",
              "A node is being left: an operator drains it, or it said that it "
              "will go away."},
    EventName{
        "node_warming",
        "A node is going to join a job that runs. It imports what the job needs first, and the "
        "job trains on without it until then."},
    EventName{"drain_deferred",
              "A job trains on with a node that is leaving, since no node can "
              "take its place yet."},
    EventName{"node_undrained", "A node takes part again."},
    EventName{"job_submitted", "A job was handed in."},
    EventName{"job_waiting",
              "A job has too few nodes; what is saved is kept and it goes on by "
              "itself when there are enough."},
    EventName{"fault",
              "Something ended or endangered a generation; the job's list of faults has "
              "the same entry."},
    EventName{"report_refused",
              "A node told of a rank that another node hosts; nothing was done. Once a node and "
              "generation."},
    EventName{"generation_prepare",
              "A new generation was decided: old workers stop, nodes say "
              "what they hold."},
    EventName{"generation_activate",
              "The generation's plan is on disk; its workers are being "
              "started."},
    EventName{"restore", "Which step the generation starts from, and where its bytes come from."},
    EventName{"rebuild",
              "Shards of the newest committed step were lost with their nodes: members make them "
              "anew out of parities before the generation starts, or it took too long."},
    EventName{"shard_damaged",
              "A copy in a node's memory fails its checksum: which one, who found it, who has it "
              "whole. It is not restored from, and repaired from there."},
    EventName{"shard_repaired", "A damaged copy is whole again."},
    EventName{"copies_restored",
              "Every rank's state of the newest committed step has as many copies again as the job "
              "asks for."},
    EventName{"memory_suspect",
              "Copies in one node's memory failed their checksums again and again: drain it and "
              "test its memory."},
    EventName{"checkpoint_verified",
              "A checkpoint in the job's directory was followed by enough quiet steps; it stays "
              "until a newer one is verified."},
    EventName{"anomaly", "An operator reported that something is wrong with the training."},
    EventName{"rolled_back",
              "The job goes back to a step; what was captured beyond is never restored from."},
    EventName{"rollback_undone",
              "The step that a roll-back names was overwritten before the workers stopped, and "
              "nothing older is left: the job goes on from what was given up."},
    EventName{"checkpoint_persisted",
              "A committed step stands in the job's checkpoint directory, whole."},
    EventName{"checkpoint_not_persisted",
              "A step could not be written there; the one before it stays, and the next due one is "
              "tried."},
    EventName{"generation_running",
              "Every worker of the generation runs. `stayed`: ranks whose process is of an earlier "
              "generation (sessions); `anew`: the others. Neither where nobody stayed."},
    EventName{"workers_linger",
              "Workers still run, without a step, 30 s after others of their generation exited 0: "
              "a last checkpoint, or a process that hangs in its end. Nothing is done."},
    EventName{"ledger_taken_back",
              "A generation began with an earlier step than the ledger's next one: lines of steps "
              "that it does again do not count any more."},
    EventName{
        "ledger_fault",
        "A line of the ledger contradicts it (a gap, a double, a microbatch twice or never, a "
        "word that is none): the job's ledger is not whole."},
    EventName{"job_stopping", "The job's end is decided; its nodes clean up."},
    EventName{"job_ended", "The job is over on every node."},
    EventName{"memory_freed",
              "What a failed job captured is given up on every node; handed in again it starts "
              "from nothing."},
    EventName{"job_forgotten", "The record of a job that has ended is given up, and its memory."},
    EventName{"controller_recovered", "A controller took over from what the store held."},
    EventName{"store_behind",
              "A node knows a later generation than the store: the store is an "
              "older copy; the job is moved beyond both."},
};

constexpr std::array kMeanings = {
    "no reason is recorded",
    "the job was handed in",
    "enough nodes are there: the first generation may form",
    "fewer nodes than the job's minimum",
    "every worker exited 0",
    "an operator or the launcher asked",
    "fewer nodes than the minimum for longer than join_timeout",
    "a worker ended with an exit code other than 0, or by a signal that it raised itself",
    "a worker was ended by a signal that neither it nor Everstep sent",
    "the kernel's memory killer took a worker",
    "a worker is stopped (process state T)",
    "workers run, but their process group never formed",
    "an agent could not start a worker",
    "a node was silent for its whole lease",
    "a node's processes are known to be dead",
    "a node's keeper is gone and its workers with it",
    "a node came back with nothing of what it had",
    "a node did not finish a prepare or an activate in time",
    "a node said that it cannot take part",
    "capacity grew",
    "an operator drains the node",
    "the node said that it will go away",
    "a controller started from what the store held",
    "the script failed more often than max_restarts allows",
    "the script failed and never got past its start",
    "generations ended one after the other without a new step",
    "generations did not come to run (no process group, workers killed while they start), too "
    "often in a row",
    "a node registered for the first time, or with a new keeper",
    "an agent or the controller restarted and nothing was lost",
    "a node's stream to the controller broke",
    "a node was silent for half its lease, its stream still open",
    "an operator ended a drain",
    "a message of an old generation or incarnation was dropped",
    "a checkpoint step has its copies",
    "every rank starts from a slot on its own node",
    "some ranks start from a slot of another node",
    "no step is complete: the generation starts from nothing, or from the script's own file",
    "the controller has as many nodes as it takes",
    "a suspect node is heard again",
    "what a failed job captured was kept long enough",
    "some workers of the generation exited 0 long ago, others run on and make no step",
    "the job's interval for its checkpoint directory is over",
    "what the memory holds is written before it may go",
    "an operator asked for a checkpoint",
    "a step could not be written to the checkpoint directory",
    "ranks start from files of the checkpoint directory",
    "a copy in a node's memory failed its checksum",
    "an operator sent the job back to a step",
    "enough steps followed in which nothing strange was reported",
    "an operator reported that something is wrong with the training",
    "a world of another size, or shares of one state: each rank takes its bytes from all shards of "
    "the step",
    "the step of a roll-back was overwritten before the workers stopped, and nothing older is left",
    "shards whose every copy was lost are made anew out of parities",
    "lost shards were not made anew out of parities in time: an older step is taken",
    "what a job's workers told does not show each (step, microbatch) to be in the model exactly "
    "once",
    "a worker refused its input and said why (a batch that does not divide, ranks with other "
    "settings): the job ends, or goes on without the newcomer that refused",
};
static_assert(kMeanings.size() == static_cast<std::size_t>(Reason::kCount),
              "every reason has a meaning");

}  // namespace

std::span<const EventName> EventNames() {
  return kEvents;
}

bool IsEventName(std::string_view name) {
  return std::any_of(kEvents.begin(), kEvents.end(),
                     [name](const EventName& e) { return e.name == name; });
}

const char* ReasonMeaning(Reason reason) {
  const auto i = static_cast<std::size_t>(reason);
  return i < kMeanings.size() ? kMeanings[i] : "unknown";
}

std::string EventsReference() {
  std::string text =
      "# Events and reason codes\n\n"
      "This page is printed from the program (`build/release/tests/everstep_events_doc`); a test "
      "compares.\n\n"
      "An event is a line of the controller's history, as `everstep events` prints it: when, its "
      "name, its severity (INFO, WARNING,\nERROR), a reason code, the job, node, rank and "
      "generation it concerns, a sentence, and the evidence as `key=value` pairs.\n"
      "The newest 10,000 are kept. The reason code of a fault is the same in `everstep status`, "
      "`everstep job show`, `everstep events`,\nthe metrics and the summary at the end of a "
      "run.\n\n"
      "## Events\n\n| event | meaning |\n|---|---|\n";
  for (const EventName& e : EventNames()) text += fmt::format("| `{}` | {} |\n", e.name, e.meaning);
  text += "\n## Reason codes\n\n| code | meaning |\n|---|---|\n";
  for (std::size_t i = 1; i < kMeanings.size(); ++i) {
    const auto reason = static_cast<Reason>(i);
    text += fmt::format("| `{}` | {} |\n", ReasonName(reason), ReasonMeaning(reason));
  }
  text +=
      "\nWho pays for which fault: [lifecycle](../internals/lifecycle.md), \"Restarts: who "
      "pays\".\n";
  return text;
}

}  // namespace everstep::controller
