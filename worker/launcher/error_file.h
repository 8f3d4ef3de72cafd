// Reads what torch's @record wrote into TORCHELASTIC_ERROR_FILE. The one file that knows JSON.
#pragma once

#include <string>
#include <string_view>

namespace everstep::launcher {

// The traceback (message.extraInfo.py_callstack), else the message; empty when `json` is no such
// document. Never throws, whatever the worker wrote.
std::string TextOfErrorFile(std::string_view json);

}  // namespace everstep::launcher
