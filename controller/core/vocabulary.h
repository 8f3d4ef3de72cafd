// The words of the controller's history: every event name and every reason code, with what it
// means. `everstep status`, `job show`, `events`, the metrics and a run's summary use these and no
// others; docs/reference/events.md is printed from them by tests/datadriven/events_doc.cc.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "controller/core/types.h"

namespace everstep::controller {

struct EventName {
  const char* name;     // JournalRecord::type: stable, never reused for another meaning
  const char* meaning;  // one sentence
};

// In the order in which a reader meets them: nodes, jobs, generations, the controller.
std::span<const EventName> EventNames();
bool IsEventName(std::string_view name);

// What the code says, for people: one clause, "a worker ended with an exit code other than 0".
const char* ReasonMeaning(Reason reason);

// docs/reference/events.md, whole.
std::string EventsReference();

}  // namespace everstep::controller
