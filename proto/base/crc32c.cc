// Two ways in hardware:
//  - the crc32 instruction (3 cycles, one a cycle): three streams hide its latency (M. Adler,
//    crc32c.c, 2013); a copy stores whole cache lines past the cache;
//  - carry-less multiplication of 512-bit words (V. Gopal et al., Fast CRC computation using
//    PCLMULQDQ, 2009): four streams, each its own run of memory, so that four of the prefetcher's
//    streams feed one core, and whole cache lines are stored past the cache.
// The streams' results are joined by tables that advance a CRC over a fixed count of zero bytes.
#include "proto/base/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace everstep {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // reflected

using Matrix = std::array<std::uint32_t, 32>;  // over GF(2), one column a bit

constexpr std::uint32_t Times(const Matrix& m, std::uint32_t v) {
  std::uint32_t sum = 0;
  for (std::size_t i = 0; v != 0; ++i, v >>= 1) {
    if ((v & 1) != 0) sum ^= m[i];
  }
  return sum;
}
constexpr Matrix Square(const Matrix& m) {
  Matrix out{};
  for (std::size_t i = 0; i < 32; ++i) out[i] = Times(m, m[i]);
  return out;
}
// Advances a CRC over one zero byte.
constexpr Matrix OneByte() {
  Matrix bit{};
  bit[0] = kPolynomial;
  for (std::size_t i = 1; i < 32; ++i) bit[i] = 1u << (i - 1);
  return Square(Square(Square(bit)));
}
// kPowers[k] advances over 2^k zero bytes.
constexpr std::array<Matrix, 64> Powers() {
  std::array<Matrix, 64> out{};
  out[0] = OneByte();
  for (std::size_t k = 1; k < 64; ++k) out[k] = Square(out[k - 1]);
  return out;
}
const std::array<Matrix, 64>& PowerTable() {
  static const std::array<Matrix, 64> table = Powers();
  return table;
}

struct SliceTables {
  std::uint32_t t[8][256];
};
constexpr SliceTables MakeSlices() {
  SliceTables s{};
  for (std::uint32_t n = 0; n < 256; ++n) {
    std::uint32_t c = n;
    for (int k = 0; k < 8; ++k) c = (c & 1) != 0 ? (c >> 1) ^ kPolynomial : c >> 1;
    s.t[0][n] = c;
  }
  for (std::uint32_t n = 0; n < 256; ++n) {
    for (int k = 1; k < 8; ++k) s.t[k][n] = (s.t[k - 1][n] >> 8) ^ s.t[0][s.t[k - 1][n] & 0xFF];
  }
  return s;
}
constexpr SliceTables kSlices = MakeSlices();

std::uint64_t Load64(const unsigned char* p) {
  std::uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

std::uint32_t TableRaw(std::uint32_t c, const unsigned char* p, std::size_t n) {
  while (n >= 8) {
    const std::uint64_t v = Load64(p) ^ c;  // little-endian hosts only, as the format itself
    c = kSlices.t[7][v & 0xFF] ^ kSlices.t[6][(v >> 8) & 0xFF] ^ kSlices.t[5][(v >> 16) & 0xFF] ^
        kSlices.t[4][(v >> 24) & 0xFF] ^ kSlices.t[3][(v >> 32) & 0xFF] ^
        kSlices.t[2][(v >> 40) & 0xFF] ^ kSlices.t[1][(v >> 48) & 0xFF] ^ kSlices.t[0][v >> 56];
    p += 8;
    n -= 8;
  }
  for (; n > 0; --n, ++p) c = kSlices.t[0][(c ^ *p) & 0xFF] ^ (c >> 8);
  return c;
}

#if defined(__x86_64__) || defined(__aarch64__)

constexpr std::size_t kLong = 8192;
constexpr std::size_t kShort = 256;

// Advances a CRC over a fixed count of zero bytes, by four table look-ups.
struct Shift {
  std::uint32_t t[4][256];
  explicit Shift(std::size_t bytes) {  // REQUIRES a power of two
    std::size_t k = 0;
    while ((std::size_t{1} << k) < bytes) ++k;
    const Matrix& m = PowerTable()[k];
    for (std::uint32_t n = 0; n < 256; ++n) {
      for (unsigned b = 0; b < 4; ++b) t[b][n] = Times(m, n << (8 * b));
    }
  }
  std::uint32_t operator()(std::uint32_t c) const {
    return t[0][c & 0xFF] ^ t[1][(c >> 8) & 0xFF] ^ t[2][(c >> 16) & 0xFF] ^ t[3][c >> 24];
  }
};
const Shift& LongShift() {
  static const Shift shift(kLong);
  return shift;
}
const Shift& ShortShift() {
  static const Shift shift(kShort);
  return shift;
}

#if defined(__x86_64__)
#define EVERSTEP_CRC_TARGET __attribute__((target("sse4.2,avx")))
EVERSTEP_CRC_TARGET inline std::uint64_t Crc8(std::uint64_t c, std::uint64_t v) {
  return _mm_crc32_u64(c, v);
}
EVERSTEP_CRC_TARGET inline std::uint32_t Crc1(std::uint32_t c, unsigned char v) {
  return _mm_crc32_u8(c, v);
}
// 64 bytes past the cache. REQUIRES: `to` at a multiple of 64.
EVERSTEP_CRC_TARGET inline void StreamLine(unsigned char* to, const unsigned char* from) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
}
bool HasHardware() {
  return __builtin_cpu_supports("sse4.2") != 0 && __builtin_cpu_supports("avx") != 0;
}
constexpr const char* kMethod = "sse4.2";
#else
#define EVERSTEP_CRC_TARGET __attribute__((target("+crc")))
EVERSTEP_CRC_TARGET inline std::uint64_t Crc8(std::uint64_t c, std::uint64_t v) {
  return __crc32cd(static_cast<std::uint32_t>(c), v);
}
EVERSTEP_CRC_TARGET inline std::uint32_t Crc1(std::uint32_t c, unsigned char v) {
  return __crc32cb(c, v);
}
inline void StreamLine(unsigned char* to, const unsigned char* from) {
  std::memcpy(to, from, 64);
}
bool HasHardware() {
  return (getauxval(AT_HWCAP) & (1ul << 7)) != 0;
}  // HWCAP_CRC32
constexpr const char* kMethod = "armv8";
#endif

constexpr std::size_t kLine = 64;  // bytes of a cache line

// One block of three streams of `kBlock` bytes each, copied when kCopy: then `to` is at a line's
// begin.
template <std::size_t kBlock, bool kCopy>
EVERSTEP_CRC_TARGET std::uint32_t Block(std::uint32_t crc, unsigned char* to,
                                        const unsigned char* from, const Shift& shift) {
  std::uint64_t a = crc, b = 0, c = 0;
  for (std::size_t line = 0; line < kBlock; line += kLine) {
    if constexpr (kCopy) {
      StreamLine(to + line, from + line);
      StreamLine(to + line + kBlock, from + line + kBlock);
      StreamLine(to + line + 2 * kBlock, from + line + 2 * kBlock);
    }
    for (std::size_t i = line; i < line + kLine; i += 8) {
      a = Crc8(a, Load64(from + i));
      b = Crc8(b, Load64(from + i + kBlock));
      c = Crc8(c, Load64(from + i + 2 * kBlock));
    }
  }
  const auto joined = shift(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
  return shift(joined) ^ static_cast<std::uint32_t>(c);
}

template <bool kCopy>
EVERSTEP_CRC_TARGET std::uint32_t HardwareRaw(std::uint32_t c, unsigned char* to,
                                              const unsigned char* from, std::size_t n) {
  const auto forward = [&](std::size_t bytes) {
    from += bytes;
    if constexpr (kCopy) to += bytes;
    n -= bytes;
  };
  const auto rest = [&](std::size_t bytes) {
    if constexpr (kCopy) std::memcpy(to, from, bytes);
    std::size_t i = 0;
    for (; i + 8 <= bytes; i += 8) c = static_cast<std::uint32_t>(Crc8(c, Load64(from + i)));
    for (; i < bytes; ++i) c = Crc1(c, from[i]);
    forward(bytes);
  };
  if constexpr (kCopy) rest(std::min(n, -reinterpret_cast<std::uintptr_t>(to) & (kLine - 1)));
  while (n >= 3 * kLong) {
    c = Block<kLong, kCopy>(c, to, from, LongShift());
    forward(3 * kLong);
  }
  while (n >= 3 * kShort) {
    c = Block<kShort, kCopy>(c, to, from, ShortShift());
    forward(3 * kShort);
  }
  rest(n);
  return c;
}

const bool kHardware = HasHardware();
#endif

#if defined(__x86_64__)
#define EVERSTEP_WIDE_TARGET __attribute__((target("avx512f,avx,vpclmulqdq,pclmul,sse4.2")))

constexpr std::size_t kStreams = 4;
constexpr std::size_t kSpan = 16384;     // of one stream; a power of two
constexpr std::size_t kWideBytes = 512;  // fewer: the crc32 instruction is as quick

// x^n modulo the polynomial, reflected.
constexpr std::uint32_t PowerOfX(std::size_t n) {
  std::uint32_t r = 0x80000000u;
  for (std::size_t i = 0; i < n; ++i) r = (r & 1) != 0 ? (r >> 1) ^ kPolynomial : r >> 1;
  return r;
}
// Multipliers that advance the two halves of a 128-bit word over `bytes` bytes.
template <std::size_t bytes>
EVERSTEP_WIDE_TARGET inline __m512i Multipliers() {
  constexpr std::uint64_t low = std::uint64_t{PowerOfX(8 * bytes + 32)} << 1;
  constexpr std::uint64_t high = std::uint64_t{PowerOfX(8 * bytes - 32)} << 1;
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}
EVERSTEP_WIDE_TARGET inline __m512i Fold(__m512i sum, __m512i multipliers, __m512i next) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sum, multipliers, 0x00),
                                   _mm512_clmulepi64_epi128(sum, multipliers, 0x11), next, 0x96);
}
template <bool kCopy>
EVERSTEP_WIDE_TARGET inline __m512i Take(unsigned char* to, const unsigned char* from,
                                         std::size_t at) {
  const __m512i word = _mm512_loadu_si512(from + at);
  if constexpr (kCopy) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), word);
  return word;
}
EVERSTEP_WIDE_TARGET inline std::uint32_t Reduce(__m512i sum) {
  alignas(64) std::uint64_t words[8];
  _mm512_store_si512(words, sum);
  std::uint64_t c = 0;
  for (const std::uint64_t w : words) c = Crc8(c, w);
  return static_cast<std::uint32_t>(c);
}

// `n` bytes of each of kRuns runs, kSpan apart; the raw CRC of each. The first run's begins with
// `crc`. REQUIRES: n a multiple of 64 * kWords; `to` at a multiple of 64.
template <std::size_t kRuns, std::size_t kWords, bool kCopy>
EVERSTEP_WIDE_TARGET std::array<std::uint32_t, kRuns> Runs(std::uint32_t crc, unsigned char* to,
                                                           const unsigned char* from,
                                                           std::size_t n) {
  constexpr std::size_t kStep = 64 * kWords;
  __m512i sum[kRuns][kWords];
  for (std::size_t r = 0; r < kRuns; ++r) {
    for (std::size_t w = 0; w < kWords; ++w) {
      sum[r][w] = Take<kCopy>(to, from, r * kSpan + 64 * w);
    }
  }
  sum[0][0] =
      _mm512_xor_si512(sum[0][0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  const __m512i step = Multipliers<kStep>();
  for (std::size_t i = kStep; i < n; i += kStep) {
    for (std::size_t r = 0; r < kRuns; ++r) {
      for (std::size_t w = 0; w < kWords; ++w) {
        const std::size_t at = r * kSpan + i + 64 * w;
        sum[r][w] = Fold(sum[r][w], step, Take<kCopy>(to, from, at));
      }
    }
  }
  const __m512i word = Multipliers<64>();
  std::array<std::uint32_t, kRuns> out;
  for (std::size_t r = 0; r < kRuns; ++r) {
    __m512i all = sum[r][0];
    for (std::size_t w = 1; w < kWords; ++w) all = Fold(all, word, sum[r][w]);
    out[r] = Reduce(all);
  }
  return out;
}

const Shift& SpanShift() {
  static const Shift shift(kSpan);
  return shift;
}

template <bool kCopy>
EVERSTEP_WIDE_TARGET std::uint32_t WideRaw(std::uint32_t c, unsigned char* to,
                                           const unsigned char* from, std::size_t n) {
  const auto forward = [&](std::size_t bytes) {
    from += bytes;
    if constexpr (kCopy) to += bytes;
    n -= bytes;
  };
  if constexpr (kCopy) {  // whole lines can be stored past the cache only at multiples of 64
    const std::size_t head = std::min(n, -reinterpret_cast<std::uintptr_t>(to) & (kLine - 1));
    c = HardwareRaw<true>(c, to, from, head);
    forward(head);
  }
  while (n >= kStreams * kSpan) {
    const auto crcs = Runs<kStreams, 2, kCopy>(c, to, from, kSpan);
    const Shift& shift = SpanShift();
    c = crcs[0];
    for (std::size_t r = 1; r < kStreams; ++r) c = shift(c) ^ crcs[r];
    forward(kStreams * kSpan);
  }
  if (n >= 256) {
    const std::size_t whole = n / 256 * 256;
    c = Runs<1, 4, kCopy>(c, to, from, whole)[0];
    forward(whole);
  }
  return HardwareRaw<kCopy>(c, to, from, n);
}

const bool kWide = kHardware && __builtin_cpu_supports("avx512f") != 0 &&
                   __builtin_cpu_supports("vpclmulqdq") != 0;
#endif

}  // namespace

namespace internal {
std::uint32_t Crc32cTable(std::uint32_t crc, const void* data, std::size_t size) {
  return ~TableRaw(~crc, static_cast<const unsigned char*>(data), size);
}
std::uint32_t Crc32cCopyNarrow(std::uint32_t crc, void* to, const void* from, std::size_t size) {
  auto* out = static_cast<unsigned char*>(to);
  const auto* in = static_cast<const unsigned char*>(from);
#if defined(__x86_64__) || defined(__aarch64__)
  if (kHardware) return ~HardwareRaw<true>(~crc, out, in, size);
#endif
  std::memcpy(out, in, size);
  return Crc32cTable(crc, out, size);
}
}  // namespace internal

std::uint32_t Crc32cExtend(std::uint32_t crc, const void* data, std::size_t size) {
#if defined(__x86_64__)
  if (kWide && size >= kWideBytes) {
    return ~WideRaw<false>(~crc, nullptr, static_cast<const unsigned char*>(data), size);
  }
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  if (kHardware) {
    return ~HardwareRaw<false>(~crc, nullptr, static_cast<const unsigned char*>(data), size);
  }
#endif
  return internal::Crc32cTable(crc, data, size);
}

std::uint32_t Crc32cCopy(std::uint32_t crc, void* to, const void* from, std::size_t size) {
#if defined(__x86_64__)
  if (kWide && size >= kWideBytes) {
    return ~WideRaw<true>(~crc, static_cast<unsigned char*>(to),
                          static_cast<const unsigned char*>(from), size);
  }
#endif
  return internal::Crc32cCopyNarrow(crc, to, from, size);
}

std::uint32_t Crc32cCombine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t size_b) {
  for (std::size_t k = 0; size_b != 0; ++k, size_b >>= 1) {
    if ((size_b & 1) != 0) crc_a = Times(PowerTable()[k], crc_a);
  }
  return crc_a ^ crc_b;
}

const char* Crc32cMethod() {
#if defined(__x86_64__)
  if (kWide) return "avx512";
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  if (kHardware) return kMethod;
#endif
  return "table";
}

}  // namespace everstep
