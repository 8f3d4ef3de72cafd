// CRC32C (Castagnoli, polynomial 0x1EDC6F41, reflected), as iSCSI, ext4 and RocksDB use it.
//
// Hardware instructions where the processor has them (AVX-512 with VPCLMULQDQ, SSE4.2, ARMv8 CRC),
// chosen at run time; a table (slicing by 8) elsewhere. Values are the plain ones:
// Crc32c("123456789") == 0xE3069283. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace everstep {

// CRC of `data` following bytes whose CRC is `crc` (0: nothing before).
std::uint32_t Crc32cExtend(std::uint32_t crc, const void* data, std::size_t size);
inline std::uint32_t Crc32c(const void* data, std::size_t size) {
  return Crc32cExtend(0, data, size);
}
inline std::uint32_t Crc32cExtend(std::uint32_t crc, std::string_view data) {
  return Crc32cExtend(crc, data.data(), data.size());
}
inline std::uint32_t Crc32c(std::string_view data) {
  return Crc32c(data.data(), data.size());
}

// As Crc32cExtend(crc, from, size), and copies the bytes to `to` in the same pass with stores that
// bypass the cache, so that a capture costs one trip through memory and leaves the trainer's cache
// alone. Call StoreFence() (checkpoint/store/fence.h) before telling another process. REQUIRES: the
// ranges do not overlap.
std::uint32_t Crc32cCopy(std::uint32_t crc, void* to, const void* from, std::size_t size);

// CRC of A followed by B from their own CRCs and B's size.
std::uint32_t Crc32cCombine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t size_b);

// "avx512", "sse4.2", "armv8" or "table": what this process uses.
const char* Crc32cMethod();

namespace internal {
// For tests, beside the chosen one: the portable one, and the copy without 512-bit words.
std::uint32_t Crc32cTable(std::uint32_t crc, const void* data, std::size_t size);
std::uint32_t Crc32cCopyNarrow(std::uint32_t crc, void* to, const void* from, std::size_t size);
}  // namespace internal

}  // namespace everstep
