// Small files that others read while they are written. Thread-safe.
#pragma once

#include <string>
#include <string_view>

namespace everstep {

enum class Durable { kNo, kYes };

// Writes beside `path` and renames: a reader, a crash or a full disk never leaves half of it. kYes:
// also a power cut does not, which costs an fsync of the file and of its directory. Returns 0, or
// the errno of what was refused: what was there is still there then, and nothing lies beside it.
int WriteWhole(const std::string& path, std::string_view content, Durable durable = Durable::kNo);

// "cannot write /a/b: No space left on device"
std::string CannotWrite(const std::string& path, int error);

}  // namespace everstep
