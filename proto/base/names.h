// Names of jobs and nodes: they stand in paths, keys and texts. Pure.
#pragma once

#include <cstddef>
#include <string_view>

namespace everstep {

inline constexpr std::size_t kMaxJobName = 128;
inline constexpr std::size_t kMaxNodeName = 63;

// [A-Za-z0-9_.-]{1,128} and no path step ("." or ".."): safe as a directory's name.
bool IsSafeName(std::string_view name);
// A safe name that does not begin with a dot.
bool IsJobName(std::string_view name);
// [a-z0-9.-]{1,63}, as a DNS label, and a safe name.
bool IsNodeName(std::string_view name);

}  // namespace everstep
