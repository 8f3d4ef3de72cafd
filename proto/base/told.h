// What a worker says to its controller: words, in order, each of a kind, kept by the worker until
// they are acknowledged. Worker, keeper and agent pass them on as one string of bytes; the
// controller reads them.
//
//   word:  uint64 sequence, uint32 kind, uint32 bytes, then the body; little-endian
//
// Sequences are a rank's own in one generation, from 1, without a gap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace everstep {

enum class ToldKind : std::uint32_t {
  kLedger = 1,   // a line of the ledger: docs/internals/ledger.md
  kProfile = 2,  // a model's profile: docs/reference/profile.md; the newest counts
  kPlan = 3,     // the question that the plan answers, and the plan; the newest counts
};
inline constexpr std::size_t kToldHeader = 16;
inline constexpr std::size_t kMaxToldBody = 256u << 10;   // of one word
inline constexpr std::size_t kMaxToldBytes = 512u << 10;  // of words that go together
inline constexpr std::uint32_t kMaxToldPerSecond = 64;    // such bundles of one job

struct ToldWord {
  std::uint64_t sequence = 0;
  ToldKind kind = ToldKind::kLedger;
  std::string body;
  friend bool operator==(const ToldWord&, const ToldWord&) = default;
};

// Total. None: not whole words within the limits, of known kinds, in sequence, or no word at all.
std::optional<std::vector<ToldWord>> DecodeTold(std::string_view bytes);
std::string EncodeTold(const std::vector<ToldWord>& words);

}  // namespace everstep
