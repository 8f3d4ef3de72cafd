// An error a person can act on: who and what, then what to do next. Values, no exceptions.
//
//   error: cannot drain n07: job llm would drop below its minimum of 6 nodes (has 6)
//     hint: wait for capacity, or accept a pause: everstep node drain n07 --allow-pause
#pragma once

#include <string>
#include <string_view>

#include "controller/cli/exit_codes.h"

namespace everstep::cli {

struct CliError {
  ExitCode exit = ExitCode::kFailed;
  std::string code = "FAILED";  // canonical upper-case name, as gRPC's: NOT_FOUND, UNAVAILABLE, ...
  std::string message;          // one line, no full stop, no "error:"
  std::string hint;             // what to do next; may be empty
};

// The two lines above, newline-terminated. Control characters but newline and tab are shown as '?'.
std::string FormatError(const CliError& error);

// {"error":{"code":"...","message":"...","hint":"..."}} and a newline.
std::string FormatErrorJson(const CliError& error);

// `text` as a JSON string, with its quotes. Invalid UTF-8 becomes U+FFFD.
std::string JsonQuote(std::string_view text);

}  // namespace everstep::cli
