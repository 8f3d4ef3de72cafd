#include "proto/base/names.h"

#include <algorithm>

namespace everstep {

bool IsSafeName(std::string_view name) {
  if (name.empty() || name.size() > kMaxJobName || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '-';
  });
}

bool IsJobName(std::string_view name) {
  return IsSafeName(name) && name.front() != '.';
}

bool IsNodeName(std::string_view name) {
  return IsSafeName(name) && name.size() <= kMaxNodeName &&
         std::none_of(name.begin(), name.end(),
                      [](char c) { return (c >= 'A' && c <= 'Z') || c == '_'; });
}

}  // namespace everstep
