// One readable line for each event and each decision: what transcripts (tests/datadriven), a
// replay and a debugger print. Stable, deterministic, pure. Not a wire format: nothing parses it.
#pragma once

#include <string>
#include <vector>

#include "controller/core/decision.h"
#include "controller/core/event.h"
#include "controller/core/state.h"

namespace everstep::controller {

std::string ToText(const Event& event);        // "worker_exited n1.3 j g=2 rank=0 signal=9"
std::string ToText(const Record& record);      // "job j RUNNING g=2 ..."
std::string ToText(const Deletion& deletion);  // "generation j/1"
std::string ToText(const Command& command);    // "n1.3 #2 prepare j g=2 host_store"
std::string ToText(const Reply& reply);        // "ok: node 'n1' is draining"

// Every decision in the order in which a shell carries them out, each after its verb: put, delete,
// close, send, reply.
std::vector<std::string> ToLines(const Decisions& decisions);

// "1.5s", "250ms", "0": exact to the millisecond.
std::string DurationText(Duration d);

// The state as a person sees it: one line for each node, then one for each job.
std::vector<std::string> ToLines(const ClusterState& state);

const char* SeverityName(Severity severity);   // "warning"
const char* ReplyCodeName(ReplyCode code);     // "not_found"
const char* TableName(Deletion::Table table);  // "generation"
const char* StallKindName(StallKind kind);     // "stopped"

}  // namespace everstep::controller
