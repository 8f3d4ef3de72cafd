#include "proto/base/told.h"

namespace everstep {
namespace {

std::uint64_t Number(std::string_view bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i > 0; --i) {
    value = (value << 8) | static_cast<unsigned char>(bytes[i - 1]);
  }
  return value;
}

void Put(std::uint64_t value, std::size_t bytes, std::string* out) {
  for (std::size_t i = 0; i < bytes; ++i) {
    out->push_back(static_cast<char>((value >> (8 * i)) & 0xFF));
  }
}

}  // namespace

std::optional<std::vector<ToldWord>> DecodeTold(std::string_view bytes) {
  if (bytes.empty() || bytes.size() > kMaxToldBytes) return std::nullopt;
  std::vector<ToldWord> words;
  while (!bytes.empty()) {
    if (bytes.size() < kToldHeader) return std::nullopt;
    const std::uint64_t sequence = Number(bytes.substr(0, 8));
    const std::uint64_t kind = Number(bytes.substr(8, 4));
    const std::uint64_t size = Number(bytes.substr(12, 4));
    bytes.remove_prefix(kToldHeader);
    if (size > kMaxToldBody || size > bytes.size()) return std::nullopt;
    if (kind < 1 || kind > static_cast<std::uint64_t>(ToldKind::kPlan)) return std::nullopt;
    if (sequence == 0) return std::nullopt;
    if (!words.empty() && sequence != words.back().sequence + 1) return std::nullopt;
    words.push_back({sequence, static_cast<ToldKind>(kind), std::string(bytes.substr(0, size))});
    bytes.remove_prefix(size);
  }
  return words;
}

std::string EncodeTold(const std::vector<ToldWord>& words) {
  std::string out;
  for (const ToldWord& word : words) {
    Put(word.sequence, 8, &out);
    Put(static_cast<std::uint64_t>(word.kind), 4, &out);
    Put(word.body.size(), 4, &out);
    out += word.body;
  }
  return out;
}

}  // namespace everstep
