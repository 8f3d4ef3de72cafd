// What every verb of `everstep` but `run` answers to the shell; `everstep help exit-codes` prints
// it.
#pragma once

namespace everstep::cli {

enum class ExitCode : int {
  kOk = 0,
  kFailed = 1,        // the operation was understood and did not work
  kUsage = 2,         // the command line is wrong
  kNotFound = 3,      // no such job, node, cluster
  kForbidden = 4,     // unauthenticated or not permitted
  kUnreachable = 5,   // no controller answers; worth another try
  kConflict = 6,      // a precondition does not hold
  kTimeout = 7,       // waited as long as was asked
  kInterrupted = 130  // Ctrl-C
};

}  // namespace everstep::cli
