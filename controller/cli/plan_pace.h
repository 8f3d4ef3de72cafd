// What slow nodes should do (`everstep plan compose --speed n3=0.7`), for people and as JSON.
#pragma once

#include <cstdint>
#include <string>

#include "controller/cli/render.h"
#include "controller/cli/result.h"
#include "controller/planner/replan.h"

namespace everstep::cli {

// `speeds`: "n3=0.7,n5=0.5", each of the usual speed. The remedies with what each makes, and who
// runs what with the cheapest.
Result<std::string> PacesShown(const planner::Library& library, const planner::Seated& seated,
                               const std::string& speeds, std::int64_t horizon_ns,
                               const RenderOptions& render, bool json);

}  // namespace everstep::cli
