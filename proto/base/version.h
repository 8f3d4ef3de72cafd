// The product's version and the versions of its wires, in one place.
#pragma once

#include <cstdint>

namespace everstep {

inline constexpr const char* kVersion = "0.1.0";

// Between agents and controllers (Register.protocol_version): a controller refuses any other.
inline constexpr std::uint32_t kProtocolVersion = 1;

}  // namespace everstep
