// CHECK: a programmer's error or a failed durable write. Always on; prints where and why, aborts.
#pragma once

#include <string_view>

namespace everstep {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              std::string_view message);

}  // namespace everstep

#define EVERSTEP_CHECK(condition, ...)                                                          \
  do {                                                                                          \
    if (!(condition)) [[unlikely]] {                                                            \
      ::everstep::CheckFailed(__FILE__, __LINE__, #condition, ::std::string_view{__VA_ARGS__}); \
    }                                                                                           \
  } while (false)
