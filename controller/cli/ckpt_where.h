// Which checkpoint directory, and which checkpoint of it, a person means: for the verbs that read
// the file tier.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/files/file_tier.h"
#include "controller/cli/context.h"
#include "controller/cli/result.h"

namespace everstep::cli {

// A path, or the directory of a job. Asks the controller for the latter alone.
bool LooksLikeDirectory(const std::string& word);
Result<std::string> DirectoryOf(Context& context, const std::string& word);

// The one of this step, or with -1 the newest complete one.
Result<checkpoint::FileCheckpoint> ChosenCheckpoint(checkpoint::FileTier* tier, std::int64_t step);

CliError FromDisk(const checkpoint::Error& error, std::string hint = "");

}  // namespace everstep::cli
