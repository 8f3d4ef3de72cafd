// A system error's text. Thread-safe, as strerror is not.
#pragma once

#include <string>
#include <system_error>

namespace everstep {

// "No such file or directory"
inline std::string ErrnoText(int number) {
  return std::generic_category().message(number);
}

}  // namespace everstep
