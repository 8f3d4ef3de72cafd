// SipHash-2-4 (Aumasson, Bernstein 2012): a keyed 64-bit check for short messages. Here it proves
// that a peer knows the job's key; it hides nothing (TLS will).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace everstep::checkpoint {

using SipKey = std::array<std::uint64_t, 2>;

std::uint64_t SipHash(const SipKey& key, const void* data, std::size_t size);
// 128 bits from a key of any length.
SipKey DeriveKey(std::string_view secret);
// Takes the same time whatever differs.
bool SameTag(std::uint64_t a, std::uint64_t b);

}  // namespace everstep::checkpoint
