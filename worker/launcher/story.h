// What a job's statuses tell a person, as they come: plain lines for what is news, the text of the
// live line, and at the end the facts of the summary. Pure but for the order in which statuses are
// given.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "admin.pb.h"
#include "worker/launcher/flags.h"
#include "worker/launcher/summary.h"

namespace everstep::launcher {

class Story {
 public:
  // Lines (without a line end) that say what changed since the status before.
  std::vector<std::string> News(const v1::JobStatus& status);

 private:
  struct Told {
    bool recovered = false;
  };
  std::map<std::uint64_t, Told> faults_;
  std::string waiting_;  // last line about missing nodes
};

// "RUNNING  2 workers on 1 node  generation 3  step 120 (119 safe)  2 faults, 0.41 s lost"
std::string LiveLine(const v1::JobStatus& status);

// `script` as the user wrote it; `logs`: their directory, or the command that shows them.
RunOutcome OutcomeOf(const v1::JobStatus& status, const std::string& script,
                     const std::string& logs);

// Lines that came from a worker through the controller, as --tee, --redirects and
// --local-ranks-filter want them shown; empty: not at all.
std::string ShownLines(const LaunchFlags& flags, std::uint32_t nproc_per_node,
                       const v1::JobLogLines& lines);

// "2026-01-31T14:02:11.482Z" as torchrun prints times: "2026-01-31_15:02:11", local. Else as it is.
std::string LocalTime(const std::string& rfc3339);

}  // namespace everstep::launcher
