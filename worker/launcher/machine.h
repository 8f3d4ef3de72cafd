// What the launcher needs to know of the machine and the shell it was started from. All functions
// only look; thread-safe as long as nobody changes the process's environment.
#pragma once

#include <string>

#include "worker/launcher/flags.h"
#include "worker/launcher/job_spec.h"

namespace everstep::launcher {

// CPUs this process may use (as torch counts them: sched_getaffinity); NVIDIA devices by their
// /dev/nvidiaN, as CUDA_VISIBLE_DEVICES restricts them. XPUs are not looked for: 0.
MachineFacts ProbeMachine(const Environment& environment);

// How many devices a CUDA_VISIBLE_DEVICES value leaves of `present`: entries up to the first that
// is not valid, as the driver counts them. Pure.
std::uint32_t VisibleDevices(std::string_view value, std::uint32_t present);

// The user's interpreter, an absolute path: PYTHON_EXEC, the virtual environment's, python3 beside
// `command` (the path this program was called by), or of the PATH. Empty: *error says what was
// tried.
std::string FindPython(const Environment& environment, const std::string& command,
                       std::string* error);

// What of this shell and machine goes with the job. `command`: as for FindPython. Empty on success,
// else the error in the launcher's form.
std::string GatherFacts(const LaunchFlags& flags, const Environment& environment,
                        const std::string& command, SubmitterFacts* facts);

// The environment of this process.
Environment OwnEnvironment();

// The path this program was called by: argv[0], looked up in PATH when it has no '/'. Links are not
// followed: .venv/bin/everstep-run stays there.
std::string CommandPath(const std::string& argv0, const Environment& environment);

// gethostname, in the letters of a node's name: [a-z0-9.-]{1,48}.
std::string HostLabel();

// N random lower-case hexadecimal digits, from the kernel. N at most 32.
std::string RandomHex(std::size_t digits);

}  // namespace everstep::launcher
