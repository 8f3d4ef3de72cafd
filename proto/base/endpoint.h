// Addresses as people write them. Pure; nothing is resolved.
#pragma once

#include <string_view>

namespace everstep {

// Reaches this machine alone: localhost, 127.x.y.z or ::1, bare or as HOST:PORT ([::1]:PORT), or a
// unix socket (unix:...).
bool IsLoopback(std::string_view address);

}  // namespace everstep
