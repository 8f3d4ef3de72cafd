// Figures as people read them.
#pragma once

#include <cstdint>
#include <string>

namespace everstep::cli {

// Two units at most: "840ms" "12.3s" "3m12s" "7h40m" "2d3h". Negative, NaN: "-".
std::string HumanSeconds(double seconds);

// "182,442"; negative: "-" (unknown).
std::string HumanCount(std::int64_t count);

// "512 B" "1.50 KiB" "64.0 MiB" "1.20 TiB": three digits.
std::string HumanBytes(std::uint64_t bytes);

// "1 step", "2 steps", "- steps" (unknown).
std::string Plural(std::int64_t count, const std::string& noun);

// `text`, or "-" when empty.
std::string OrDash(const std::string& text);

}  // namespace everstep::cli
