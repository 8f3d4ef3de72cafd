#include "checkpoint/codec/parity_code.h"

#include <algorithm>
#include <utility>

#include <isa-l/erasure_code.h>

#include "proto/base/check.h"

namespace everstep::checkpoint {
namespace {

constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;  // ISA-L counts in int

}  // namespace

Factor::Factor(std::uint8_t value) : value_(value), table_() {
  ec_init_tables(1, 1, &value, table_.data());
}

void MultiplyAdd(const Factor& factor, std::span<const std::byte> from, std::byte* into) {
  if (factor.value_ == 0) return;
  // ISA-L reads its inputs only; its prototypes say otherwise.
  auto* table = const_cast<std::uint8_t*>(factor.table_.data());
  while (!from.empty()) {
    const std::span<const std::byte> part = from.first(std::min(from.size(), kMostAtOnce));
    auto* data = reinterpret_cast<std::uint8_t*>(const_cast<std::byte*>(part.data()));
    auto* target = reinterpret_cast<std::uint8_t*>(into);
    ec_encode_data_update(static_cast<int>(part.size()), 1, 1, 0, table, data, &target);
    from = from.subspan(part.size());
    into += part.size();
  }
}

ParityCode::ParityCode(std::uint32_t shards, std::uint32_t parity)
    : shards_(shards), parity_(parity) {
  EVERSTEP_CHECK(shards >= 1 && parity >= 1 && shards + parity <= 256);
  factors_.reserve(std::size_t{parity} * shards);
  for (std::uint32_t p = 0; p < parity; ++p) {
    for (std::uint32_t j = 0; j < shards; ++j) {
      const auto sum = static_cast<std::uint8_t>((shards + p) ^ j);  // never 0: p's side is above
      factors_.emplace_back(parity == 1 ? std::uint8_t{1} : gf_inv(sum));
    }
  }
}

std::optional<ParityDecoder> ParityDecoder::Make(const ParityCode& code,
                                                 std::vector<std::uint32_t> lost,
                                                 std::vector<std::uint32_t> parities) {
  if (parities.size() < lost.size()) return std::nullopt;
  parities.resize(lost.size());
  ParityDecoder out;
  out.shards_ = code.shards();
  out.lost_ = std::move(lost);
  out.parities_ = std::move(parities);
  const std::size_t n = out.lost_.size();
  if (n == 0) return out;
  for (const std::uint32_t shard : out.lost_) EVERSTEP_CHECK(shard < code.shards());
  for (const std::uint32_t p : out.parities_) EVERSTEP_CHECK(p < code.parity());
  // parity p less what is left of it is the lost ones' part, a square system: its inverse says what
  // each lost one is.
  std::vector<std::uint8_t> square(n * n), inverse(n * n);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t l = 0; l < n; ++l) {
      square[i * n + l] = code.factor(out.parities_[i], out.lost_[l]).value();
    }
  }
  // Singular only if something was named twice.
  EVERSTEP_CHECK(gf_invert_matrix(square.data(), inverse.data(), static_cast<int>(n)) == 0);
  out.of_parity_.reserve(n * n);
  out.of_shard_.reserve(n * code.shards());
  for (std::size_t l = 0; l < n; ++l) {
    for (std::size_t i = 0; i < n; ++i) out.of_parity_.emplace_back(inverse[l * n + i]);
    for (std::uint32_t j = 0; j < code.shards(); ++j) {
      std::uint8_t sum = 0;
      const bool is_lost = std::find(out.lost_.begin(), out.lost_.end(), j) != out.lost_.end();
      for (std::size_t i = 0; i < n && !is_lost; ++i) {
        sum ^= gf_mul(inverse[l * n + i], code.factor(out.parities_[i], j).value());
      }
      out.of_shard_.emplace_back(sum);
    }
  }
  return out;
}

void ParityDecoder::AddShard(std::uint32_t l, std::uint32_t shard, std::span<const std::byte> from,
                             std::byte* into) const {
  EVERSTEP_CHECK(l < lost_.size() && shard < shards_);
  EVERSTEP_CHECK(std::find(lost_.begin(), lost_.end(), shard) == lost_.end());
  MultiplyAdd(of_shard_[l * shards_ + shard], from, into);
}

void ParityDecoder::AddParity(std::uint32_t l, std::uint32_t p, std::span<const std::byte> from,
                              std::byte* into) const {
  const auto at = std::find(parities_.begin(), parities_.end(), p);
  EVERSTEP_CHECK(l < lost_.size() && at != parities_.end());
  MultiplyAdd(of_parity_[l * parities_.size() + static_cast<std::size_t>(at - parities_.begin())],
              from, into);
}

}  // namespace everstep::checkpoint
