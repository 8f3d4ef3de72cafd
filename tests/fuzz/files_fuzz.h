// Shared by the fuzzers of the file tier's parsers: an error must say something.
#pragma once

#include <string>

template <typename Result>
void WantsText(const Result& result) {
  if (!result.ok() && result.error().message.empty()) __builtin_trap();
}
