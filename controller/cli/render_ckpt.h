// Placement and forecasts of checkpoints as people read them. Pure.
#pragma once

#include <string>

#include "controller/cli/render.h"

namespace everstep::cli {

std::string RenderPlacement(const v1::CheckpointPlacement& placement, const RenderOptions& options);
std::string RenderForecast(const v1::LossForecast& forecast, const RenderOptions& options);
// The same, shard by shard: each rank's source and why it is that one.
std::string RenderPlan(const v1::LossForecast& forecast, const RenderOptions& options);

}  // namespace everstep::cli
